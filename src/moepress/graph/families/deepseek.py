# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-MoE-16B, the model of the MiLo paper. transformers has no class for it (the hub folder brings its own code),
so it is compressed by names alone: plain attention, two shared experts as one wide one, a dense first layer."""

from moepress.graph.families.common import KEPT, LAYER, attention, feed_forward
from moepress.graph.view import Family

FAMILY = Family(
    model_type="deepseek",
    weights={
        **attention("q", "k", "v", "o"),
        **feed_forward("mlp", "mlp"),
        **feed_forward("mlp.shared_experts", "shared"),
        **feed_forward("mlp.experts.{expert}", "expert"),
    },
    kept={**KEPT, f"{LAYER}.mlp.gate.weight": "router"},
    bank=f"{LAYER}.mlp.experts",
)
