# SPDX-License-Identifier: Apache-2.0
"""Mixtral: eight experts as w1 (gate), w3 (up), w2 (down); transformers calls the block `mlp`, the files do not."""

from moepress.graph.families.common import KEPT, LAYER, attention
from moepress.graph.view import Family, SoftmaxRouter

_EXPERT = f"{LAYER}.block_sparse_moe.experts.{{expert}}"

FAMILY = Family(
    model_type="mixtral",
    weights={
        **attention("q", "k", "v", "o"),
        f"{_EXPERT}.w1.weight": "expert.gate",
        f"{_EXPERT}.w3.weight": "expert.up",
        f"{_EXPERT}.w2.weight": "expert.down",
    },
    kept={**KEPT, f"{LAYER}.block_sparse_moe.gate.weight": "router"},
    bank=f"{LAYER}.block_sparse_moe.experts",
    renames=((".block_sparse_moe.", ".mlp."),),
    renormalises=True,
    router=SoftmaxRouter(float32_weights=True),
)
