# SPDX-License-Identifier: Apache-2.0
"""Rows that several families share, so that each table shows only what is its own."""

from __future__ import annotations

from collections.abc import Mapping

LAYER = "model.layers.{layer}"

KEPT: Mapping[str, str] = {
    "model.embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "model.norm.weight": "norm",
    f"{LAYER}.*norm.weight": "norm",
    f"{LAYER}.self_attn.*norm.weight": "norm",
    f"{LAYER}.self_attn.*.bias": "bias",
}


def attention(*letters: str) -> dict[str, str]:
    """`q` -> model.layers.N.self_attn.q_proj.weight, role attn.q."""
    return {f"{LAYER}.self_attn.{letter}_proj.weight": f"attn.{letter}" for letter in letters}


def feed_forward(prefix: str, group: str) -> dict[str, str]:
    """The gate, up and down projections under `prefix`, roles group.gate and so on."""
    return {f"{LAYER}.{prefix}.{name}_proj.weight": f"{group}.{name}" for name in ("gate", "up", "down")}
