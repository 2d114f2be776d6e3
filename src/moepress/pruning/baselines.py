# SPDX-License-Identifier: Apache-2.0
"""Rules that learn nothing: ODP of MC-MoE, its threshold alone, and chance.

ODP (arXiv 2410.06270, section 3.3) is defined for k = 2 experts a token, weights w0 >= w1: the second is dropped where
w1 / w0 < mu, with mu the layer's median of w1 / w0 on calibration text; but the 2 % of a sequence's tokens with the
largest

    I_j = |t_j|_1 * sum over queries i >= j of A[i, j] / (L - j)                                          (equation 6)

keep both. A is the layer's attention averaged over heads, t_j the vector that the block gets (j from 0: L - j queries
see token j). The sum is over a column, as the equation says; the released code sums rows, which are all 1. Like that
code, a step that decodes one token has no column to sum and follows the ratio alone.

What is ours: for k > 2 the choice j is dropped where w_j / w0 < mu, which drops a tail because weights descend, and is
ODP for k = 2; mu is set from a target share of dropped activations (k = 2: 0.25 is the median); all layers are pruned,
while the released code picks those with the smallest measured loss.

Legend: B sequences, L tokens of a sequence, T = B L, H hidden size, k choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moepress.errors import PruningError
from moepress.progress import Progress, silent
from moepress.pruning.attach import attach, detach
from moepress.pruning.rule import WeightRule
from moepress.pruning.sites import Site

PROTECTED = 0.02
"""Share of a sequence's tokens that ODP protects."""
_SPREAD = 1000.0
"""What `Chance` multiplies projections of size 1 with before it takes their fractions, which are uniform then."""


class Threshold(WeightRule):
    """Drops the choices whose weight is less than `mu` times the token's largest; `dial` adds to mu."""

    kind = "threshold"
    mu: torch.Tensor

    def __init__(self, mu: float = -math.inf) -> None:
        """Keeps all until `mu` is given here or by `calibrate`."""
        super().__init__()
        self.register_buffer("mu", torch.tensor(mu, dtype=torch.float32))

    def ratios(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float32 [T, k - 1] descending, from `kept`'s arguments: what is compared with mu."""
        return weights[:, 1:] / weights[:, :1].clamp(min=torch.finfo(weights.dtype).tiny)

    def count(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 1 + (self.ratios(hidden, weights) >= self.mu + self.dial).sum(-1)


class Odp(Threshold):
    """The threshold, with the most important tokens protected. Needs attention maps, so `eager` attention.

    For evaluation and comparison: whole sequences without padding; a sequence read in pieces is refused.
    """

    kind = "odp"

    def __init__(self, mu: float = -math.inf, protected: float = PROTECTED) -> None:
        super().__init__(mu)
        self.protected = protected
        self._received: torch.Tensor | None = None

    def settings(self) -> dict[str, Any]:
        return {"protected": self.protected}

    def ratios(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `Threshold.ratios`, and infinite for protected tokens."""
        found = super().ratios(hidden, weights)
        if self._received is None:
            return found
        importance = hidden.float().abs().sum(-1).view_as(self._received) * self._received
        first = importance.topk(math.ceil(self.protected * importance.shape[1]), dim=-1).indices
        safe = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, first, True)
        return found.masked_fill(safe.view(-1, 1), math.inf)

    def observe(self, layer: nn.Module) -> list[RemovableHandle]:
        return [layer.self_attn.register_forward_hook(self._see_attention)]

    def _see_attention(self, attention: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        maps = output[1]
        if maps is None:
            raise PruningError(
                "ODP needs attention maps, which this attention implementation does not give; load the model with "
                "attn_implementation='eager', or use the threshold alone"
            )
        self._received = None if maps.shape[-2] == 1 else attention_received(maps)


class Chance(WeightRule):
    """Drops choices at random at a fixed rate, at least one is kept; `dial` adds to the probability.

    With `strongest` a random number of the largest weights is kept; without, which ones are kept is random too. Chance
    is a fixed function of the seed and of the token's hidden state, so that it needs no generator and runs in graphs.
    """

    kind = "chance"
    directions: torch.Tensor

    def __init__(self, hidden_size: int, top_k: int, share: float, strongest: bool = False, seed: int = 0) -> None:
        """`share`: of all activations that are dropped. PruningError for one that leaves a token no expert."""
        super().__init__()
        limit = (top_k - 1) / top_k
        if not 0 <= share <= limit:
            raise PruningError(f"a share of {share:g} cannot be dropped: {top_k} experts a token allow 0 to {limit:g}")
        self.hidden_size, self.top_k, self.share, self.strongest, self.seed = hidden_size, top_k, share, strongest, seed
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(hidden_size, top_k, generator=generator, dtype=torch.float32)
        self.register_buffer("directions", directions, persistent=False)

    def settings(self) -> dict[str, Any]:
        names = ("hidden_size", "top_k", "share", "strongest", "seed")
        return {name: getattr(self, name) for name in names}

    def check(self, site: Site) -> None:
        if (site.hidden_size, site.top_k) != (self.hidden_size, self.top_k):
            raise PruningError(
                f"{site.name} has hidden size {site.hidden_size} and top-{site.top_k}, its rule is made for "
                f"{self.hidden_size} and top-{self.top_k}"
            )

    def kept(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chance = self._uniform(hidden)
        # one choice is safe: of the others so many are dropped that `share` of all are
        stays = chance[:, 1:] >= self.share * self.top_k / max(self.top_k - 1, 1) + self.dial
        places = torch.arange(self.top_k, device=weights.device).expand(len(weights), -1)
        if self.strongest:
            return places <= stays.sum(-1, keepdim=True)
        safe = (chance[:, :1] * self.top_k).long()
        stays = torch.cat([stays.new_ones(len(stays), 1), stays], dim=1)
        return stays.gather(1, (places - safe) % self.top_k)

    def _uniform(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [T, k] in [0, 1)."""
        x = nn.functional.normalize(hidden.float(), dim=-1) @ self.directions * _SPREAD
        return (x - x.floor()).clamp(max=1 - 2**-24)


def attention_received(maps: torch.Tensor) -> torch.Tensor:
    """maps [B, heads, L, L], causal -> float32 [B, L]: what token j gets from each token that sees it, on average.

    Raises PruningError for maps that are not those of whole sequences.
    """
    queries, keys = maps.shape[-2:]
    if queries != keys:
        raise PruningError(
            f"ODP needs the attention map of a whole sequence; {queries} queries see {keys} keys here (read it in one "
            "piece, without a static cache)"
        )
    sees = torch.arange(queries, 0, -1, device=maps.device)
    return maps.float().mean(1).sum(-2) / sees


def chance_rules(sites: Sequence[Site], share: float, *, strongest: bool = False, seed: int = 0) -> list[Chance]:
    """One for each site, with seeds of their own."""
    return [
        Chance(site.hidden_size, site.top_k, share, strongest, seed * len(sites) + number)
        for number, site in enumerate(sites)
    ]


def calibrate(
    model: nn.Module,
    rules: Sequence[Threshold],
    windows: Iterable[torch.Tensor],
    target: float,
    *,
    per_layer: bool = True,
    passes: int = 2,
    progress: Progress = silent,
) -> None:
    """Sets each rule's mu so that `target` of the routed activations of `windows` (ids [1, L] each) is dropped.

    Of each layer alone as ODP does, or with one mu for all layers. The first pass sees the model unpruned, each further
    one pruned by the last pass's mu, because dropping in one layer changes the routing of the next. The model is left
    without rules. Raises PruningError for a target that one expert a token (and protection) does not allow.
    """
    windows = list(windows)
    attach(model, rules)
    try:
        for rule in rules:
            rule.mu.fill_(-math.inf)
        for _ in range(passes):
            with _recording(rules) as seen, torch.inference_mode(), progress("calibrating", len(windows)) as advance:
                for ids in windows:
                    model(ids.to(model.device), use_cache=False)
                    advance(1)
            _set_thresholds(rules, seen, target, per_layer)
    finally:
        detach(model)


def _set_thresholds(
    rules: Sequence[Threshold], seen: Sequence[Sequence[torch.Tensor]], target: float, per_layer: bool
) -> None:
    ratios = [torch.cat(list(each)) for each in seen]
    groups = [[number] for number in range(len(rules))] if per_layer else [list(range(len(rules)))]
    for group in groups:
        together = torch.cat([ratios[number] for number in group])
        tokens, others = together.shape
        mu = threshold_for(together.flatten(), tokens * (others + 1), target)
        for number in group:
            rules[number].mu.fill_(mu)


def threshold_for(values: torch.Tensor, offered: int, target: float) -> float:
    """values [n], infinite for what must be kept -> the least one that is kept where `target` of the `offered`
    activations, of which these are those that may be dropped, are below it; infinite where all are.

    Raises PruningError where fewer than that may be dropped.
    """
    count = round(target * offered)
    ascending = values.sort().values
    free = int(ascending.isfinite().sum())
    if not 0 <= count <= free:
        raise PruningError(
            f"a share of {target:g} cannot be dropped here; this rule can drop 0 to {free / offered:.4f}"
        )
    return float(ascending[count]) if count < len(ascending) else math.inf


@contextmanager
def _recording(rules: Sequence[Threshold]) -> Iterator[list[list[torch.Tensor]]]:
    """Inside the block each rule's ratios are collected, on the CPU."""
    seen: list[list[torch.Tensor]] = [[] for _ in rules]

    def record(rule: Threshold, args: tuple[torch.Tensor, ...], own: list[torch.Tensor]) -> None:
        hidden, _, weights = args
        own.append(rule.ratios(hidden, weights.sort(dim=-1, descending=True).values).cpu())

    handles = [
        rule.register_forward_pre_hook(lambda rule, args, own=own: record(rule, args, own))
        for rule, own in zip(rules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
