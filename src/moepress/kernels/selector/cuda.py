# SPDX-License-Identifier: Apache-2.0
"""A learned selector between router and experts as one CUDA kernel, and what torch must know of it."""

from __future__ import annotations

import torch

from moepress.kernels.banks import aligned, needs_operation, no_gradient, why_not_here
from moepress.kernels.problem import Problem
from moepress.kernels.selector.reference import Costs


def why_not(problem: Problem) -> str | None:
    """None where the kernel can run, else the reason it cannot."""
    if reason := why_not_here(problem):
        return reason
    from moepress.kernels.cuda import run

    if problem.top_k > run.MAX_SLOTS:
        return f"the selector's CUDA kernel takes at most {run.MAX_SLOTS} experts a token, not {problem.top_k}"
    return run.why_not_columns(problem.device, problem.dtype, problem.columns)


def select_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, costs: Costs, dial: torch.Tensor, renormalises: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] in bf16 or fp16, ids and weights [T, k] of the router -> both, with -1 and 0 for what is dropped.

    `worth_running` keeps at the price 1 + dial. Where it `renormalises`, weights have the token's former sum.
    """
    exact = weights if weights.dtype in (torch.float32, x.dtype) else weights.float()
    arguments = x.contiguous(), ids.contiguous(), exact.contiguous(), *costs, dial, renormalises
    new_ids, new_weights = select_op(*arguments) if needs_operation() else _select(*arguments)
    return new_ids, new_weights.to(weights.dtype)


def _select(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    projection: torch.Tensor,
    sensitivity: torch.Tensor,
    offset: torch.Tensor,
    power: torch.Tensor,
    dial: torch.Tensor,
    renormalises: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not len(x):
        return torch.empty_like(ids), torch.empty_like(weights)
    from moepress.kernels.cuda.select import launch_select

    costs = Costs(projection, sensitivity, offset, power)
    return launch_select(aligned(x), ids, weights, costs, dial, renormalises)


select_op = torch.library.custom_op("moepress::select", _select, mutates_args=())


@select_op.register_fake
def _(x, ids, weights, *others):
    return torch.empty_like(ids), torch.empty_like(weights)


select_op.register_autograd(no_gradient)
