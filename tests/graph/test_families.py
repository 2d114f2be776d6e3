# SPDX-License-Identifier: Apache-2.0
"""Every tensor of every family has the right fate, on checkpoints that transformers itself wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moepress
from moepress.errors import CheckpointError
from moepress.graph.families import FAMILIES as TABLES
from moepress.graph.families import family_of
from moepress.graph.view import build_graph
from moepress.source import open_source
from tiny import (
    EXPERTS,
    FAMILIES,
    FUSED,
    LAYERS,
    NATIVE,
    edit_json,
    edit_tensors,
    feed_forward_shapes,
    read_all,
    tokens,
)

Tiny = Callable[..., Path]

DENSE_FIRST = {"qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe"}
SHARED = {"qwen2_moe", "deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe"}
LATENT = {"deepseek_v2", "deepseek_v3"}
ROUTER = {
    "mixtral": "block_sparse_moe.gate.weight",
    "granitemoe": "block_sparse_moe.router.layer.weight",
}
KEPT_AS = {
    "qwen2_moe": {
        "model.layers.1.mlp.shared_expert_gate.weight": "router",
        "model.layers.0.self_attn.q_proj.bias": "bias",
        "model.layers.1.self_attn.v_proj.bias": "bias",
    },
    "qwen3_moe": {
        "model.layers.0.self_attn.q_norm.weight": "norm",
        "model.layers.1.self_attn.k_norm.weight": "norm",
        "model.layers.1.self_attn.o_proj.bias": "bias",
    },
    "olmoe": {
        "model.layers.0.self_attn.q_norm.weight": "norm",
        "model.layers.1.self_attn.k_norm.weight": "norm",
    },
    "deepseek_v2": {
        "model.layers.0.self_attn.q_a_layernorm.weight": "norm",
        "model.layers.1.self_attn.kv_a_layernorm.weight": "norm",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.bias": "bias",
    },
    "deepseek_v3": {"model.layers.1.mlp.gate.e_score_correction_bias": "router"},
    "glm4_moe": {
        "model.layers.1.mlp.gate.e_score_correction_bias": "router",
        "model.layers.0.self_attn.q_proj.bias": "bias",
        "model.layers.1.self_attn.q_norm.weight": "norm",
    },
}
"""What a family keeps besides embedding, head, routers and the three norms that all have."""


def sparse_layers(family: str) -> list[int]:
    return list(range(1 if family in DENSE_FIRST else 0, LAYERS))


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("BF16", tuple(tensor.shape)) for name, tensor in read_all(folder).items()}


def expected_roles(family: str) -> Counter[str]:
    attention = ("q_a", "q_b", "kv_a", "kv_b", "o") if family in LATENT else ("q", "k", "v", "o")
    roles = Counter({f"attn.{letter}": LAYERS for letter in attention})
    for name in ("gate", "up", "down"):
        roles[f"expert.{name}"] = EXPERTS * len(sparse_layers(family))
        if family in DENSE_FIRST:
            roles[f"mlp.{name}"] = 1
        if family in SHARED:
            roles[f"shared.{name}"] = len(sparse_layers(family))
    return roles


def test_the_tables_are_those_tested() -> None:
    assert set(TABLES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_exactly_one_fate(tiny: Tiny, family: str) -> None:
    with open_source(tiny(family, shards=3)) as src:
        compressed = {ref.tensor for ref in src.graph.weights}
        kept = [tensor.name for tensor in src.graph.kept]
        assert len(kept) == len(set(kept))
        assert compressed.isdisjoint(kept)
        assert compressed | set(kept) == set(src.reader.tensors)
        assert not src.graph.folded


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_weights_per_role_is_what_the_config_says(tiny: Tiny, family: str) -> None:
    with open_source(tiny(family)) as src:
        assert Counter(ref.role for ref in src.graph.weights) == expected_roles(family)
        assert len({ref.name for ref in src.graph.weights}) == len(src.graph.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_norms_embeddings_and_the_head_are_kept(tiny: Tiny, family: str) -> None:
    expected = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.norm.weight": "norm",
    }
    expected |= KEPT_AS.get(family, {})
    for layer in range(LAYERS):
        expected[f"model.layers.{layer}.input_layernorm.weight"] = "norm"
        expected[f"model.layers.{layer}.post_attention_layernorm.weight"] = "norm"
    for layer in sparse_layers(family):
        expected[f"model.layers.{layer}.{ROUTER.get(family, 'mlp.gate.weight')}"] = "router"
    with open_source(tiny(family)) as src:
        roles = {tensor.name: tensor.role for tensor in src.graph.kept}
        assert {name: roles.get(name) for name in expected} == expected
        # and no matrix besides: a router, an embedding or a head
        matrices = {t.name: t.role for t in src.graph.kept if len(t.shape) > 1}
        assert set(matrices.values()) <= {"router", "embedding", "head"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_found_with_its_own_values(tiny: Tiny, family: str) -> None:
    tensors = read_all(tiny(family))
    with open_source(tiny(family)) as src:
        found = {(ref.layer, ref.expert, ref.projection): ref for ref in src.graph.weights if ref.group == "expert"}
        assert set(found) == {
            (layer, expert, projection)
            for layer in sparse_layers(family)
            for expert in range(EXPERTS)
            for projection in ("gate", "up", "down")
        }
        for (layer, expert, projection), ref in found.items():
            wanted = expert_values(family, tensors, layer, expert, projection)
            assert ref.shape == wanted.shape
            assert torch.equal(src.weight(ref), wanted), ref.name


def expert_values(
    family: str, tensors: dict[str, torch.Tensor], layer: int, expert: int, projection: str
) -> torch.Tensor:
    if family == "granitemoe":
        block = f"model.layers.{layer}.block_sparse_moe"
        if projection == "down":
            return tensors[f"{block}.output_linear.weight"][expert]
        gate, up = tensors[f"{block}.input_linear.weight"][expert].chunk(2)
        return gate if projection == "gate" else up
    if family == "mixtral":
        letter = {"gate": "w1", "up": "w3", "down": "w2"}[projection]
        return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{letter}.weight"]
    return tensors[f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_in_forward_order_whatever_the_order_of_the_files(tiny: Tiny, family: str) -> None:
    tensors = headers(tiny(family))
    forwards = build_graph(family_of(family), tensors)
    backwards = build_graph(family_of(family), dict(reversed(tensors.items())))
    assert [ref.layer for ref in forwards.weights] == sorted(ref.layer for ref in forwards.weights)
    assert [tensor.name for tensor in forwards.kept] == [tensor.name for tensor in backwards.kept]
    assert {ref.name: ref for ref in forwards.weights} == {ref.name: ref for ref in backwards.weights}
    steps = [(ref.layer, ref.group, ref.expert) for ref in forwards.weights]
    assert steps == [(ref.layer, ref.group, ref.expert) for ref in backwards.weights]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.0.gate_proj.weight_packed",
        "model.vision.patch.weight",
        "model.layers.1.odd.weight",
    ],
)
def test_an_unknown_matrix_is_an_error_that_names_it(tiny: Tiny, family: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        build_graph(family_of(family), headers(tiny(family)) | {name: ("BF16", (8, 8))})


def test_an_unknown_vector_is_kept(tiny: Tiny) -> None:
    graph = build_graph(family_of("olmoe"), headers(tiny("olmoe")) | {"model.layers.0.extra.bias": ("F32", (8,))})
    assert {t.name: t.role for t in graph.kept}["model.layers.0.extra.bias"] == "bias"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in FUSED])
@pytest.mark.parametrize("expert", [0, 2])
@pytest.mark.parametrize("projection", ["gate", "down"])
def test_a_missing_expert_matrix_names_bank_and_expert(tiny: Tiny, family: str, expert: int, projection: str) -> None:
    tensors = headers(tiny(family))
    graph = build_graph(family_of(family), tensors)
    gone = next(r for r in graph.weights if (r.expert, r.role, r.layer) == (expert, f"expert.{projection}", 1))
    del tensors[gone.tensor]
    with pytest.raises(
        CheckpointError, match=rf"layers\.1\..*experts: expert {expert} of 4 has no {projection} weight"
    ):
        build_graph(family_of(family), tensors)


@pytest.mark.parametrize("tensor", ["input_linear", "output_linear"])
def test_missing_stacked_experts_are_an_error(tiny: Tiny, tensor: str) -> None:
    tensors = headers(tiny("granitemoe"))
    del tensors[f"model.layers.0.block_sparse_moe.{tensor}.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.0\.block_sparse_moe\.experts: expert 0 of 4 has no"):
        build_graph(family_of("granitemoe"), tensors)


def test_an_expert_of_another_shape_is_an_error(tiny: Tiny) -> None:
    tensors = headers(tiny("olmoe"))
    tensors["model.layers.0.mlp.experts.3.down_proj.weight"] = ("BF16", (64, 32))
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj.*\(64, 32\).*\(64, 64\)"):
        build_graph(family_of("olmoe"), tensors)


@pytest.mark.parametrize("shape", [(4, 64), (4, 63, 64), (2, 2, 2, 2)])
def test_stacked_experts_of_a_wrong_shape_are_an_error(tiny: Tiny, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    with pytest.raises(CheckpointError, match="input_linear"):
        build_graph(family_of("granitemoe"), headers(tiny("granitemoe")) | {name: ("BF16", shape)})


@pytest.mark.parametrize(("family", "name", "shape"), [
    ("olmoe", "model.layers.0.self_attn.q_proj.weight", (0, 64)),
    ("olmoe", "model.layers.0.self_attn.q_proj.weight", (64, 0)),
    ("olmoe", "model.layers.0.self_attn.q_proj.weight", (64,)),
    ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", (0, 192, 64)),
    ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", (4, 0, 64)),
])  # fmt: skip
def test_a_weight_without_rows_or_columns_is_an_error(
    tiny: Tiny, family: str, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        build_graph(family_of(family), headers(tiny(family)) | {name: ("BF16", shape)})


def test_a_scale_without_its_matrix_is_an_error(tiny: Tiny) -> None:
    name = "model.layers.1.self_attn.odd_proj.weight_scale_inv"
    with pytest.raises(CheckpointError, match=r"odd_proj\.weight_scale_inv has no tensor to scale"):
        build_graph(family_of("deepseek_v3"), headers(tiny("deepseek_v3")) | {name: ("F32", (1, 1))})


def test_a_layer_that_the_config_counts_but_no_file_holds_is_an_error(
    tiny: Tiny, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(tiny("olmoe"))
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"3 layers.*layer 2"), open_source(folder):
        pass


def next_token_layer() -> dict[str, torch.Tensor]:
    """What DeepSeek-V3 stores behind its last layer: one whole sparse layer and the parts that join it on."""
    own, generator = f"model.layers.{LAYERS}", torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        f"{own}.eh_proj.weight": (64, 128), f"{own}.enorm.weight": (64,), f"{own}.hnorm.weight": (64,),
        f"{own}.embed_tokens.weight": (96, 64), f"{own}.shared_head.norm.weight": (64,),
        f"{own}.shared_head.head.weight": (96, 64), f"{own}.input_layernorm.weight": (64,),
        f"{own}.post_attention_layernorm.weight": (64,), f"{own}.mlp.gate.weight": (EXPERTS, 64),
        f"{own}.mlp.gate.e_score_correction_bias": (EXPERTS,), f"{own}.self_attn.q_a_proj.weight": (32, 64),
        f"{own}.self_attn.q_a_layernorm.weight": (32,), f"{own}.self_attn.q_b_proj.weight": (128, 32),
        f"{own}.self_attn.kv_a_proj_with_mqa.weight": (48, 64), f"{own}.self_attn.kv_a_layernorm.weight": (32,),
        f"{own}.self_attn.kv_b_proj.weight": (128, 32), f"{own}.self_attn.o_proj.weight": (64, 64),
        **feed_forward_shapes(f"{own}.mlp.shared_experts", 64, 128),
    }  # fmt: skip
    for expert in range(EXPERTS):
        shapes |= feed_forward_shapes(f"{own}.mlp.experts.{expert}", 64, 64)
    return {name: (torch.randn(shape, generator=generator) * 0.1).bfloat16() for name, shape in shapes.items()}


def test_the_extra_next_token_layer_of_deepseek_v3_is_compressed_too(tiny: Tiny, tmp_path: Path) -> None:
    extra = next_token_layer()
    source = edit_tensors(tiny("deepseek_v3"), tmp_path / "source", dict(extra))
    with open_source(source) as src:
        roles = {t.name: t.role for t in src.graph.kept}
        own = f"model.layers.{LAYERS}"
        assert roles[f"{own}.eh_proj.weight"] == "other"
        assert roles[f"{own}.shared_head.head.weight"] == "head"
        assert roles[f"{own}.embed_tokens.weight"] == "embedding"
        assert {roles[f"{own}.{name}.weight"] for name in ("enorm", "hnorm", "shared_head.norm")} == {"norm"}
        assert sum(ref.layer == LAYERS and ref.group == "expert" for ref in src.graph.weights) == 3 * EXPERTS
    models = []
    for folder, target in ((source, tmp_path / "with"), (tiny("deepseek_v3"), tmp_path / "without")):
        moepress.compress_checkpoint(folder, target, moepress.Settings(method="hqq", group_size=32))
        assert not moepress.verify_checkpoint(target, folder).problems
        models.append(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32))
    assert torch.equal(models[0](tokens()).logits, models[1](tokens()).logits)


@pytest.mark.parametrize("family", NATIVE)
def test_module_names_are_those_of_the_model(tiny: Tiny, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(family))
    modules = dict(model.named_modules())
    with open_source(tiny(family)) as src:
        for ref in src.graph.weights:
            name = src.graph.family.module_name(ref.bank or ref.module)
            assert name in modules, f"{ref.name} would be looked for at {name}"
