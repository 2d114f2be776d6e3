# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside one gated shared expert; some layers may be dense."""

from moepress.graph.families.common import KEPT, LAYER, attention, feed_forward
from moepress.graph.view import Family, SoftmaxRouter

FAMILY = Family(
    model_type="qwen2_moe",
    weights={
        **attention("q", "k", "v", "o"),
        **feed_forward("mlp", "mlp"),
        **feed_forward("mlp.shared_expert", "shared"),
        **feed_forward("mlp.experts.{expert}", "expert"),
    },
    kept={**KEPT, f"{LAYER}.mlp.gate.weight": "router", f"{LAYER}.mlp.shared_expert_gate.weight": "router"},
    bank=f"{LAYER}.mlp.experts",
    router=SoftmaxRouter(),
)
