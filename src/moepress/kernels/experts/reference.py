# SPDX-License-Identifier: Apache-2.0
"""A layer's routed experts, y[t] = sum_i weight[t, i] * expert_{id[t, i]}(x[t]), in plain torch.

Tokens are sorted by expert once; each expert that got any runs once on all of its tokens. Legend: T tokens, k choices.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

Expert = Callable[[int, torch.Tensor], torch.Tensor]
"""(expert id, x [n, H]) -> [n, H]."""


def run_experts(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, num_experts: int, expert: Expert
) -> torch.Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H] in x's dtype. Ids outside 0..num_experts-1 mean "run nothing".

    Deterministic: an expert sees a token at most once, and experts add up in their order.
    """
    y = torch.zeros_like(x)
    ids = expert_ids.flatten()
    order = torch.argsort(ids, stable=True)
    # one transfer to the host for all experts; ids out of range sort to the ends and are cut off
    edges = torch.searchsorted(ids[order], torch.arange(num_experts + 1, device=ids.device)).tolist()
    for e, (first, last) in enumerate(pairwise(edges)):
        if first == last:
            continue
        chosen = order[first:last]
        tokens = chosen // expert_ids.shape[1]
        out = expert(e, x[tokens]) * expert_weights.flatten()[chosen].unsqueeze(1).to(x.dtype)
        y.index_add_(0, tokens, out)
    return y
