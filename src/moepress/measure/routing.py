# SPDX-License-Identifier: Apache-2.0
"""Which experts each calibration token was sent to, with what weight, and the sums that allocation policies ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """Use of the experts of one layer, one entry per expert [E]."""

    tokens: torch.Tensor
    """Selected (token, slot) pairs; int64. They sum to calibration tokens x experts per token."""
    weight_before: torch.Tensor
    """Sum of the router's probabilities of the selected pairs, before top-k renormalisation and scaling; float64."""
    weight_after: torch.Tensor
    """Sum of the weights that the model really multiplies the experts' outputs with; float64."""


class RoutingRecord:
    """What the router decided for every token of a layer: (expert, weight) pairs in token order."""

    def __init__(self, num_experts: int, probability: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`probability` maps the router's inputs [n, D] to its probabilities of all experts [n, E]."""
        self.num_experts, self._probability = num_experts, probability
        self._index: list[torch.Tensor] = []
        self._weight: list[torch.Tensor] = []
        self._before = torch.zeros(num_experts, dtype=torch.float64)
        self._joined: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> None:
        """The next tokens: their vectors [.., D], expert ids and weights [.., k], as the experts module gets them."""
        top_k = index.shape[-1]
        flat = index.reshape(-1, top_k)
        before = self._probability(hidden.reshape(len(flat), -1)).gather(1, flat)
        ids = flat.to("cpu", torch.int64)
        self._before.index_add_(0, ids.flatten(), before.to("cpu", torch.float64).flatten())
        self._index.append(ids.to(torch.int32))
        self._weight.append(weight.detach().reshape(-1, top_k).to("cpu", torch.float32))

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens [n] (numbers over all windows, ascending) that reach one expert, and its weight for each [n]."""
        index, weight = self._all()
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        return tokens, weight[tokens, slots]

    def summary(self) -> Routing:
        index, weight = self._all()
        ids = index.flatten().long()
        after = torch.zeros(self.num_experts, dtype=torch.float64).index_add_(0, ids, weight.flatten().double())
        return Routing(torch.bincount(ids, minlength=self.num_experts), self._before, after)

    def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._joined is None:
            self._joined = torch.cat(self._index), torch.cat(self._weight)
            self._index.clear()
            self._weight.clear()
        return self._joined
