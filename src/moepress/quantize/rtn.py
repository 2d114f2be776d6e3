# SPDX-License-Identifier: Apache-2.0
"""RTN: round to nearest on each group's min/max grid. The baseline that every other method must beat."""

from __future__ import annotations

import torch

from moepress.quantize.affine import AffineWeight, group_views, half, minmax, row_chunks, to_codes


def rtn(name: str, weight: torch.Tensor, bits: int, group_size: int) -> AffineWeight:
    """A weight [N, K] of any float dtype -> codes, scale, zero."""
    # filled in place: joining the chunks' codes would hold them twice
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    inverses, zeros = [], []
    for rows in row_chunks(weight):
        codes[rows], inverse, zero = _rtn_rows(weight[rows].float(), bits, group_size)
        inverses.append(inverse)
        zeros.append(zero)
    inverse, zero = torch.cat(inverses), torch.cat(zeros)
    return AffineWeight(codes, half(name, inverse.reciprocal(), "scale"), half(name, zero, "zero"))


def _rtn_rows(rows: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, inverses, zeros = [], [], []
    for groups in group_views(rows, group_size):
        inverse, zero = minmax(groups, bits)
        codes.append(to_codes(groups, inverse, zero, bits).flatten(1))
        inverses.append(inverse.squeeze(-1))
        zeros.append(zero.squeeze(-1))
    return torch.cat(codes, 1), torch.cat(inverses, 1), torch.cat(zeros, 1)
