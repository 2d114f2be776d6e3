# SPDX-License-Identifier: Apache-2.0
"""Puts rules between the routers and the experts of a model, takes them out again, and counts what they keep.

A `Pruner` becomes a child of each experts module and changes its arguments by a forward pre-hook, so models, compiled
ones too, run as they are. Its rule moves with the experts but is no submodule: `state_dict()` and `parameters()` are
those of the unpruned model (`stored.py` keeps rules). Where a router runs on a kernel that can decide as the rule does,
it does (`runtime/router.py`), and the hook only counts.

Hooks are set when rules are attached; torch.compile does not look at those that are set later. What may change after
that (on or off, counting, the dial) are attributes and buffers, which it does look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moepress.errors import PruningError
from moepress.kernels.router.cuda import Selection
from moepress.pruning.rule import Prune, Pruned, Rule, prune
from moepress.pruning.sites import Site, moe_sites

CHILD = "pruner"
"""The name of a Pruner in its experts module."""
_COUNTERS = ("tokens_by_kept", "tokens_at", "kept_at")


class Pruner(nn.Module):
    """The rule of one site at work."""

    def __init__(self, site: Site, rule: Rule | Prune) -> None:
        super().__init__()
        self.enabled = True
        self.top_k, self._renormalises, self._skips = site.top_k, site.renormalises, site.skips
        self._rule = (rule,)  # in a tuple, or it would become a submodule
        self._positions: torch.Tensor | None = None
        self.decided = False
        """Whether the router has done what the rule says with what comes next."""
        self.handles: list[RemovableHandle] = []

    @property
    def rule(self) -> Rule | Prune:
        return self._rule[0]

    @property
    def counting(self) -> bool:
        return "kept_at" in self._buffers

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pruned:
        """What the experts get in the place of the router's ids and weights [T, k]; hidden is [T, H]."""
        rule = self.rule
        if isinstance(rule, Rule):
            ids, weights = prune(rule, hidden, ids, weights, self._rescales(rule), self._skips)
        else:
            ids, weights = rule(hidden, ids, weights)
        if self.counting:
            self._count((weights != 0) & (ids >= 0))
        return ids, weights

    def selection(self, device: torch.device, dtype: torch.dtype) -> Selection | None:
        """What the router needs to decide in its own launch; None where it cannot, or nothing is to be pruned."""
        rule = self.rule
        if not (self.enabled and self._skips and isinstance(rule, Rule)):
            return None
        return rule.selection(device, dtype, self.top_k, self._rescales(rule))

    def _rescales(self, rule: Rule) -> bool:
        return self._renormalises if rule.renormalises is None else rule.renormalises

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook of the decoder layer: which positions its tokens have, [1 or batch, length]."""
        if self.counting:
            self._positions = kwargs.get("position_ids")

    def before_experts(self, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """A forward pre-hook of the experts."""
        if not self.enabled:
            return None
        hidden, ids, weights = args
        decided, self.decided = self.decided, False
        if decided:
            if self.counting:
                self._count((weights != 0) & (ids >= 0))
            return None
        return hidden, *self(hidden.reshape(-1, hidden.shape[-1]), ids, weights)

    def start_counting(self, positions: int, device: torch.device) -> None:
        """Counts from 0; what is at `positions` or later is counted together, apart from the others."""
        for name, size in zip(_COUNTERS, (self.top_k + 1, positions + 1, positions + 1), strict=True):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64, device=device), persistent=False)

    def stop_counting(self) -> None:
        for name in _COUNTERS:
            delattr(self, name)

    @torch.no_grad()
    def _count(self, ran: torch.Tensor) -> None:
        """ran bool [T, k]. Padding counts as well."""
        kept = ran.sum(-1)
        self.tokens_by_kept.index_add_(0, kept, torch.ones_like(kept))
        positions, self._positions = self._positions, None
        if positions is None:
            return
        every = positions.expand(len(kept) // positions.shape[-1], -1).reshape(-1).clamp(max=len(self.kept_at) - 1)
        self.tokens_at.index_add_(0, every, torch.ones_like(kept))
        self.kept_at.index_add_(0, every, kept)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # a rule moves with the model but keeps its dtype: it decides the same whatever the model is rounded to
        if isinstance(self.rule, nn.Module):
            self.rule._apply(lambda tensor: fn(tensor).to(tensor.dtype))
        return super()._apply(fn, recurse)


@dataclass(frozen=True)
class Counts:
    """What ran while `counting`, on the CPU. L sites, k choices, P positions."""

    names: tuple[str, ...]
    """Of the sites, as the files spell their experts modules."""
    tokens_by_kept: torch.Tensor
    """int64 [L, k + 1]: tokens that ran 0, 1, ... k experts."""
    tokens_at: torch.Tensor
    """int64 [L, P]: tokens at each position."""
    kept_at: torch.Tensor
    """int64 [L, P]: experts that tokens at each position ran, together."""

    @property
    def top_k(self) -> int:
        return self.tokens_by_kept.shape[1] - 1

    @property
    def per_layer(self) -> torch.Tensor:
        """float64 [L]: experts run per token; NaN where there was none."""
        kept = self.tokens_by_kept.double() @ torch.arange(self.top_k + 1, dtype=torch.float64)
        return kept / self.tokens_by_kept.sum(1)

    @property
    def per_position(self) -> torch.Tensor:
        """float64 [P]: experts run per token and layer; NaN where there was no token."""
        return self.kept_at.sum(0).double() / self.tokens_at.sum(0)

    @property
    def per_token(self) -> float:
        """Experts run per token, the mean over layers."""
        return float(self.per_layer.mean())

    @property
    def dropped(self) -> float:
        """Share of the routed activations that were dropped."""
        return 1 - self.per_token / self.top_k


def attach(model: nn.Module, rules: Sequence[Rule | Prune]) -> None:
    """Prunes `model` from here on, by one rule (or function with the signature `Prune`) for each of `moe_sites(model)`.

    Moves rules to where their experts are. `save_pretrained` does not keep them; see `stored.py`. Raises PruningError
    where rules are attached already, where their number is not that of the sites, or where one does not fit its site.
    """
    sites = moe_sites(model)
    if any(_pruner(site) for site in sites):
        raise PruningError("this model is pruned already; detach(model) before attaching other rules")
    if len(rules) != len(sites):
        raise PruningError(f"{len(rules)} rules for a model with {len(sites)} layers of routed experts; give one each")
    for site, rule in zip(sites, rules, strict=True):
        if isinstance(rule, Rule):
            rule.check(site)
    for site, rule in zip(sites, rules, strict=True):
        _install(site, rule)


def detach(model: nn.Module) -> list[Rule | Prune]:
    """Undoes `attach`; returns the rules, in layer order. Does nothing to a model without rules."""
    rules = []
    for site in moe_sites(model):
        if pruner := _pruner(site):
            for handle in pruner.handles:
                handle.remove()
            delattr(site.experts, CHILD)
            if (router := site.router) is not None:
                router.select_by(None)
            rules.append(pruner.rule)
    return rules


def pruners_of(model: nn.Module) -> dict[str, Pruner]:
    """Site name -> Pruner, in layer order; empty for a model without rules."""
    return {site.name: pruner for site in moe_sites(model) if (pruner := _pruner(site))}


def is_pruned(model: nn.Module) -> bool:
    """Whether rules are attached; of any model, one without experts included."""
    return any(isinstance(module, Pruner) for module in model.modules())


def rules_of(model: nn.Module) -> list[Rule]:
    """The rules that are attached to any model, in layer order; without functions that stand for rules."""
    rules = (module.rule for module in model.modules() if isinstance(module, Pruner))
    return [rule for rule in rules if isinstance(rule, Rule)]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model runs all experts, as if no rules were attached."""
    pruners = pruners_of(model).values()
    before = [pruner.enabled for pruner in pruners]
    for pruner in pruners:
        pruner.enabled = False
    try:
        yield
    finally:
        for pruner, enabled in zip(pruners, before, strict=True):
            pruner.enabled = enabled


def set_pruning_dial(model: nn.Module, value: float) -> None:
    """Speed for quality, without training: 0 is as the rules were made, more keeps fewer experts, less keeps more.

    Takes effect in captured CUDA graphs and compiled models too. Raises PruningError for a model without rules.
    """
    rules = [pruner.rule for pruner in _required(model).values()]
    for rule in rules:
        if isinstance(rule, Rule):
            rule.dial.fill_(value)


@contextmanager
def counting(model: nn.Module, positions: int) -> Iterator[Callable[[], Counts]]:
    """Inside the block the model counts, on its device, what it runs; what this gives reads the counts so far.

    Positions are those of tokens in their sequences, the first `positions` of them. Raises PruningError for a model
    without rules.
    """
    pruners = _required(model)
    sites = {site.name: site for site in moe_sites(model)}
    for name, pruner in pruners.items():
        pruner.start_counting(positions, _device(sites[name].experts))

    def read() -> Counts:
        own = [[getattr(pruner, name).cpu() for pruner in pruners.values()] for name in _COUNTERS]
        by_kept, tokens_at, kept_at = (torch.stack(each) for each in own)
        return Counts(tuple(pruners), by_kept, tokens_at[:, :positions], kept_at[:, :positions])

    try:
        yield read
    finally:
        for pruner in pruners.values():
            pruner.stop_counting()


def _install(site: Site, rule: Rule | Prune) -> None:
    pruner = Pruner(site, rule)
    pruner.to(_device(site.experts))
    site.experts.add_module(CHILD, pruner)
    pruner.handles = [
        site.layer.register_forward_pre_hook(pruner.before_layer, with_kwargs=True),
        site.experts.register_forward_pre_hook(pruner.before_experts),
    ]
    if isinstance(rule, Rule):
        pruner.handles += rule.observe(site.layer)
    if (router := site.router) is not None:
        router.select_by(pruner)


def _required(model: nn.Module) -> dict[str, Pruner]:
    pruners = pruners_of(model)
    if not pruners:
        raise PruningError(f"this {type(model).__name__} has no rules; load a folder that has some, or attach them")
    return pruners


def _pruner(site: Site) -> Pruner | None:
    return getattr(site.experts, CHILD, None)


def _device(experts: nn.Module) -> torch.device:
    """Where the experts compute: on their tensors' device, or where accelerate moves what it offloads for each call.

    Raises PruningError for a model without data.
    """
    device = next(chain(experts.parameters(), experts.buffers())).device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in experts.modules())
    for hook in chain.from_iterable((hook, *getattr(hook, "hooks", ())) for hook in hooks):
        if (found := getattr(hook, "execution_device", None)) is not None:
            return torch.device(found)
    raise PruningError("the experts are on the meta device; load the model before attaching rules")
