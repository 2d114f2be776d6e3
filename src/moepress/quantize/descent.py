# SPDX-License-Identifier: Apache-2.0
"""Coordinate descent on tr(E H E^T), from codes that a first pass left (ours; the code step is that of QuantEase,
arXiv 2309.01885).

Group by group: each column's code is chosen anew given all other columns, then the group's scale and zero are solved
for given all codes. The error falls with each step or the step is not taken. On smol-sized matrices at 3 bits three
sweeps take 15 to 20 % off GPTQ's error, at 1 and 2 bits 25 %; further sweeps little.
"""

from __future__ import annotations

import torch

from moepress.quantize import gptq_triton
from moepress.quantize.affine import MAX_INVERSE_SCALE
from moepress.quantize.grid import codes_of


def descend(  # type: ignore[no-untyped-def]
    weights, moments, extra, codes, scale, zero, top, group_size, sweeps
):
    """float32 [B, N, K] weights and codes, H [B, K, K] and what damping adds [B, K], scale and zero [B, N, G] -> new
    codes, scale and zero."""
    starts = range(0, weights.shape[2], group_size)
    codes, scale, zero = codes.clone(), scale.clone(), zero.clone()
    parts = [values_of(codes[:, :, k : k + group_size], scale[:, :, g], zero[:, :, g]) for g, k in enumerate(starts)]
    error = torch.cat(parts, 2).sub_(weights)
    slope = (error @ moments).addcmul_(error, extra.unsqueeze(1))
    for _ in range(sweeps):
        for g, start in enumerate(starts):
            here = slice(start, min(start + group_size, weights.shape[2]))
            own = moments[:, here, here] + torch.diag_embed(extra[:, here])
            s, z = scale[:, :, g], zero[:, :, g]
            before = values_of(codes[:, :, here], s, z)
            codes[:, :, here], local = descend_block(before, slope[:, :, here], own, s, z, top)
            _refit(codes[:, :, here], own, local, s, z, top)
            moved = values_of(codes[:, :, here], s, z) - before
            slope.baddbmm_(moved, moments[:, here])
            slope[:, :, here].addcmul_(moved, extra[:, here].unsqueeze(1))
    return codes, scale, zero


def descend_block(value, slope, own, scale, zero, top):  # type: ignore[no-untyped-def]
    """One group's columns [B, N, k], each re-rounded given all others: codes, and the slope E H after the moves."""
    if gptq_triton.why_not(value) is None:
        return gptq_triton.descend_block(value, slope, own, scale, zero, top)
    # columns as rows: what a step reads and writes is contiguous (2.5 times as fast on a CPU)
    now, lean, top = value.mT.contiguous(), slope.mT.contiguous(), top.unsqueeze(1)
    codes = torch.empty_like(now)
    moved = torch.empty_like(now)
    for j in range(value.shape[2]):
        codes[:, j] = codes_of(now[:, j] - lean[:, j] / own[:, j, j].unsqueeze(1), scale, zero, top)
        moved[:, j] = (codes[:, j] - zero) * scale - now[:, j]
        lean[:, j + 1 :].addcmul_(own[:, j, j + 1 :].unsqueeze(2), moved[:, j].unsqueeze(1))
    return codes.mT, slope + moved.mT @ own


def values_of(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """codes [B, N, k], scale and zero [B, N] -> values."""
    return (codes - zero.unsqueeze(2)) * scale.unsqueeze(2)


def _refit(codes, own, slope, scale, zero, top):  # type: ignore[no-untyped-def]
    """Scale and zero of one group given its codes and every other group; changed in place where the error falls.

    min over (a, b) of |E + a codes + b 1| in the metric of H is two equations a row; `slope` is E H on the group.
    """
    lean, flat = codes @ own, own.sum(2)
    qq, q1 = (lean * codes).sum(2), (codes * flat.unsqueeze(1)).sum(2)
    one = flat.sum(1, keepdim=True)
    gq, g1 = (slope * codes).sum(2), slope.sum(2)
    determinant = qq * one - q1 * q1
    new_scale = (scale + (q1 * g1 - one * gq) / determinant).half().float()
    new_zero = ((scale * zero - (q1 * gq - qq * g1) / determinant) / new_scale).half().float()
    change = values_of(codes, new_scale, new_zero) - values_of(codes, scale, zero)
    gain = 2 * (slope * change).sum(2) + ((change @ own) * change).sum(2)
    # one bit stays +-mean|w|
    good = (gain < 0) & (new_scale > 1 / MAX_INVERSE_SCALE) & new_zero.isfinite() & (top.unsqueeze(1) > 1)
    scale.copy_(torch.where(good, new_scale, scale))
    zero.copy_(torch.where(good, new_zero, zero))
