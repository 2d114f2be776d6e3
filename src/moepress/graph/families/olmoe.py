# SPDX-License-Identifier: Apache-2.0
"""OLMoE: 64 routed experts in every layer, no shared expert, no dense layer."""

from moepress.graph.families.common import KEPT, LAYER, attention, feed_forward
from moepress.graph.view import Family, SoftmaxRouter

FAMILY = Family(
    model_type="olmoe",
    weights={**attention("q", "k", "v", "o"), **feed_forward("mlp.experts.{expert}", "expert")},
    kept={**KEPT, f"{LAYER}.mlp.gate.weight": "router"},
    bank=f"{LAYER}.mlp.experts",
    router=SoftmaxRouter(),
)
