# SPDX-License-Identifier: Apache-2.0
"""y = x W^T (+ bias) for one compressed weight in records: the CUDA kernel, and what torch must know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts, dequantize_factors
from moepress.kernels.banks import FactorWeights, Weights, aligned, needs_operation, no_gradient, rebuild, why_not_here
from moepress.kernels.factors import stored_rank
from moepress.kernels.problem import Problem

if TYPE_CHECKING:
    from moepress.kernels.cuda.run import RecordBank


def why_not(problem: Problem) -> str | None:
    """None where the kernel can run, else the reason it cannot. A compensator is none: it is two more calls."""
    if reason := why_not_here(problem):
        return reason
    from moepress.kernels.cuda import run

    return run.why_not_linear(problem.device, problem.dtype, problem.layouts[0])


def packed_linear(
    x: torch.Tensor,
    weights: Weights,
    spec: WeightSpec,
    factors: Parts | FactorWeights,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] in bf16 or fp16 -> [..., N]; arguments of `compressed_linear`, the weight in records.

    `factors`, where spec.rank is not 0, are v and u in records, or their stored parts where they have none.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = _multiply(flat, weights, None if bias is None else bias.to(x.dtype), out_features)
    if spec.rank and isinstance(factors, FactorWeights):
        y += _multiply(_multiply(flat, factors.v, None, stored_rank(spec.rank)), factors.u, None, out_features)
    elif spec.rank:
        u, v = dequantize_factors(factors, spec, out_features, x.shape[-1])
        y += linear(linear(flat, v.to(x.dtype)), u.to(x.dtype))
    return y.view(*x.shape[:-1], out_features)


def _multiply(x: torch.Tensor, weights: Weights, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    if needs_operation():
        return linear_op(x, weights.records, weights.table, weights.text, bias, out_features)
    return _linear(x, weights.bank, bias, out_features)


def _linear(x: torch.Tensor, bank: RecordBank, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    from moepress.kernels.cuda import run

    return run.linear(aligned(x), bank, bias, out_features) if len(x) else x.new_empty(0, out_features)


@torch.library.custom_op("moepress::linear", mutates_args=())
def linear_op(
    x: torch.Tensor,
    records: list[torch.Tensor],
    table: torch.Tensor,
    text: str,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """x [M, K] -> [M, N]; records, table and text as in `Weights`."""
    return _linear(x, rebuild(records, table, text), bias, out_features)


@linear_op.register_fake
def _(x, records, table, text, bias, out_features):
    return x.new_empty(x.shape[0], out_features)


linear_op.register_autograd(no_gradient)
