# SPDX-License-Identifier: Apache-2.0
"""GLM-4.5 and 4.6: plain attention with biases, shared experts, a router bias, dense first layers."""

from moepress.graph.families.common import LAYER, attention, feed_forward
from moepress.graph.families.deepseek_v3 import FAMILY as _DEEPSEEK_V3
from moepress.graph.view import Family

FAMILY = Family(
    model_type="glm4_moe",
    weights={
        **attention("q", "k", "v", "o"),
        **feed_forward("mlp", "mlp"),
        **feed_forward("mlp.shared_experts", "shared"),
        **feed_forward("mlp.experts.{expert}", "expert"),
    },
    kept=_DEEPSEEK_V3.kept,
    bank=f"{LAYER}.mlp.experts",
)
