# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE (30B-A3B, 235B-A22B): routed experts only; layers of `mlp_only_layers` are dense."""

from moepress.graph.families.common import KEPT, LAYER, attention, feed_forward
from moepress.graph.view import Family, SoftmaxRouter

FAMILY = Family(
    model_type="qwen3_moe",
    weights={
        **attention("q", "k", "v", "o"),
        **feed_forward("mlp", "mlp"),
        **feed_forward("mlp.experts.{expert}", "expert"),
    },
    kept={**KEPT, f"{LAYER}.mlp.gate.weight": "router"},
    bank=f"{LAYER}.mlp.experts",
    router=SoftmaxRouter(),
)
