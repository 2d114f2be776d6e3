# SPDX-License-Identifier: Apache-2.0
"""Selector: the learned rule. From a token to what each way of dropping experts would cost, to the cheapest way.

For the token's hidden vector x [H] and its routing weights w [k] in descending order, with P [r, H], A [m, r + k],
a [m], B [k - 1, m], b [k - 1] learned:

    f      = [P x / rms(x), log w]                          r + k features
    z      = B silu(A f + a) + b
    cost_j = exp(z_j) for j = 1 .. k - 1,   cost_k = 0      of keeping the first j, where one expert run costs 1
    kept   = argmin over j of cost_j + (1 + dial) j

So the dial is the price of running an expert, less what it was in training: 0 is as trained, 1 doubles the price, -1
makes experts free and keeps all. A cost that was learned is good at every price, so no dial needs training of its own.

OTP (MC#, arXiv 2510.10962) has a light router per layer that learns a distribution over masks from the token and its
gate scores. That its outputs are costs, their form, and the sizes are ours; r = 8 and m = 32 keep a layer at a few
thousand parameters, H r of them, and let one kernel launch compute it all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, silu

from moepress.errors import PruningError
from moepress.pruning.rule import Rule

PROJECTIONS, WIDTH = 8, 32
"""r and m."""
_EPS = 1e-6
"""In the mean square of x, as in the norms of transformers' models."""


class Selector(Rule):
    """See the module. All parameters are float32."""

    kind = "selector"

    def __init__(self, hidden_size: int, top_k: int, projections: int = PROJECTIONS, width: int = WIDTH) -> None:
        """Keeps all experts until it is trained. Raises PruningError for a top-1 router, which leaves no choice."""
        super().__init__()
        if top_k < 2:
            raise PruningError(f"a router that chooses {top_k} expert a token leaves nothing to drop")
        self.hidden_size, self.top_k, self.projections, self.width = hidden_size, top_k, projections, width
        self.projection = nn.Parameter(torch.zeros(projections, hidden_size))
        self.inner = nn.Parameter(torch.zeros(width, projections + top_k))
        self.inner_bias = nn.Parameter(torch.zeros(width))
        self.outer = nn.Parameter(torch.zeros(top_k - 1, width))
        # a cost that any sum of prices stays below
        self.outer_bias = nn.Parameter(torch.full((top_k - 1,), math.log(torch.finfo(torch.float32).max) / 2))

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("hidden_size", "top_k", "projections", "width")}

    def check(self, name: str, hidden_size: int, top_k: int) -> None:
        if (hidden_size, top_k) != (self.hidden_size, self.top_k):
            raise PruningError(
                f"{name} has hidden size {hidden_size} and top-{top_k}, its selector is made for {self.hidden_size} "
                f"and top-{self.top_k}"
            )

    def log_costs(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`forward`'s arguments -> z, float32 [T, k - 1]."""
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)
        features = torch.cat([linear(x, self.projection), weights.clamp(min=_EPS).log()], dim=-1)
        return linear(silu(linear(features, self.inner, self.inner_bias)), self.outer, self.outer_bias)

    def scores(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`forward`'s arguments -> float32 [T, k], the largest for the number of experts to keep; dial 0."""
        return scores_of(self.log_costs(hidden, weights))

    def forward(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return scores_of(self.log_costs(hidden, weights), 1 + self.dial).argmax(-1) + 1

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random directions, from which training begins; what comes out does not depend on the token yet."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.projection, self.inner):
            drawn = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
            parameter.copy_(drawn)
        for parameter in (self.inner_bias, self.outer, self.outer_bias):
            parameter.zero_()

    @torch.no_grad()
    def reprice(self, price: float) -> None:
        """Makes `price`, in the costs' present unit, the new unit: with dial 0 an expert costs that much."""
        self.outer_bias -= math.log(price)


def scores_of(log_costs: torch.Tensor, price: torch.Tensor | float = 1.0) -> torch.Tensor:
    """z [..., k - 1] -> -(cost_j + price j) for each number j of experts kept, [..., k]."""
    costs = nn.functional.pad(log_costs.exp(), (0, 1))
    return -(costs + price * torch.arange(1, costs.shape[-1] + 1, device=costs.device, dtype=costs.dtype))
