# SPDX-License-Identifier: Apache-2.0
"""What a weight's relative error is worth where nothing was measured but the weights (ours). Pure, no torch.

    predicted loss = prior(role, place) * |W - W'|^2 / |W|^2

Relative, because a norm precedes each block: what counts is the noise in a block's output beside the output itself.
To that a matrix contributes by its relative error, whatever its size (plain |W - W'|^2 puts bits on large matrices and
loses: docs/LOG.md). The priors say what is known beyond that:

- values meet no softmax that could forgive them, and their errors add up over the positions that are attended to;
- keys shift whole rows of scores; a down-projection's inputs have heavy tails; an up-projection multiplies them;
- the first layer writes into an almost empty residual stream and the last has no layer after it to mend its errors;
- of E routed experts k run, each with about 1/k of the weight, on k/E of the tokens: the errors of independent experts
  average out, and one expert's share of its block is 1/E; beside a shared expert the routed part is 1/(k + 1) of it.

Numbers are powers of two (and 1.5), set on one small model with calibration text, not on test text: the planner's
choice moves little when any of them is doubled.
"""

from __future__ import annotations

from collections.abc import Mapping

from moepress.errors import PlanError
from moepress.graph.view import ROUTED, ModelGraph, WeightRef

PROJECTION = {"v": 4.0, "kv_a": 4.0, "kv_b": 4.0, "k": 2.0, "up": 1.5, "down": 2.0}
"""By projection; 1 for all others."""
ENDS = 4.0
"""For the MLPs of the first and the last layer."""
_TOP_K = ("num_experts_per_tok", "top_k", "num_experts_per_token")


def priors(graph: ModelGraph, config: Mapping[str, object]) -> dict[str, float]:
    """Weight name -> the factor of its relative squared error. Raises PlanError where config.json lacks top_k."""
    routed = [ref for ref in graph.weights if ref.group == ROUTED]
    experts = {ref.layer: 0 for ref in routed}
    for ref in routed:
        experts[ref.layer] = max(experts[ref.layer], 1 + (ref.expert or 0))
    shared = {ref.layer for ref in graph.weights if ref.group == "shared"}
    depth = config.get("num_hidden_layers")
    # next-token layers come after the last one
    layers = [ref.layer for ref in graph.weights if not isinstance(depth, int) or ref.layer < depth]
    ends = {min(layers, default=0), max(layers, default=0)}
    top_k = _top_k(config) if routed else 1

    def factor(ref: WeightRef) -> float:
        value = PROJECTION.get(ref.projection, 1.0)
        if ref.group != "attn" and ref.layer in ends:
            value *= ENDS
        if ref.group == ROUTED:
            value /= experts[ref.layer] * (top_k + 1 if ref.layer in shared else 1)
        return value

    return {ref.name: factor(ref) for ref in graph.weights}


def _top_k(config: Mapping[str, object]) -> int:
    found = next((config[key] for key in _TOP_K if key in config), None)
    if type(found) is not int or found < 1:
        raise PlanError(f"config.json says {found!r} experts run per token; it needs num_experts_per_tok of at least 1")
    return found
