# SPDX-License-Identifier: Apache-2.0
"""A router in plain torch: what transformers' routers of a linear, a softmax and its top k compute, to the bit.

These are MixtralTopKRouter, Qwen2MoeTopKRouter, Qwen3MoeTopKRouter, OlmoeTopKRouter, and DeepseekV2TopkRouter where
its method is "greedy" (transformers 5.15 to 5.23). Which of equal logits goes first torch leaves open, and the last of
these leaves the order of a token's choices open as well; here they descend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear, softmax


class Routing(NamedTuple):
    """What routers differ in."""

    top_k: int
    renormalises: bool
    """Whether a token's weights add up to 1, before scaling."""
    scaling: float = 1.0
    """What its weights are multiplied by."""
    float32_weights: bool = False
    """Whether weights stay float32; else they are rounded to the logits' dtype."""
    float32_logits: bool = False
    """Whether x and the router's weight are multiplied as float32; else logits are rounded to their dtype."""


Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""logits [T, E], weights [T, k], ids int64 [T, k]."""


def route(x: torch.Tensor, weight: torch.Tensor, routing: Routing) -> Routed:
    """x [T, H] and weight [E, H] of one dtype."""
    logits = linear(x.float(), weight.float()) if routing.float32_logits else linear(x, weight)
    weights, ids = softmax(logits, dim=-1, dtype=torch.float32).topk(routing.top_k, dim=-1)
    if routing.renormalises:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if routing.scaling != 1:
        weights = weights * routing.scaling
    return logits, weights if routing.float32_weights else weights.to(logits.dtype), ids
