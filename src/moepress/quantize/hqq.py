# SPDX-License-Identifier: Apache-2.0
"""HQQ: the zero of each group fitted by half-quadratic splitting, without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), in the default variant of the
package `hqq` (the one MiLo uses): p = 0.7, beta = 10, at most 20 iterations, a stop when the mean error of the whole
matrix no longer falls.

    q = clamp(round(w S + Z)),  e = shrink_p(w - (q - Z) / S, beta),  Z = mean_group(q - (w - e) S)

Older copies of the solver, MiLo's among them, also multiply beta by 1.01 in each iteration; the package no longer does
(0.2.8). That matters only where the shrinkage acts at all, which is where |w - D| > beta^(-1 / (2 - p)) = 0.17: far
above the residuals of large models, but not of every small one. Where a bound proves it idle it is not evaluated.

A group's iterates depend on no other group; only the stopping index does. So each chunk of rows runs all iterations
while it is in cache, keeps its history of zeros and errors, and the zeros of the common stopping index are picked at
the end. On a GPU the iterations of a chunk are one Triton kernel (moepress.quantize.hqq_triton), where Triton is.
"""

from __future__ import annotations

import torch

from moepress.quantize.affine import AffineWeight, group_views, half, minmax, row_chunks, to_codes
from moepress.quantize.hqq_triton import iterate_fused, why_not

NORM = 0.7
BETA = 10.0
ITERATIONS = 20
SHRINK_FROM = BETA ** (-1 / (2 - NORM))
"""Residuals up to this size shrink to zero."""


def hqq(name: str, weight: torch.Tensor, bits: int, group_size: int) -> AffineWeight:
    """A weight [N, K] of any float dtype -> codes, scale, zero."""
    ranges = list(row_chunks(weight))
    chunks = [_ChunkHistory(weight[rows].float(), bits, group_size, len(ranges) == 1) for rows in ranges]
    steps = _stopping_index(torch.stack([chunk.errors for chunk in chunks]).sum(0) / weight.numel())
    # filled in place: joining the chunks' codes would hold them twice
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for chunk, rows in zip(chunks, ranges, strict=True):
        codes[rows] = chunk.codes(weight[rows].float(), steps, bits, group_size)
    scale = torch.cat([chunk.inverse for chunk in chunks]).reciprocal_()
    zero = torch.cat([chunk.zeros[steps] for chunk in chunks])
    return AffineWeight(codes, half(name, scale, "scale"), half(name, zero, "zero"))


class _ChunkHistory:
    """All iterations of some rows: `inverse` [n, G], `zeros` [steps + 1, n, G], summed `errors` [steps]."""

    def __init__(self, rows: torch.Tensor, bits: int, group_size: int, alone: bool) -> None:
        inverses, zeros, errors = [], [], []
        views = list(group_views(rows, group_size))
        for groups in views:
            inverse, zero = minmax(groups, bits)
            history, summed = _iterate(groups, inverse, zero, bits, alone and len(views) == 1)
            inverses.append(inverse.squeeze(-1))
            zeros.append(history.squeeze(-1))
            errors.append(summed)
        self.inverse, self.zeros = torch.cat(inverses, 1), torch.cat(zeros, 2)
        self.errors = torch.stack(errors).sum(0)

    def codes(self, rows: torch.Tensor, steps: int, bits: int, group_size: int) -> torch.Tensor:
        """The codes of these rows with the zeros after `steps` iterations."""
        codes, first = [], 0
        for groups in group_views(rows, group_size):
            here = slice(first, first + groups.shape[1])
            inverse, zero = self.inverse[:, here], self.zeros[steps][:, here]
            codes.append(to_codes(groups, inverse.unsqueeze(-1), zero.unsqueeze(-1), bits).flatten(1))
            first = here.stop
        return torch.cat(codes, 1)


def _iterate(
    groups: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, bits: int, alone: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros [steps + 1, n, G, 1] (the first is the start) and the summed |w - D| [steps] of each iteration.

    `alone` says that these groups are the whole matrix, so that their error decides when to stop.
    """
    if why_not(groups) is None:
        return iterate_fused(groups, inverse, zero, 2**bits - 1, ITERATIONS, BETA, NORM)
    inert = _shrinkage_is_inert(groups, inverse)
    scaled = groups * inverse
    shifted, codes = torch.empty_like(scaled), torch.empty_like(scaled)
    zeros, errors = [zero], []
    best = float("inf")
    for _ in range(ITERATIONS):
        torch.add(scaled, zero, out=shifted)
        torch.round(shifted, out=codes).clamp_(0, 2**bits - 1)
        if inert:
            error = shifted.sub_(codes).abs_().sum(-1, keepdim=True).div_(inverse).sum(dtype=torch.float64)
            zero = codes.sub_(scaled).mean(-1, keepdim=True)
        else:
            residual = torch.sub(groups, torch.sub(codes, zero, out=shifted).div_(inverse), out=shifted)
            exceeds = _may_exceed(zero - zeros[0], inverse)
            zero = _shrunken_zero(groups, scaled, inverse, codes, residual, exceeds)
            error = residual.abs_().sum(dtype=torch.float64)
        zeros.append(zero)
        errors.append(error)
        if alone:
            mean = (error / groups.numel()).float().item()
            if not mean < best:
                break
            best = mean
    return torch.stack(zeros), torch.stack(errors)


def _may_exceed(shift: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Which groups [n, G], whose zero has moved by `shift`, can hold a residual that the shrinkage does not erase."""
    # in code units w S + Z starts inside [0, 2^b - 1]: rounding moves it by 1/2 and clamping by |shift| at most;
    # 0.02 covers the rounding of float32, where |w S| reaches MAX_ZERO
    return (shift.abs().clamp_(min=0.5).add_(0.02) / inverse > SHRINK_FROM).squeeze(-1)


def _shrunken_zero(
    groups: torch.Tensor,
    scaled: torch.Tensor,
    inverse: torch.Tensor,
    codes: torch.Tensor,
    residual: torch.Tensor,
    exceeds: torch.Tensor,
) -> torch.Tensor:
    """mean(q - (w - e) S) of each group, with e evaluated only where it can differ from 0; overwrites `codes`."""
    count = int(exceeds.sum())
    if 2 * count > exceeds.numel():
        return codes.sub_(groups.sub(shrink(residual)).mul_(inverse)).mean(-1, keepdim=True)
    if not count:
        return codes.sub_(scaled).mean(-1, keepdim=True)
    few = exceeds.nonzero(as_tuple=True)
    targets = (groups[few] - shrink(residual[few])) * inverse[few]
    corrected = (codes[few] - targets).mean(-1, keepdim=True)
    return codes.sub_(scaled).mean(-1, keepdim=True).index_put_(few, corrected)


def shrink(residual: torch.Tensor) -> torch.Tensor:
    """The generalised soft threshold sign(x) relu(|x| - |x|^(p - 1) / beta) of HQQ."""
    size = residual.abs()
    if size.max() <= SHRINK_FROM:
        return torch.zeros_like(residual)
    return size.sub_(size.pow(NORM - 1).div_(BETA)).clamp_(min=0).copysign_(residual)


def _shrinkage_is_inert(groups: torch.Tensor, inverse: torch.Tensor) -> bool:
    # |w - D| <= (spread of w) + (spread of D) <= 2 spread + one step, since both have the same mean after an update
    low, high = groups.aminmax(dim=-1, keepdim=True)
    bound = (2 * (high - low) + inverse.reciprocal()).max().item()
    return bound < SHRINK_FROM


def _stopping_index(means: torch.Tensor) -> int:
    """How many updates the reference performs: up to and including the first that did not lower the error.

    Like the reference it compares float32 means, for which the last, tiny improvements do not exist.
    """
    best = float("inf")
    for i, mean in enumerate(means.float().tolist()):
        if not mean < best:
            return i + 1
        best = mean
    return len(means)
