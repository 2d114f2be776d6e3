# SPDX-License-Identifier: Apache-2.0
"""GraniteMoE: the experts of a layer are stacked in the files, gate over up in one tensor."""

from moepress.graph.families.common import KEPT, LAYER, attention
from moepress.graph.view import Family

FAMILY = Family(
    model_type="granitemoe",
    weights={
        **attention("q", "k", "v", "o"),
        f"{LAYER}.block_sparse_moe.input_linear.weight": ("expert.gate", "expert.up"),
        f"{LAYER}.block_sparse_moe.output_linear.weight": ("expert.down",),
    },
    kept={**KEPT, f"{LAYER}.block_sparse_moe.router.layer.weight": "router"},
    bank=f"{LAYER}.block_sparse_moe.experts",
    renames=(
        (".router.layer.", ".router."),
        (".input_linear.weight", ".experts.gate_up_proj"),
        (".output_linear.weight", ".experts.down_proj"),
    ),
    renormalises=True,
)
