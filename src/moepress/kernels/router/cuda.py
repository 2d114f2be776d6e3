# SPDX-License-Identifier: Apache-2.0
"""A router, and a learned selector after it if there is one, as one CUDA kernel, and what torch must know of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moepress.kernels.banks import aligned, needs_operation, no_gradient, why_not_here
from moepress.kernels.problem import Problem
from moepress.kernels.router.reference import Routed, Routing, route
from moepress.kernels.selector.reference import Costs

FEW = 64
"""Up to so many tokens it is one launch. With more, torch's own product and top k take no longer than the kernel would;
the selector is a launch of its own then."""


class Selection(NamedTuple):
    """A selector, as it decides after the router."""

    costs: Costs
    dial: torch.Tensor
    """float32 []: an expert costs 1 + dial."""
    renormalises: bool
    """Whether weights of kept choices take over the sum of all."""


def why_not(problem: Problem) -> str | None:
    """None where the kernel can run, else the reason it cannot."""
    if reason := why_not_here(problem):
        return reason
    from moepress.kernels.cuda import run

    if problem.experts > run.MAX_EXPERTS:
        return f"the router's CUDA kernel takes at most {run.MAX_EXPERTS} experts a layer, not {problem.experts}"
    if problem.top_k > run.MAX_SLOTS:
        return f"the router's CUDA kernel takes at most {run.MAX_SLOTS} experts a token, not {problem.top_k}"
    return run.why_not_columns(problem.device, problem.dtype, problem.columns)


def route_tokens(x: torch.Tensor, weight: torch.Tensor, routing: Routing, selection: Selection | None = None) -> Routed:
    """x [T, H] and weight [E, H] in bf16 or fp16 -> logits [T, E], weights [T, k] and ids int64 [T, k].

    As `reference.route` has them, but equal logits in the order of ids. What the `selection` drops has id -1 and
    weight 0. More than FEW tokens are `reference.route` itself, and then the selector's kernel.
    """
    tensors = [] if selection is None else [*selection.costs, selection.dial]
    rescales = selection is not None and selection.renormalises
    arguments = x.contiguous(), weight.contiguous(), *routing, tensors, rescales
    return route_op(*arguments) if needs_operation() else _route(*arguments)


def _route(
    x: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    renormalises: bool,
    scaling: float,
    float32_weights: bool,
    float32_logits: bool,
    selector: list[torch.Tensor],
    rescales: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`selector` holds those of a `Selection`, or nothing."""
    routing = Routing(top_k, renormalises, scaling, float32_weights, float32_logits)
    selection = Selection(Costs(*selector[:4]), selector[4], rescales) if selector else None
    if 0 < len(x) <= FEW:
        from moepress.kernels.cuda.router import launch_route

        return launch_route(aligned(x), aligned(weight), routing, selection)
    logits, weights, ids = route(x, weight, routing)
    if selection is not None and len(x):
        from moepress.kernels.cuda.select import launch_select

        ids, weights = launch_select(aligned(x), ids, weights, *selection)
    return logits, weights, ids


route_op = torch.library.custom_op("moepress::route", _route, mutates_args=())


@route_op.register_fake
def _(x, weight, top_k, renormalises, scaling, float32_weights, float32_logits, selector, rescales):
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32 if float32_logits else x.dtype)
    weights = x.new_empty(len(x), top_k, dtype=torch.float32 if float32_weights else logits.dtype)
    return logits, weights, x.new_empty(len(x), top_k, dtype=torch.int64)


route_op.register_autograd(no_gradient)
