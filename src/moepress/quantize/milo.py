# SPDX-License-Identifier: Apache-2.0
"""MiLo: HQQ and a low-rank compensator fitted to each other by alternation.

Huang, Yuan, Shao and Zhang, "MiLo: Efficient Quantized MoE Inference with Mixture of Low-Rank Compensators" (MLSys
2025, arXiv 2504.02658), sub-problems 1 and 2:

    D_t = HQQ(W - U_{t-1} V_{t-1}) from scratch,   U_t V_t = the best rank-R approximation of W - D_t,   U_0 V_0 = 0

for t = 0 .. T, ending on the compensator. The factors are quantised after the loop (moepress.quantize.factors). The
loop stops early when the mean of |W - D - U V|_F over a sliding window falls by less than 1e-4 of itself. The paper
does not give the window's length; ours is 3. Of all alternations the one with the smallest norm is kept (ours; the
last one is on average 1 % worse at 3 bits and 15 % at 1 bit).

Inside the loop only the product U V is needed, and the projection q (q^T E) is that product: the small SVD that splits
it into balanced factors is taken once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepress.format.weight import affine
from moepress.quantize.affine import AffineWeight
from moepress.quantize.hqq import hqq
from moepress.quantize.lowrank import balance, project, seeded

WINDOW = 3
TOLERANCE = 1e-4


@dataclass(frozen=True)
class MiloResult:
    """The base, its float32 residual [N, K], the float32 factors u [N, R] and v [R, K] that approximate the residual,
    and |residual - u v|_F after each alternation."""

    base: AffineWeight
    residual: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    residual_norms: tuple[float, ...]


def milo(name: str, weight: torch.Tensor, bits: int, group_size: int, rank: int, iterations: int) -> MiloResult:
    """float32 weight [N, K]; `iterations` = T, so at most T + 1 quantisations and projections."""
    generator = seeded(name)
    norms: list[float] = []
    best: tuple[AffineWeight, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    target = weight
    while True:
        base = hqq(name, target, bits, group_size)
        residual = weight - affine(base.codes, base.scale, base.zero, group_size)
        q, b = project(residual, rank, generator)
        norms.append(_left_over(residual, b))
        if best is None or norms[-1] <= min(norms):
            best = (base, residual, q, b)
        if len(norms) > iterations or _has_settled(norms):
            base, residual, q, b = best
            return MiloResult(base, residual, *balance(q, b), tuple(norms))
        target = torch.addmm(weight, q, b, alpha=-1)


def _left_over(residual: torch.Tensor, b: torch.Tensor) -> float:
    # |E - q b|^2 = |E|^2 - |b|^2, because q is orthonormal
    squares = residual.square().sum(dtype=torch.float64) - b.square().sum(dtype=torch.float64)
    return squares.clamp(min=0).sqrt().item()


def _has_settled(norms: list[float]) -> bool:
    if len(norms) <= WINDOW:
        return False
    before, now = sum(norms[-WINDOW - 1 : -1]), sum(norms[-WINDOW:])
    return before - now <= TOLERANCE * before  # with equality, so that a residual of zero has settled
