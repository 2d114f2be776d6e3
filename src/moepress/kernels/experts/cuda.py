# SPDX-License-Identifier: Apache-2.0
"""A layer's routed experts in records: the CUDA kernels, and what torch must know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
from moepress.kernels.cuda.bank import Factors
from moepress.kernels.factors import why_not_records
from moepress.kernels.problem import Problem

if TYPE_CHECKING:
    from moepress.kernels.cuda.run import RecordBank


def why_not(problem: Problem) -> str | None:
    """None where the kernels can run, else the reason they cannot."""
    for name, layouts, compensated in (
        ("gate and up", problem.layouts, problem.compensated), ("down", problem.down, problem.compensated_down)
    ):  # fmt: skip
        if len(sizes := {layout.group_size for layout in layouts}) > 1:
            return f"the experts of one layer have several group sizes ({name}: {', '.join(map(str, sorted(sizes)))})"
        if reason := why_not_records(compensated, layouts[0].columns):
            return f"compensators of experts run from records alone ({name}: {reason})"
    if reason := why_not_here(problem):
        return reason
    from moepress.kernels.cuda import run

    if problem.experts > run.MAX_EXPERTS:
        return f"CUDA kernels of experts take at most {run.MAX_EXPERTS} experts a layer, not {problem.experts}"
    return run.why_not_experts(
        problem.device, problem.dtype, problem.layouts, problem.down, problem.top_k, problem.activation
    )


def packed_experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: Weights,
    down: Weights,
    intermediate: int,
    gate_up_factors: FactorWeights | None = None,
    down_factors: FactorWeights | None = None,
) -> torch.Tensor:
    """x [T, H] in bf16 or fp16, ids and weights [T, k] -> [T, H]; ids outside the bank mean "run nothing".

    Weights that are float32 are used as they are, and the results of a token's experts are added in float32.
    """
    x, ids, weights = x.contiguous(), expert_ids.contiguous(), expert_weights.contiguous()
    ids = ids if ids.dtype in (torch.int64, torch.int32) else ids.long()
    weights = weights if weights.dtype in (torch.float32, x.dtype) else weights.float()
    if needs_operation():
        factors = *factor_arguments(gate_up_factors), *factor_arguments(down_factors)
        return experts_op(x, ids, weights, *gate_up[:3], *down[:3], intermediate, *factors)
    ready = ready_factors(gate_up_factors), ready_factors(down_factors)
    return _experts(x, ids, weights, gate_up.bank, down.bank, intermediate, *ready)


def _experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: RecordBank,
    down: RecordBank,
    intermediate: int,
    gate_up_factors: Factors | None,
    down_factors: Factors | None,
) -> torch.Tensor:
    if not len(x):
        return torch.empty_like(x)
    from moepress.kernels.cuda import run

    return run.experts(aligned(x), ids, weights, gate_up, down, intermediate, gate_up_factors, down_factors)


@torch.library.custom_op("moepress::experts", mutates_args=())
def experts_op(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_records: list[torch.Tensor],
    gate_up_table: torch.Tensor,
    gate_up_text: str,
    down_records: list[torch.Tensor],
    down_table: torch.Tensor,
    down_text: str,
    intermediate: int,
    gate_up_factors: list[torch.Tensor],
    gate_up_factors_text: str,
    down_factors: list[torch.Tensor],
    down_factors_text: str,
) -> torch.Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H]; others as in `Weights` and `factor_arguments`."""
    gate_up = rebuild(gate_up_records, gate_up_table, gate_up_text)
    down = rebuild(down_records, down_table, down_text)
    factors = rebuild_factors(gate_up_factors, gate_up_factors_text), rebuild_factors(down_factors, down_factors_text)
    return _experts(x, ids, weights, gate_up, down, intermediate, *factors)


@experts_op.register_fake
def _(x, *others):
    return torch.empty_like(x)


experts_op.register_autograd(no_gradient)
