# SPDX-License-Identifier: Apache-2.0
"""Graphs without files: the planner sees names and shapes only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moepress.graph.families import family_of
from moepress.graph.view import ModelGraph, build_graph


@pytest.fixture(scope="session")
def mixtral() -> Callable[..., ModelGraph]:
    """mixtral(layers, experts, hidden, inner) -> the graph of a Mixtral of that size."""

    def make(layers: int = 2, experts: int = 4, hidden: int = 128, inner: int = 256) -> ModelGraph:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (100, hidden))}
        for layer in range(layers):
            own = f"model.layers.{layer}"
            tensors |= {f"{own}.self_attn.{x}_proj.weight": ("BF16", (hidden, hidden)) for x in "qkvo"}
            tensors[f"{own}.block_sparse_moe.gate.weight"] = ("BF16", (experts, hidden))
            tensors[f"{own}.input_layernorm.weight"] = ("BF16", (hidden,))
            for expert in range(experts):
                prefix = f"{own}.block_sparse_moe.experts.{expert}"
                tensors |= {f"{prefix}.{x}.weight": ("BF16", (inner, hidden)) for x in ("w1", "w3")}
                tensors[f"{prefix}.w2.weight"] = ("BF16", (hidden, inner))
        return build_graph(family_of("mixtral"), tensors)

    return make
