# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round column by column, and let the columns still to come make up for the error on the real inputs.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ" (ICLR 2023, arXiv 2210.17323). With H the second moment of a weight's
inputs the error that counts is tr(E H E^T), not |E|^2. Several weights of one shape (a layer's experts) go through one
call, each with its own H and width: the loop over columns is what costs, and it is then run once.

Groups are static: scale and zero of every group are fixed before the first column is rounded
(moepress.quantize.grid), so columns may be visited in the order of falling diag H (act-order) while nothing but codes,
scales and zeros is stored. Then `descend` (ours, moepress.quantize.descent) re-rounds what GPTQ left.

The rows of a weight do not know of each other, so they are taken in chunks: beside H and its factor little memory is
needed. One bit is +-mean|w| of the group (MC-MoE): scale 2 mean|w|, zero 0.5.

Legend: B weights, N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moepress.quantize import gptq_triton
from moepress.quantize.affine import AffineWeight, half
from moepress.quantize.descent import descend
from moepress.quantize.grid import codes_of, fit_groups
from moepress.quantize.parallel import run_jobs


@dataclass(frozen=True, kw_only=True)
class GptqOptions:
    """How to round. The defaults are ours; `MC_MOE` is the variant that MC-MoE released."""

    damping: float = 0.01
    """Share of the mean of diag H that is added to diag H."""
    act_order: bool = True
    """Visit columns in the order of falling diag H."""
    block: int = 128
    feedback_bits: int = 1
    """Least width at which an error is fed back to the columns of its own block; 4 in MC-MoE's released code."""
    sweeps: int = 3
    """Passes of `descend`; 0 is plain GPTQ."""


MC_MOE = GptqOptions(act_order=False, feedback_bits=4, sweeps=0)
_EXACT = 2048
"""Columns up to which factors are made in float64, 32 MB each."""
VARIANTS = {"default": GptqOptions(), "plain": GptqOptions(act_order=False, sweeps=0), "mc-moe": MC_MOE}


@dataclass(frozen=True)
class Metric:
    """Second moments of the inputs and what rounding needs of them; made once, used for any width and group size."""

    moments: torch.Tensor
    """H [B, K, K] float32, without damping."""
    extra: torch.Tensor
    """What damping adds to the diagonals [B, K]."""
    order: torch.Tensor
    """The columns in the order they are visited [B, K]."""
    upper: torch.Tensor
    """[B, K, K]: upper Cholesky factor of the inverse of the damped H, in that order."""


def make_metric(moments: torch.Tensor, options: GptqOptions | None = None) -> Metric:
    """float32 H [B, K, K], kept and not copied, to a Metric. An input that never occurred counts like the mean one."""
    options = options or GptqOptions()
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    extra = torch.where(diagonal > 0, options.damping * mean, mean)
    order = torch.arange(moments.shape[1], device=moments.device).repeat(len(moments), 1)
    if options.act_order:
        order = (diagonal + extra).argsort(dim=1, descending=True, stable=True)
    factors = [_inverse_factor(*each) for each in zip(moments, extra, order, strict=True)]
    # one large factor is not copied: 0.8 GB of Mixtral's down-projections
    upper = factors[0].unsqueeze(0) if len(factors) == 1 else torch.stack(factors)
    return Metric(moments, extra, order, upper)


def gptq(
    names: Sequence[str],
    weights: torch.Tensor,
    metric: Metric,
    bits: Sequence[int],
    group_size: int,
    options: GptqOptions | None = None,
) -> list[AffineWeight]:
    """float32 weights [B, N, K], their inputs' metric and a width for each -> their codes, scales and zeros.

    Raises CheckpointError where a scale or zero does not fit fp16.
    """
    options = options or GptqOptions()
    top = torch.tensor([2.0**b - 1 for b in bits], device=weights.device)
    feed = torch.tensor([b >= options.feedback_bits for b in bits], device=weights.device)
    jobs = (
        partial(_round_rows, names, weights[:, rows], metric, top, feed, group_size, options)
        for rows in _row_chunks(weights)
    )
    chunks = list(run_jobs(jobs, weights.device))
    codes, scale, zero = (torch.cat(each, 1) for each in zip(*chunks, strict=True))
    return [
        AffineWeight(codes[i], half(name, scale[i], "scale"), half(name, zero[i], "zero"))
        for i, name in enumerate(names)
    ]


def _row_chunks(weights: torch.Tensor) -> list[slice]:
    # on a CPU one thread a chunk: with two threads an operation, each a few microseconds long, the loops over columns
    # took 40 to 240 times as long as with one on a machine that does anything else. At least 256 rows in all, so that
    # large moments are not read for little; ten float32 temporaries of a chunk
    count, size, columns = weights.shape
    rows = (1 << 27) // (count * columns) if weights.is_cuda else max((1 << 19) // columns, 256) // count
    chunks = -(-size // max(rows, 1))
    rows = -(-size // chunks)
    return [slice(start, start + rows) for start in range(0, size, rows)]


def _round_rows(names, weights, metric, top, feed, group_size, options):  # type: ignore[no-untyped-def]
    importance = metric.moments.diagonal(dim1=1, dim2=2) + metric.extra
    scale, zero = fit_groups(names, weights, importance, top, group_size)
    codes = _round_columns(weights, metric, scale, zero, top, feed, group_size, options.block)
    if options.sweeps:
        codes, scale, zero = descend(
            weights, metric.moments, metric.extra, codes, scale, zero, top, group_size, options.sweeps
        )
    return codes.to(torch.uint8), scale, zero


def _round_columns(weights, metric, scale, zero, top, feed, group_size, block):  # type: ignore[no-untyped-def]
    """The GPTQ loop; float codes [B, N, K] in the columns' own order."""
    columns = metric.order.unsqueeze(1).expand_as(weights)
    rest = weights.gather(2, columns)
    group = torch.div(columns, group_size, rounding_mode="floor")
    codes = torch.empty_like(rest)
    for start in range(0, weights.shape[2], block):
        here = slice(start, min(start + block, weights.shape[2]))
        scales, zeros = scale.gather(2, group[:, :, here]), zero.gather(2, group[:, :, here])
        codes[:, :, here], errors = round_block(rest[:, :, here], metric.upper[:, here, here], scales, zeros, top, feed)
        rest[:, :, here.stop :].baddbmm_(errors, metric.upper[:, here, here.stop :], alpha=-1)
    return torch.empty_like(codes).scatter_(2, columns, codes)


def round_block(rest, upper, scale, zero, top, feed):  # type: ignore[no-untyped-def]
    """One block of columns [B, N, k]: their codes, and the errors over the pivots that later blocks make up for."""
    if gptq_triton.why_not(rest) is None:
        return gptq_triton.round_block(rest, upper, scale, zero, top, feed)
    # columns as rows: what a step reads and writes is contiguous
    rest, scale, zero = rest.mT.contiguous(), scale.mT.contiguous(), zero.mT.contiguous()
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    top, feed = top.unsqueeze(1), feed.unsqueeze(1)
    for j in range(rest.shape[1]):
        codes[:, j] = codes_of(rest[:, j], scale[:, j], zero[:, j], top)
        errors[:, j] = (rest[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / upper[:, j, j].unsqueeze(1)
        fed = (errors[:, j] * feed).unsqueeze(1)
        rest[:, j + 1 :].addcmul_(upper[:, j, j + 1 :].unsqueeze(2), fed, value=-1)
    return codes.mT, errors.mT


def _inverse_factor(moment: torch.Tensor, extra: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of H [K, K], its columns in the given order.

    With J reversing the columns and J H J = L L^T, the factor is J L^-1 J. At most one more copy of H at a time, in
    float64 where H is small: the moment of one token has a condition of 1e5, and in float32 its factor is off by 1e-3,
    a little more or less by the CPU.
    """
    backwards = order.flip(0)
    factor = moment.index_select(0, backwards).index_select(1, backwards)
    if len(factor) <= _EXACT:
        factor = factor.double()
    factor.diagonal().add_(extra[backwards])
    factor = torch.linalg.cholesky(factor)
    _invert_lower_(factor)
    return factor.flip(0, 1).to(moment.dtype)


def _invert_lower_(factor: torch.Tensor) -> None:
    """A lower triangular matrix [K, K] to its inverse, in place, by halves."""
    size = len(factor)
    if size <= 1024:
        eye = torch.eye(size, device=factor.device, dtype=factor.dtype)
        factor.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))
        return
    middle = size // 2
    first, last, below = factor[:middle, :middle], factor[middle:, middle:], factor[middle:, :middle]
    _invert_lower_(first)
    _invert_lower_(last)
    below.copy_((last @ below).neg_() @ first)
