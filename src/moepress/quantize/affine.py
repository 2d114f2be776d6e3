# SPDX-License-Identifier: Apache-2.0
"""What RTN and HQQ share: groups along the input dimension, min/max parameters, and their rounding to fp16.

Solvers work with the inverse scale S = (2^b - 1) / (max - min) and the zero Z = -min * S in code units, as HQQ does
(Badri and Shaji, "Half-Quadratic Quantization", 2023): code = clamp(round(w * S + Z), 0, 2^b - 1). Stored are
scale = 1 / S and zero = Z in fp16; Z is real-valued, never rounded to an integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moepress.errors import CheckpointError

MAX_INVERSE_SCALE = 2e4
"""HQQ's bound: keeps 1 / S a normal fp16 number."""
MAX_ZERO = 3e4
"""Ours: bounds |w| * S so that Z fits fp16 where a group lies far from zero; inert for |w| < 1.5."""
FLAT_RANGE = 1e-4
"""HQQ's rule: a group with a smaller range than this gets S = 1 and is stored as its minimum."""


@dataclass(frozen=True)
class AffineWeight:
    """codes uint8 [N, K]; scale and zero fp16 [N, G]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def group_views(weight: torch.Tensor, group_size: int) -> Iterator[torch.Tensor]:
    """[N, K] -> the whole groups [N, K // g, g] and, where K is ragged, the short last group [N, 1, K % g]."""
    whole = weight.shape[1] // group_size * group_size
    if whole:
        yield weight[:, :whole].unflatten(1, (-1, group_size))
    if whole < weight.shape[1]:
        yield weight[:, whole:].unsqueeze(1)


def row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Row ranges whose float32 temporaries stay in cache on a CPU and bounded on a GPU."""
    # 2^17 elements measured fastest for HQQ on 2 CPU cores (see docs/LOG.md); a GPU wants few large launches
    elements = 1 << 17 if weight.device.type == "cpu" else 1 << 26
    rows = max(1, elements // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def minmax(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 groups [..., g] -> inverse scale and zero [..., 1]."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    spread = high - low
    inverse = torch.where(spread <= FLAT_RANGE, 1.0, (2**bits - 1) / spread)
    reach = torch.maximum(low.abs(), high.abs())
    inverse = torch.minimum(inverse.clamp(max=MAX_INVERSE_SCALE), MAX_ZERO / reach)
    return inverse, -low * inverse


def to_codes(groups: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """clamp(round(w * S + Z)) as uint8, in the groups' shape."""
    return (groups * inverse).add_(zero).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def half(name: str, value: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 -> fp16; raises CheckpointError where a value does not fit."""
    rounded = value.half()
    if not torch.isfinite(rounded).all():
        largest = value.abs().max().item()
        raise CheckpointError(
            f"{name}: a {kind} of {largest:.3g} does not fit fp16 (at most 65504); "
            f"the weights are too large to be real, or keep this one with --keep '{name}'"
        )
    return rounded
