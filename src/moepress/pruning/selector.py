# SPDX-License-Identifier: Apache-2.0
"""Selector: the learned rule. From a token to what leaving out each of its experts would cost, to those worth running.

For the token's hidden vector x [H] and a choice of expert e with routing weight w, with P [r, H], S [E, r], o [E] and p
learned:

    f      = P x / rms(x)                       r features
    z      = o_e + S_e f + p log w
    cost   = exp(z)                             of leaving this choice out, where running an expert costs 1
    kept   = cost >= 1 + dial, and the choice of the largest cost in any case

So a token keeps the first of its choices in the order of their costs, as many as are worth it, and the dial is the
price of running an expert, less what it was in training: 0 is as trained, 1 doubles the price, -1 makes experts free
and keeps all. A cost that was learned is good at every price, so no dial needs training of its own.

OTP (MC#, arXiv 2510.10962) has a light router per layer that learns a distribution over masks from the token and its
gate scores. That its outputs are costs of single experts, which add up, their form, and the sizes are ours: one layer's
H r + E (r + 1) + 1 parameters are a few thousand. r = 8; 4 cost 2 % more, and networks with hidden units or with all
weights of a token as features cost as much (docs/LOG.md).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from moepress.errors import PruningError
from moepress.pruning.rule import Rule

if TYPE_CHECKING:
    from moepress.pruning.sites import Site

PROJECTIONS = 8
"""r."""
_EPS = 1e-6
"""In the mean square of x, as in the norms of transformers' models; and the least weight that has a logarithm."""
_POWER = 2.0
"""p before training: a cost is quadratic in what is left out."""


class Selector(Rule):
    """See the module. All parameters are float32."""

    kind = "selector"

    def __init__(self, hidden_size: int, num_experts: int, projections: int = PROJECTIONS) -> None:
        """Keeps all experts until it is trained."""
        super().__init__()
        self.hidden_size, self.num_experts, self.projections = hidden_size, num_experts, projections
        self.projection = nn.Parameter(torch.zeros(projections, hidden_size))
        self.sensitivity = nn.Parameter(torch.zeros(num_experts, projections))
        # a cost that any price stays below
        self.offset = nn.Parameter(torch.full((num_experts,), math.log(torch.finfo(torch.float32).max) / 2))
        self.power = nn.Parameter(torch.tensor(_POWER))

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("hidden_size", "num_experts", "projections")}

    def check(self, site: Site) -> None:
        if (site.hidden_size, site.num_experts) != (self.hidden_size, self.num_experts):
            raise PruningError(
                f"{site.name} has hidden size {site.hidden_size} and {site.num_experts} experts, its selector is made "
                f"for {self.hidden_size} and {self.num_experts}"
            )

    def log_costs(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`forward`'s arguments -> z, float32 [T, k]."""
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)
        of_all = linear(linear(x, self.projection), self.sensitivity, self.offset)
        return of_all.gather(-1, ids.long()) + self.power * weights.clamp(min=_EPS).log()

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return worth_running(self.log_costs(hidden, ids, weights), 1 + self.dial)

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


_TOGETHER = 64.0
"""As many choices of the layer's mean expert are added to those that an expert was seen in."""


def worth_running(log_costs: torch.Tensor, price: torch.Tensor | float = 1.0) -> torch.Tensor:
    """z [..., k] -> bool [..., k]: which are kept where an expert costs `price`."""
    return (log_costs.exp() >= price).scatter(-1, log_costs.argmax(-1, keepdim=True), True)
