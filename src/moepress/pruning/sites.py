# SPDX-License-Identifier: Apache-2.0
"""Where a model can be pruned: its Mixture-of-Experts blocks, compressed or not, in layer order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moepress.errors import PruningError
from moepress.graph.families import family_of
from moepress.runtime.experts import ExpertBank
from moepress.runtime.router import FusedRouter


@dataclass(frozen=True)
class Site:
    """One block: router, routed experts, and perhaps a shared one."""

    name: str
    """Of the experts module, as the files spell it: the key of what is stored for this block."""
    layer: nn.Module
    """The decoder layer that the block is in; transformers hands it `position_ids`."""
    block: nn.Module
    experts: nn.Module
    """Called as experts(hidden [T, H], ids [T, k], weights [T, k])."""
    hidden_size: int
    top_k: int
    num_experts: int
    renormalises: bool
    """Whether the router scales a token's top-k weights to a fixed sum."""

    @property
    def router(self) -> FusedRouter | None:
        """The block's router, where its launch can decide as well which experts run."""
        return next((child for child in self.block.children() if isinstance(child, FusedRouter)), None)

    @property
    def skips(self) -> bool:
        """Whether the experts run nothing for ids outside 0..E-1."""
        return isinstance(self.experts, ExpertBank)


def moe_sites(model: nn.Module) -> list[Site]:
    """Every block with routed experts of a model that transformers built (with its head or without), in layer order.

    Raises CheckpointError for an unknown architecture, PruningError for a model without routed experts.
    """
    config: Any = model.config
    family = family_of(config.model_type)
    renormalises = bool(config.norm_topk_prob) if family.renormalises is None else family.renormalises
    prefix = "" if hasattr(model, "model") else "model."
    sites = []
    for number in range(config.num_hidden_layers):
        name = family.bank.format(layer=number)
        outer, inner, own = family.module_name(name).removeprefix(prefix).rsplit(".", 2)
        layer = model.get_submodule(outer)
        block = layer.get_submodule(inner)
        experts = getattr(block, own, None)
        if experts is not None:  # a dense layer has none
            sites.append(
                Site(name, layer, block, experts, hidden_size=config.hidden_size, top_k=config.num_experts_per_tok,
                     num_experts=experts.num_experts, renormalises=renormalises)
            )  # fmt: skip
    if not sites:
        raise PruningError(f"{type(model).__name__} has no layer with routed experts, so there is nothing to prune")
    return sites
