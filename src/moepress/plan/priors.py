# SPDX-License-Identifier: Apache-2.0
"""What a weight's relative error is worth where nothing was measured but the weights (ours). Pure, no torch.

    predicted loss = prior(role, place) * |W - W'|^2 / |W|^2

Relative, because a norm precedes each block: what counts is the noise in a block's output beside the output itself.
To that a matrix contributes by its relative error, whatever its size (plain |W - W'|^2 puts bits on large matrices and
loses: docs/LOG.md). The priors say what is known beyond that:

- values meet no softmax that could forgive them, and their errors add up over the positions that are attended to;
- keys shift whole rows of scores, and a down-projection's inputs have heavy tails;
- the first layer writes into an almost empty residual stream and the last has no layer after it to mend its errors;
- of E routed experts k run, each on k/E of the tokens: one expert's share of what they put out together is 1/E. Beside
  shared experts it is that share of the routed part's, whose size next to the shared part's is told from the weights
  (moepress.measure.energy).

Numbers are powers of two. They were set on two small trained models with calibration text, not on test text, by the
loss that gradients predict for the plans they lead to (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from moepress.graph.view import ROUTED, ModelGraph, WeightRef

PROJECTION = {"v": 4.0, "kv_a": 4.0, "kv_b": 4.0, "k": 2.0, "down": 2.0}
"""By projection; 1 for all others."""
FIRST, LAST = 4.0, 2.0
"""For the MLPs of the first and the last layer."""
EXPERT = 0.5
"""For routed experts, beside what their share says."""


def priors(graph: ModelGraph, routed: Mapping[int, float], depth: int | None = None) -> dict[str, float]:
    """Weight name -> the factor of its relative squared error.

    `routed` is, for each MoE layer, the energy of its routed part over that of its shared part, 1 without shared ones.
    `depth` is the number of layers, without next-token layers that may follow them.
    """
    experts: dict[int, int] = {}
    for ref in graph.weights:
        if ref.group == ROUTED:
            experts[ref.layer] = max(experts.get(ref.layer, 0), 1 + (ref.expert or 0))
    layers = [ref.layer for ref in graph.weights if depth is None or ref.layer < depth]
    ends = {min(layers, default=0): FIRST} | {max(layers, default=0): LAST}

    def factor(ref: WeightRef) -> float:
        value = PROJECTION.get(ref.projection, 1.0)
        if ref.group != "attn":
            value *= ends.get(ref.layer, 1.0)
        if ref.group == ROUTED:
            value *= EXPERT * routed[ref.layer] / experts[ref.layer]
        return value

    return {ref.name: factor(ref) for ref in graph.weights}
