# SPDX-License-Identifier: Apache-2.0
"""What a layer should return, in float64, for a few of its tokens: the gate that a timed kernel has to pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moepress.bench.problems import Draw

TOKENS = 16
"""Tokens that are checked; spread over all of them, so that the ends of long inputs are among them."""
LIMIT = 0.03
"""Relative error beyond which a result is called wrong. 16-bit rounding between the matrices gives some 0.004."""
_ROWS = 4096

Weight = Callable[[int], torch.Tensor]
"""Expert -> its matrix [N, K] in any float dtype."""


def checked_tokens(tokens: int) -> list[int]:
    """Which tokens are compared: all of a few, else the first, the last and some between."""
    if tokens <= TOKENS:
        return list(range(tokens))
    return [round(i * (tokens - 1) / (TOKENS - 1)) for i in range(TOKENS)]


def dense_reference(draw: Draw, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] and W [N, K] -> float64 [checked tokens, N]."""
    return product(draw.x[checked_tokens(len(draw.x))], weight)


def moe_reference(draw: Draw, gate_up: Weight, down: Weight) -> torch.Tensor:
    """Experts' [2I, H] (gates first) and [H, I] -> float64 [checked tokens, H]."""
    assert draw.ids is not None and draw.weights is not None
    rows = checked_tokens(len(draw.x))
    x, ids, weights = draw.x[rows].double(), draw.ids[rows], draw.weights[rows].double()
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = product(x[token], gate_up(expert)).chunk(2, dim=1)
        out = product(torch.nn.functional.silu(gate) * up, down(expert))
        y.index_add_(0, token, out * weights[token, slot].unsqueeze(1))
    return y


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, K] times W^T, W [N, K] -> float64 [n, N]; W is widened a few rows at a time."""
    x = x.double()
    return torch.cat([x @ rows.double().T for rows in weight.split(_ROWS)], dim=1)


def errors(y: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Relative error |y - e| / |e|, and the largest single error in units of the root mean square of e."""
    difference = y[checked_tokens(len(y))].double() - expected
    size = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    largest = difference.abs().max() / (size / expected.numel() ** 0.5)
    return (difference.norm() / size).item(), largest.item()
