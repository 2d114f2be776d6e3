# SPDX-License-Identifier: Apache-2.0
"""Selector: the learned rule. From a token to what leaving out each of its experts would cost, to those worth running.

The arithmetic is moepress/kernels/selector/reference.py: r = 8 features of the token's hidden vector, and what they say
of the cost of leaving out each expert, times a power of its routing weight. Where experts are compressed and the GPU
has a kernel for it, that is one launch.

A token keeps the first of its choices in the order of their costs, as many as are worth it, and the dial is the price
of running an expert, less what it was in training: 0 is as trained, 1 doubles the price, -1 makes experts free and
keeps all. A cost that was learned is good at every price, so no dial needs training of its own.

OTP (MC#, arXiv 2510.10962) has a light router per layer that learns a distribution over masks from the token and its
gate scores. That its outputs are costs of single experts, which add up, their form, and the sizes are ours: one
layer's H r + E (r + 1) + 1 parameters are a few thousand. 4 features lose 2 % more than 8, and networks with hidden
units or with all weights of a token as features lose as much (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moepress.errors import PruningError
from moepress.kernels.problem import SELECTOR, Problem
from moepress.kernels.registry import CUDA, select
from moepress.kernels.router.cuda import Selection
from moepress.kernels.selector.cuda import select_experts
from moepress.kernels.selector.reference import Costs, log_costs, worth_running
from moepress.pruning.rule import Pruned, Rule

if TYPE_CHECKING:
    from moepress.pruning.sites import Site

PROJECTIONS = 8
"""r, at most 32."""
_POWER = 2.0
"""p before training: a cost is quadratic in what is left out."""
_TOGETHER = 64.0
"""As many choices of the layer's mean expert are added to those that an expert was seen in."""


class Selector(Rule):
    """See the module. All parameters are float32."""

    kind = "selector"

    def __init__(self, hidden_size: int, num_experts: int, projections: int = PROJECTIONS) -> None:
        """Keeps all experts until it is trained. PruningError for more than 32 projections, a lane of a warp each."""
        super().__init__()
        if not 1 <= projections <= 32:
            raise PruningError(f"a selector has 1 to 32 projections, not {projections}")
        self.hidden_size, self.num_experts, self.projections = hidden_size, num_experts, projections
        # transformers changes the default dtype while it loads a model
        zeros = partial(torch.zeros, dtype=torch.float32)
        self.projection = nn.Parameter(zeros(projections, hidden_size))
        self.sensitivity = nn.Parameter(zeros(num_experts, projections))
        # a cost that any price stays below
        self.offset = nn.Parameter(zeros(num_experts) + math.log(torch.finfo(torch.float32).max) / 2)
        self.power = nn.Parameter(zeros(()) + _POWER)
        self._settled: dict[tuple[torch.dtype, int], bool] = {}
        self._settled_on: torch.device | None = None

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("hidden_size", "num_experts", "projections")}

    def check(self, site: Site) -> None:
        if (site.hidden_size, site.num_experts) != (self.hidden_size, self.num_experts):
            raise PruningError(
                f"{site.name} has hidden size {site.hidden_size} and {site.num_experts} experts, its selector is made "
                f"for {self.hidden_size} and {self.num_experts}"
            )

    @property
    def costs(self) -> Costs:
        return Costs(self.projection, self.sensitivity, self.offset, self.power)

    def log_costs(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`forward`'s arguments -> z, float32 [T, k]."""
        return log_costs(hidden, ids, weights, self.costs)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return worth_running(self.log_costs(hidden, ids, weights), 1 + self.dial)

    def fused(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, renormalises: bool
    ) -> Pruned | None:
        if not self.settle(hidden.device, hidden.dtype, ids.shape[-1]):
            return None
        return select_experts(hidden, ids, weights, self.costs, self.dial, renormalises)

    def selection(self, device: torch.device, dtype: torch.dtype, top_k: int, renormalises: bool) -> Selection | None:
        return Selection(self.costs, self.dial, renormalises) if self.settle(device, dtype, top_k) else None

    def settle(self, device: torch.device, dtype: torch.dtype, top_k: int) -> bool:
        """Whether the CUDA kernel runs for inputs of this dtype on this device. KernelError as `registry.select`."""
        if device == self._settled_on and (found := self._settled.get((dtype, top_k))) is not None:
            return found
        if torch.compiler.is_compiling() and device.type != "cuda":
            return False
        return self._settle(device, dtype, top_k)

    @torch.compiler.disable(
        reason="a selector meets its first input; run the model once, or moepress.warmup(model), before"
    )
    def _settle(self, device: torch.device, dtype: torch.dtype, top_k: int) -> bool:
        if device != self._settled_on:
            self._settled, self._settled_on = {}, device
        problem = Problem(SELECTOR, device, dtype, (), top_k=top_k, columns=self.hidden_size)
        self._settled[dtype, top_k] = select(problem) == CUDA
        return self._settled[dtype, top_k]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random directions, from which training begins; what comes out does not depend on the token yet."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.projection.shape, generator=generator) / math.sqrt(self.hidden_size)
        self.projection.copy_(drawn)
        self.sensitivity.zero_()
        self.offset.zero_()

    @torch.no_grad()
    def begin_at(self, ids: torch.Tensor, weights: torch.Tensor, costs: torch.Tensor) -> None:
        """Sets the offsets by first costs [T, k] of a text, so that training need not find each expert's size.

        Each expert's own mean, as far as it was seen, and the layer's for the rest.
        """
        sums = torch.zeros(2, self.num_experts, device=costs.device)
        for own, values in zip(sums, (costs, weights.pow(_POWER)), strict=True):
            own.index_add_(0, ids.flatten().long(), values.flatten().float())
        seen = torch.zeros_like(sums[0]).index_add_(0, ids.flatten().long(), torch.ones_like(costs).flatten())
        cost, size = (sums + _TOGETHER * sums.sum(1, keepdim=True) / ids.numel()) / (seen + _TOGETHER)
        tiny = torch.finfo(torch.float32).tiny
        self.offset.copy_((cost.clamp(min=tiny) / size.clamp(min=tiny)).clamp(min=tiny).log())

    @torch.no_grad()
    def reprice(self, price: float) -> None:
        """Makes `price`, in the costs' present unit, the new unit: with dial 0 an expert costs that much."""
        self.offset -= math.log(price)


def settle_selectors(rules: Iterable[Rule], dtype: torch.dtype, top_k: int | None) -> list[Selector]:
    """Settles which kernel runs for inputs of `dtype`; those of `rules` that run on CUDA's. KernelError as `settle`."""
    mine = [rule for rule in rules if isinstance(rule, Selector)]
    return [each for each in mine if top_k and each.settle(each.dial.device, dtype, top_k)]


def compile_selectors(rules: Iterable[Rule], dtype: torch.dtype, top_k: int | None) -> None:
    """Compiles what they need. KernelError where it does not compile."""
    kinds = {(each.projections, each.dial.device) for each in settle_selectors(rules, dtype, top_k)}
    if kinds:
        from moepress.kernels.cuda.select import warm

        warm(dtype, kinds)
