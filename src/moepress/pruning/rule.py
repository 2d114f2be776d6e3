# SPDX-License-Identifier: Apache-2.0
"""Rule: how many of its top-k experts a token runs; `prune`: what that makes of the router's ids and weights.

Pruning stands between a router and its experts. The k choices of a token are put in descending order of routing weight,
the rule says how many of the first ones to keep (1 to k), the others are dropped:

    order      dropped choices are the smallest weights, whatever order the router gave them in; equal weights keep the
               router's order
    weights    0 for what is dropped. Where the family renormalises its top-k weights, those of the kept choices are
               multiplied by (sum of all k) / (sum of the kept), so that a routed scaling factor stays in; elsewhere,
               and where the rule says so, they are left as they are
    ids        -1 for what is dropped where the experts skip ids outside 0..E-1, at no cost; unchanged for
               transformers' own experts, which know no such id: a dropped expert then runs in vain

Keeping the first j follows ODP (MC-MoE, arXiv 2410.06270, for k = 2) and OTP (MC#, arXiv 2510.10962), renormalisation
ODP; the rest, and that at least one is kept, is ours. All of it has static shapes and never asks the device for a
value, so it can be captured in a CUDA graph and compiled. A kernel that fuses it is held to this file.

Legend: T tokens, H hidden size, k choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Pruned = tuple[torch.Tensor, torch.Tensor]
"""ids [T, k] int64, weights [T, k]."""

Prune = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pruned]
"""(hidden [T, H], ids [T, k], weights [T, k]) -> (ids, weights), of the same shapes and dtypes."""


class Rule(nn.Module):
    """Decides for the tokens of one layer. A subclass gives `forward`, and `kind` and `settings` if it is to be stored.

    What it learned or measured are parameters and buffers, which keep their dtype whatever is done to the model's.
    """

    kind: ClassVar[str] = ""
    """Its name in checkpoints; none where it cannot be stored."""

    dial: torch.Tensor
    """float32 scalar: speed for quality at run time. 0 is as calibrated, more keeps fewer experts, less keeps more."""
    renormalises: bool | None
    """Whether kept weights take over the sum of all; None: as the model's family does."""

    def __init__(self) -> None:
        super().__init__()
        self.renormalises = None
        self.register_buffer("dial", torch.zeros((), dtype=torch.float32))

    def forward(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] in the model's dtype, weights [T, k] float32 descending -> how many to keep, int64 [T]."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON has them; with `kind` and the state dict they make the rule again."""
        return {}

    def check(self, name: str, hidden_size: int, top_k: int) -> None:
        """Raises PruningError unless the rule can decide for the site `name`, of this hidden size and top-k."""

    def observe(self, layer: nn.Module) -> list[RemovableHandle]:
        """Sets the hooks on the decoder layer that the rule needs to see more than `forward` shows it."""
        return []

    def kept(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """bool [T, k] in the order of `weights`, from `forward`'s arguments: which choices are kept."""
        first = torch.arange(weights.shape[-1], device=weights.device)
        return first < self(hidden, weights).unsqueeze(-1)


def prune(
    rule: Rule, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, renormalises: bool, skips: bool
) -> Pruned:
    """hidden [T, H], ids and weights [T, k] as the router gives them -> ids and weights [T, k], in the same places.

    `renormalises`: whether kept weights take over the sum; `skips`: whether the experts skip ids outside 0..E-1.
    """
    kept = kept_choices(rule, hidden, weights)
    pruned = rescale(weights, kept, renormalises)
    return (ids.where(kept, -1) if skips else ids), pruned


def kept_choices(rule: Rule, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """bool [T, k] in the router's order: the choices that `rule` keeps."""
    descending, order = weights.float().sort(dim=-1, descending=True, stable=True)
    kept = rule.kept(hidden, descending)
    return torch.empty_like(kept).scatter_(-1, order, kept)


def rescale(weights: torch.Tensor, kept: torch.Tensor, renormalises: bool) -> torch.Tensor:
    """weights * kept [T, k] in weights' dtype, with the token's former sum where `renormalises`.

    `kept` is boolean, or a float mask with a gradient for training. Exact where all is kept.
    """
    exact = weights.float()
    masked = exact * kept
    if renormalises:
        total = masked.sum(-1, keepdim=True)
        # a token whose weights are all 0 has no sum to take over
        masked = masked * (exact.sum(-1, keepdim=True) / total.where(total > 0, 1.0))
    return masked.to(weights.dtype)
