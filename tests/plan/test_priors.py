# SPDX-License-Identifier: Apache-2.0
"""Priors: each rule of the docstring, by its value, on models with and without shared experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moepress.graph.families import family_of
from moepress.graph.view import ModelGraph, build_graph
from moepress.plan.priors import priors

Mixtral = Callable[..., ModelGraph]
ALIKE = dict.fromkeys(range(5), 1.0)


@pytest.fixture
def deepseek() -> ModelGraph:
    """4 layers and a next-token layer: the first dense, the others 8 experts beside shared ones."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(5):
        own = f"model.layers.{layer}"
        attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        shapes |= {f"{own}.self_attn.{name}.weight": (64, 64) for name in attention}
        blocks = ["mlp"] if layer == 0 else ["mlp.shared_experts", *(f"mlp.experts.{i}" for i in range(8))]
        shapes |= {f"{own}.{block}.{x}_proj.weight": (64, 64) for block in blocks for x in ("gate", "up", "down")}
    return build_graph(family_of("deepseek_v3"), {name: ("BF16", shape) for name, shape in shapes.items()})


def test_a_plain_model(mixtral: Mixtral) -> None:
    found = priors(mixtral(layers=4, experts=8), ALIKE)
    assert len(found) == 4 * (4 + 8 * 3)
    for layer in range(4):
        own = f"model.layers.{layer}"
        assert [found[f"{own}.self_attn.{x}_proj.weight"] for x in "qkvo"] == [1, 2, 4, 1]
        end = {0: 4, 3: 2}.get(layer, 1)
        for expert in (0, 7):
            names = [f"{own}.block_sparse_moe.experts.{expert}.{x}.weight" for x in ("w1", "w3", "w2")]
            assert [found[name] for name in names] == [end / 16, end / 16, end / 8]


def test_routed_experts_count_by_their_energy_and_the_next_token_layer_is_no_end(deepseek: ModelGraph) -> None:
    found = priors(deepseek, {1: 0.5, 2: 1.0, 3: 3.0, 4: 1.0}, depth=4)
    for layer in range(5):
        own, end = f"model.layers.{layer}", {0: 4, 3: 2}.get(layer, 1)
        attention = [found[f"{own}.self_attn.{x}.weight"] for x in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")]
        assert attention == [1, 4, 4]
        if layer == 0:
            assert found[f"{own}.mlp.down_proj.weight"] == 2 * end
        else:
            assert found[f"{own}.mlp.shared_experts.up_proj.weight"] == end
            energy = {1: 0.5, 3: 3.0}.get(layer, 1.0)
            assert found[f"{own}.mlp.experts.5.gate_proj.weight"] == pytest.approx(energy * end / 16)


def test_a_model_without_experts(deepseek: ModelGraph) -> None:
    tensors = {ref.name: ("BF16", ref.shape) for ref in deepseek.weights if ref.layer == 0}
    # one layer is the first and the last
    assert set(priors(build_graph(deepseek.family, tensors), {}).values()) == {1, 2, 4}
