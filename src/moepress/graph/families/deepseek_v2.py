# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 and V2-Lite: latent attention (a query of one or two matrices), shared experts, dense first layers."""

from moepress.graph.families.common import KEPT, LAYER, attention, feed_forward
from moepress.graph.view import Family, SoftmaxRouter

LATENT_ATTENTION = {
    **attention("q", "q_a", "q_b", "kv_b", "o"),
    f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight": "attn.kv_a",
}

FAMILY = Family(
    model_type="deepseek_v2",
    weights={
        **LATENT_ATTENTION,
        **feed_forward("mlp", "mlp"),
        **feed_forward("mlp.shared_experts", "shared"),
        **feed_forward("mlp.experts.{expert}", "expert"),
    },
    kept={**KEPT, f"{LAYER}.mlp.gate.weight": "router"},
    bank=f"{LAYER}.mlp.experts",
    renormalises=False,  # whatever norm_topk_prob says
    router=SoftmaxRouter(
        float32_weights=True,
        float32_logits=True,
        scaling="routed_scaling_factor",
        only_if=(("topk_method", "greedy"),),
    ),
)
