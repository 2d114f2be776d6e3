# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3 and R1: as V2 with a router bias, in FP8 on the hub. Its extra next-token layer is compressed too."""

from moepress.graph.families.common import KEPT, LAYER, feed_forward
from moepress.graph.families.deepseek_v2 import LATENT_ATTENTION
from moepress.graph.view import Family

FAMILY = Family(
    model_type="deepseek_v3",
    weights={
        **LATENT_ATTENTION,
        **feed_forward("mlp", "mlp"),
        **feed_forward("mlp.shared_experts", "shared"),
        **feed_forward("mlp.experts.{expert}", "expert"),
    },
    kept={
        **KEPT,
        f"{LAYER}.mlp.gate.weight": "router",
        f"{LAYER}.mlp.gate.e_score_correction_bias": "router",
        f"{LAYER}.embed_tokens.weight": "embedding",
        f"{LAYER}.shared_head.head.weight": "head",
        f"{LAYER}.shared_head.norm.weight": "norm",
        f"{LAYER}.eh_proj.weight": "other",
    },
    bank=f"{LAYER}.mlp.experts",
)
