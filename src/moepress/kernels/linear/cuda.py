# SPDX-License-Identifier: Apache-2.0
"""y = x W^T (+ bias) for one compressed weight in records: the CUDA kernel, and what torch must know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts, dequantize_factors
from moepress.kernels.banks import (
    FactorWeights,
    Weights,
    aligned,
    factor_arguments,
    needs_operation,
    no_gradient,
    ready_factors,
    rebuild,
    rebuild_factors,
    why_not_here,
)
from moepress.kernels.problem import Problem

if TYPE_CHECKING:
    from moepress.kernels.cuda.bank import Factors, RecordBank


def why_not(problem: Problem) -> str | None:
    """None where the kernel can run, else the reason it cannot. A compensator is none."""
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
    bias = None if bias is None else bias.to(x.dtype)
    in_records = factors if spec.rank and isinstance(factors, FactorWeights) else None
    if needs_operation():
        y = linear_op(flat, *weights[:3], bias, out_features, *factor_arguments(in_records))
    else:
        y = _linear(flat, weights.bank, bias, out_features, ready_factors(in_records))
    if spec.rank and not isinstance(factors, FactorWeights):
        u, v = dequantize_factors(factors, spec, out_features, x.shape[-1])
        y += linear(linear(flat, v.to(x.dtype)), u.to(x.dtype))
    return y.view(*x.shape[:-1], out_features)


def _linear(
    x: torch.Tensor, bank: RecordBank, bias: torch.Tensor | None, out_features: int, factors: Factors | None
) -> torch.Tensor:
    from moepress.kernels.cuda import run

    return run.linear(aligned(x), bank, bias, out_features, factors) if len(x) else x.new_empty(0, out_features)


@torch.library.custom_op("moepress::linear", mutates_args=())
def linear_op(
    x: torch.Tensor,
    records: list[torch.Tensor],
    table: torch.Tensor,
    text: str,
    bias: torch.Tensor | None,
    out_features: int,
    factors: list[torch.Tensor],
    factors_text: str,
) -> torch.Tensor:
    """x [M, K] -> [M, N]; records, table and text as in `Weights`, factors as in `factor_arguments`."""
    return _linear(x, rebuild(records, table, text), bias, out_features, rebuild_factors(factors, factors_text))


@linear_op.register_fake
def _(x, records, table, text, bias, out_features, factors, factors_text):
    return x.new_empty(x.shape[0], out_features)


linear_op.register_autograd(no_gradient)
