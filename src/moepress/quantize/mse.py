# SPDX-License-Identifier: Apache-2.0
"""MSE: round to nearest on the grid that leaves each group the least squared error (moepress.quantize.grid), no data.

The range is searched and scale and zero are regressed on the codes, as GPTQ's are here, with every input alike. HQQ
minimises a norm that forgives a few large errors instead: at 3 bits its squared error is 1.2 to 1.3 times this one's,
at 2 bits 1.8 to 2 times (docs/LOG.md says what either does to a model).
"""

from __future__ import annotations

import torch

from moepress.quantize.affine import AffineWeight, half, row_chunks
from moepress.quantize.grid import codes_of, fit_groups


def mse(name: str, weight: torch.Tensor, bits: int, group_size: int) -> AffineWeight:
    """A weight [N, K] of any float dtype -> codes, scale, zero. Raises CheckpointError where these do not fit fp16."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    top = torch.tensor([2.0**bits - 1], device=weight.device)
    alike = torch.ones(1, weight.shape[1], device=weight.device)
    group = torch.arange(weight.shape[1], device=weight.device) // group_size
    scales, zeros = [], []
    for rows in row_chunks(weight):
        values = weight[rows].float()
        scale, zero = (each[0] for each in fit_groups([name], values.unsqueeze(0), alike, top, group_size))
        codes[rows] = codes_of(values, scale[:, group], zero[:, group], top).to(torch.uint8)
        scales.append(scale)
        zeros.append(zero)
    return AffineWeight(codes, half(name, torch.cat(scales), "scale"), half(name, torch.cat(zeros), "zero"))
