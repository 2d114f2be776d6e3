# SPDX-License-Identifier: Apache-2.0
"""Routers of compressed layers that run on a CUDA kernel where they can, and elsewhere as transformers has them.

`adopt` gives a router of transformers another class, a subclass of its own: parameters, state dict, and what
transformers finds by class (initial values, recorded router logits) stay as they are. What cannot run on the kernel is
left to the class that it had: other devices and dtypes, and passes in which the router has a gradient.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

from moepress.errors import CheckpointError
from moepress.graph.view import Family
from moepress.kernels.problem import ROUTER, Problem
from moepress.kernels.registry import CUDA, select
from moepress.kernels.router.cuda import Selection, route_tokens
from moepress.kernels.router.reference import Routed, Routing


class Selecting(Protocol):
    """Who may decide after a router which of a token's experts run."""

    decided: bool
    """Whether what the router gave last is pruned; the router says so."""

    def selection(self, device: torch.device, dtype: torch.dtype) -> Selection | None:
        """How to decide in the router's launch for such inputs; None: not there."""


class FusedRouter(nn.Module):
    """Before the router's own class in the order of classes."""

    weight: torch.Tensor
    routing: Routing
    _settled: dict[torch.dtype, bool]
    _settled_on: torch.device | None
    _selecting: tuple[Selecting, ...]
    """One or none; in a tuple, or it would become a submodule."""

    def forward(self, hidden_states: torch.Tensor) -> Routed:
        """hidden_states [..., H] -> logits [T, E], weights [T, k], ids [T, k]."""
        if not self._ready(hidden_states):
            return super().forward(hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        selection = None
        for each in self._selecting:
            selection = each.selection(flat.device, flat.dtype)
            each.decided = selection is not None
        return route_tokens(flat, self.weight, self.routing, selection)

    def select_by(self, selecting: Selecting | None) -> None:
        """From here on `selecting` may decide in the router's launch; None: nobody."""
        self._selecting = () if selecting is None else (selecting,)

    def selections(self, dtype: torch.dtype) -> list[Selection | None]:
        """With which selectors, or without, it may run for inputs of this dtype as things are."""
        return [None, *(each.selection(self.weight.device, dtype) for each in self._selecting)]

    def settle(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the CUDA kernel runs for inputs of this dtype on this device. KernelError as `registry.select`."""
        if device == self._settled_on and (found := self._settled.get(dtype)) is not None:
            return found
        if torch.compiler.is_compiling() and device.type != "cuda":
            return False
        return self._settle(device, dtype)

    def _ready(self, x: torch.Tensor) -> bool:
        weight = self.weight
        if weight.device != x.device or weight.dtype != x.dtype:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        return self.settle(x.device, x.dtype)

    @torch.compiler.disable(
        reason="a router meets its first input; run the model once, or moepress.warmup(model), before"
    )
    def _settle(self, device: torch.device, dtype: torch.dtype) -> bool:
        if device != self._settled_on:
            self._settled, self._settled_on = {}, device
        experts, columns = self.weight.shape
        problem = Problem(ROUTER, device, dtype, (), experts=experts, top_k=self.routing.top_k, columns=columns)
        self._settled[dtype] = select(problem) == CUDA
        return self._settled[dtype]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # its class is made at run time and has no name to be found by
        return _remake, (type(self).__mro__[2],), self.__dict__


def routing_of(family: Family, config: Any) -> Routing | None:
    """What the routers of a model with this config do; None for another kind of router."""
    kind = family.router
    if kind is None or any(getattr(config, key, None) != wanted for key, wanted in kind.only_if):
        return None
    renormalises = bool(config.norm_topk_prob) if family.renormalises is None else family.renormalises
    scaling = 1.0 if kind.scaling is None else float(getattr(config, kind.scaling))
    return Routing(config.num_experts_per_tok, renormalises, scaling, kind.float32_weights, kind.float32_logits)


def adopt(model: nn.Module, family: Family, experts: str) -> None:
    """Lets the router beside the module `experts` run on kernels, if the family has a router of that kind.

    CheckpointError where the router is not what the family says.
    """
    routing = routing_of(family, model.config)
    if routing is None:
        return
    assert family.router is not None
    block = model.get_submodule(experts.rpartition(".")[0])
    router = getattr(block, family.router.module, None)
    weight = getattr(router, "weight", None)
    if not isinstance(router, nn.Module) or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise CheckpointError(f"{type(block).__name__} has no router {family.router.module} that moepress knows")
    if not isinstance(router, FusedRouter):
        router.__class__ = _class_of(type(router))
        router.routing, router._settled, router._settled_on, router._selecting = routing, {}, None, ()


def routers_of(model: nn.Module) -> list[FusedRouter]:
    """Those that may run on the kernel, in layer order."""
    return [module for module in model.modules() if isinstance(module, FusedRouter)]


def settle_routers(model: nn.Module, dtype: torch.dtype) -> list[FusedRouter]:
    """Settles which kernel runs for inputs of `dtype`; those that run on CUDA's. KernelError as `settle`."""
    routers = (router for router in routers_of(model) if router.weight.device.type != "meta")
    return [router for router in routers if router.weight.dtype == dtype and router.settle(router.weight.device, dtype)]


@cache
def _class_of(own: type) -> Any:
    return type(own.__name__, (FusedRouter, own), {"__module__": own.__module__, "__doc__": own.__doc__})


def _remake(own: type) -> FusedRouter:
    made = _class_of(own)
    return made.__new__(made)
