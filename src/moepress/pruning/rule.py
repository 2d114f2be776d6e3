# SPDX-License-Identifier: Apache-2.0
"""Rule: which of its top-k experts a token runs; `prune`: what that makes of the router's ids and weights.

Pruning stands between a router and its experts. The rule says which of a token's k choices to keep, one at least, and
the others are dropped:

    weights    0 for what is dropped. Where the family renormalises its top-k weights, those of the kept choices are
               multiplied by (sum of all k) / (sum of the kept), so that a routed scaling factor stays in; elsewhere,
               and where the rule says so, they are left as they are
    ids        -1 for what is dropped where the experts skip ids outside 0..E-1, at no cost; unchanged for
               transformers' own experts, which know no such id: a dropped expert then runs in vain

Dropping by token follows ODP (MC-MoE, arXiv 2410.06270, for k = 2) and OTP (MC#, arXiv 2510.10962), renormalisation
ODP; the rest, and that at least one is kept, is ours. All of it has static shapes and never asks the device for a
value, so it can be captured in a CUDA graph and compiled. A kernel that fuses it is held to this file.

Legend: T tokens, H hidden size, k choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moepress.kernels.router.cuda import Selection

if TYPE_CHECKING:
    from moepress.pruning.sites import Site

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

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] in the model's dtype, ids [T, k] and weights [T, k] float32 as the router gives them, in any
        order -> bool [T, k] in the same places: which choices are kept, at least one of each token."""
        raise NotImplementedError

    def fused(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, renormalises: bool
    ) -> Pruned | None:
        """What `prune` gives for experts that skip, by one kernel; None where there is none for these inputs."""
        return None

    def selection(self, device: torch.device, dtype: torch.dtype, top_k: int, renormalises: bool) -> Selection | None:
        """What a router's launch needs to do as `fused` does, for such inputs; None where it cannot."""
        return None

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON has them; with `kind` and the state dict they make the rule again."""
        return {}

    def check(self, site: Site) -> None:
        """Raises PruningError unless the rule can decide for this site."""

    def observe(self, layer: nn.Module) -> list[RemovableHandle]:
        """Sets the hooks on the decoder layer that the rule needs to see more than `forward` shows it."""
        return []


class WeightRule(Rule):
    """Keeps the first choices in descending order of weight, whichever experts they are; equal ones in their order."""

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        descending, order = weights.sort(dim=-1, descending=True, stable=True)
        kept = self.kept(hidden, descending)
        return torch.empty_like(kept).scatter_(-1, order, kept)

    def kept(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], weights [T, k] float32 descending -> bool [T, k]: which of these are kept."""
        places = torch.arange(weights.shape[-1], device=weights.device)
        return places < self.count(hidden, weights).unsqueeze(-1)

    def count(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The arguments of `kept` -> how many to keep, 1 to k, int64 [T]."""
        raise NotImplementedError


def prune(
    rule: Rule, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, renormalises: bool, skips: bool
) -> Pruned:
    """hidden [T, H], ids and weights [T, k] as the router gives them -> ids and weights [T, k], in the same places.

    `renormalises`: whether kept weights take over the sum; `skips`: whether the experts skip ids outside 0..E-1.
    """
    if skips and (fused := rule.fused(hidden, ids, weights, renormalises)) is not None:
        return fused
    kept = rule(hidden, ids, weights.float())
    pruned = rescale(weights, kept, renormalises)
    return (ids.where(kept, -1) if skips else ids), pruned


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
