# SPDX-License-Identifier: Apache-2.0
"""The calibration walk, one layer at a time, gives what the whole transformers model gives.

The reference is the model as `from_pretrained` loads it, in float32, watched by plain hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from walking import (
    LENGTH,
    TOKENS,
    WINDOWS,
    all_stages,
    change,
    close,
    disturbed,
    hidden_states,
    load,
    moment,
    plain_inputs,
    window_ids,
)

from moepress.errors import CalibrationError, CheckpointError, WriteError
from moepress.measure.walk import Walk
from moepress.source import Source, open_source
from tiny import EXPERTS, LAYERS, NATIVE, edit_json, edit_tensors, read_all, tiny_checkpoint

Tiny = Callable[..., Path]
LARGE = 1 << 30


@contextmanager
def walking(folder: Path, work: Path, **settings: Any) -> Iterator[tuple[Walk, Source]]:
    with open_source(folder) as source:
        yield Walk(source, window_ids(), folder=work, **({"memory": LARGE} | settings)), source


def run(walk: Walk, start: int = 0, depth: int = LAYERS) -> bytes:
    """The last hidden states of a walk that replaces nothing."""
    for _ in walk.layers(start):
        pass
    return (walk.folder / f"boundary-{depth:05}.f32").read_bytes()


# ---------------------------------------------------------------------------------------------- the plain feed


@pytest.mark.parametrize("memory", [0, LARGE])
@pytest.mark.parametrize("family", NATIVE)
def test_hidden_states_are_those_of_the_model(family: str, memory: int, tiny: Tiny, tmp_path: Path) -> None:
    expected = hidden_states(load(tiny(family)), window_ids())
    assert len(expected) == LAYERS + 1
    with walking(tiny(family), tmp_path, memory=memory, batch=3) as (walk, _):
        for layer in walk.layers():
            before = walk.read(layer.number, 0, WINDOWS)
            assert close(before, expected[layer.number])
            assert layer.residual == pytest.approx(before.double().square().mean().item(), rel=1e-6)
        assert close(walk.read(LAYERS, 0, WINDOWS), expected[LAYERS])
    assert not close(expected[0], expected[1], 0.1)  # the layers do something


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 9}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
        ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 2.0}),
        ("deepseek_v3", {"first_k_dense_replace": 2, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16}}),
        ("olmoe", {"clip_qkv": 0.5, "tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_other_configurations_of_a_family(family: str, changes: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "source", family, **changes)
    model = load(folder)
    expected = hidden_states(model, window_ids())
    inputs: dict[str, Any] = {}
    with walking(folder, tmp_path / "work") as (walk, source):
        inputs = plain_inputs(model, source, window_ids())
        checked = []

        def each(layer: Any, site: Any) -> None:
            assert close(site.moment, moment(*inputs[site.refs[0].name]), 1e-4)
            checked.extend(ref.name for ref in site.refs)

        all_stages(walk, each)
        assert sorted(checked) == sorted(ref.name for ref in source.graph.weights)
        assert close(walk.read(LAYERS, 0, WINDOWS), expected[LAYERS])


def test_an_fp8_source_is_walked_with_its_scales(tiny: Tiny, tmp_path: Path) -> None:
    change_to: dict[str, torch.Tensor | None] = {}
    exact: dict[str, torch.Tensor | None] = {}
    for name, tensor in read_all(tiny("deepseek_v3")).items():
        if name.endswith("_proj.weight") and "layers.1." in name:
            scale = tensor.float().abs().max() / 448
            change_to[name] = codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
            change_to[name + "_scale_inv"] = scale.reshape(1, 1)
            exact[name] = (codes.float() * scale).bfloat16()
    assert len(change_to) > 20
    fp8 = edit_tensors(tiny("deepseek_v3"), tmp_path / "fp8", change_to)
    edit_json(fp8 / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    plain = edit_tensors(tiny("deepseek_v3"), tmp_path / "plain", exact)
    with walking(fp8, tmp_path / "work") as (walk, _):
        run(walk)
        assert close(walk.read(LAYERS, 0, WINDOWS), hidden_states(load(plain), window_ids())[LAYERS])


# ---------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize("family", NATIVE)
def test_every_moment_is_that_of_plain_hooks(family: str, tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny(family), tmp_path, batch=2) as (walk, source):
        inputs = plain_inputs(load(tiny(family)), source, window_ids())
        seen: list[str] = []

        def each(layer: Any, site: Any) -> None:
            for ref in site.refs:
                x, scale = inputs[ref.name]
                assert site.tokens == len(x)
                assert site.moment.dtype == torch.float32
                assert close(site.moment, moment(x, scale), 1e-4), ref.name
                assert torch.equal(site.weights[ref.name], source.weight(ref).float())
                seen.append(ref.name)
            assert sum(len(x) for x, _ in site.inputs()) == site.tokens

        all_stages(walk, each)
        assert sorted(seen) == sorted(ref.name for ref in source.graph.weights)
        weighted = [ref for ref in source.graph.weights if ref.role == "expert.down"]
        assert any(
            not close(moment(x, s), moment(x, torch.ones_like(s)), 0.1) for x, s in (inputs[r.name] for r in weighted)
        )


@pytest.mark.parametrize("memory", [0, LARGE])
def test_stages_come_in_forward_order(memory: int, tiny: Tiny, tmp_path: Path) -> None:
    roles: dict[int, list[list[str]]] = {}
    with walking(tiny("deepseek_v3"), tmp_path, memory=memory) as (walk, _):
        for layer in walk.layers():
            roles[layer.number] = [
                [
                    " ".join(sorted(f"{ref.role}{'' if ref.expert is None else ref.expert}" for ref in site.refs))
                    for site in sites
                ]
                for sites in layer.stages()
            ]
    attention = [["attn.kv_a attn.q_a"], ["attn.kv_b", "attn.q_b"], ["attn.o"]]
    roles = {number: [sorted(sites) for sites in found] for number, found in roles.items()}
    assert roles[0] == [*attention, ["mlp.gate mlp.up"], ["mlp.down"]]
    first = [f"expert.gate{e} expert.up{e}" for e in range(EXPERTS)]
    second = [f"expert.down{e}" for e in range(EXPERTS)]
    groups = [[e] for e in range(EXPERTS)] if memory == 0 else [list(range(EXPERTS))]
    expected = [stage for group in groups for stage in ([first[e] for e in group], [second[e] for e in group])]
    assert roles[1] == [*attention, ["shared.gate shared.up"], ["shared.down"], *expected]


@pytest.mark.parametrize("family", NATIVE)
def test_replacing_weights_is_running_the_model_with_them(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """Every weight is replaced, each after its moment was read; each moment is that of the model so far changed."""
    model = load(tiny(family))
    before = hidden_states(model, window_ids())
    with walking(tiny(family), tmp_path, memory=0) as (walk, source):
        for layer in walk.layers():
            for sites in layer.stages():
                inputs = plain_inputs(model, source, window_ids())
                for site in sites:
                    assert close(site.moment, moment(*inputs[site.refs[0].name]), 1e-4)
                    for ref in site.refs:
                        new = disturbed(site.weights[ref.name])
                        site.replace(ref.name, new)
                        change(model, source, ref, new)
        expected = hidden_states(model, window_ids())
        assert close(walk.read(LAYERS, 0, WINDOWS), expected[LAYERS])
        assert not close(before[LAYERS], expected[LAYERS], 0.01)


@pytest.mark.parametrize("role", ["attn.k", "attn.o", "shared.down", "expert.up", "expert.down"])
def test_one_replaced_weight_is_one_changed_weight(role: str, tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("glm4_moe"))
    with walking(tiny("glm4_moe"), tmp_path) as (walk, source):
        chosen = next(ref for ref in reversed(source.graph.weights) if ref.role == role)

        def each(layer: Any, site: Any) -> None:
            if chosen in site.refs:
                site.replace(chosen.name, disturbed(site.weights[chosen.name]))

        all_stages(walk, each)
        change(model, source, chosen, disturbed(source.weight(chosen).float()))
        assert close(walk.read(LAYERS, 0, WINDOWS), hidden_states(model, window_ids())[LAYERS])


def test_an_expert_without_tokens_has_a_zero_moment(tiny: Tiny, tmp_path: Path) -> None:
    # the correction decides who is chosen: experts 0 and 2 never are
    bias = torch.tensor([-9.0, 9.0, -9.0, 9.0])
    folder = edit_tensors(
        tiny("deepseek_v3"), tmp_path / "source", {"model.layers.1.mlp.gate.e_score_correction_bias": bias}
    )
    with walking(folder, tmp_path / "work") as (walk, source):
        inputs = plain_inputs(load(folder), source, window_ids())
        found: dict[tuple[str, int], int] = {}

        def each(layer: Any, site: Any) -> None:
            if (ref := site.refs[0]).expert is None:
                return
            found[ref.projection, ref.expert] = site.tokens
            assert close(site.moment, moment(*inputs[ref.name]), 1e-4)
            assert bool(site.moment.any()) == bool(site.tokens)
            own = {r.projection: source.weight(r).float() + 1 for r in layer.refs if r.expert == ref.expert}
            assert (layer.expert_error(ref.expert, **own) > 0) == bool(site.tokens)
            for each_ref in site.refs:
                site.replace(each_ref.name, site.weights[each_ref.name])

        all_stages(walk, each)
        assert found == {(p, e): (e % 2) * TOKENS for p in ("gate", "down") for e in range(EXPERTS)}
        assert close(walk.read(LAYERS, 0, WINDOWS), hidden_states(load(folder), window_ids())[LAYERS])


# ---------------------------------------------------------------------------------------------- same bytes


def test_neither_memory_nor_resuming_changes_a_byte(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2_moe")
    found = {}
    for memory in (0, 100_000, LARGE):
        with walking(folder, tmp_path / str(memory), memory=memory) as (walk, _):
            moments: dict[str, bytes] = {}

            def each(layer: Any, site: Any, moments: dict[str, bytes] = moments) -> None:
                moments[site.refs[0].name] = site.moment.numpy().tobytes()

            all_stages(walk, each)
            found[memory] = moments, (walk.folder / f"boundary-{LAYERS:05}.f32").read_bytes()
            assert not list(walk.folder.glob("*.scratch*"))
    assert found[0] == found[100_000] == found[LARGE]
    with walking(folder, tmp_path / "0") as (walk, _):
        assert walk.boundaries() == [0, 1, 2]
        assert run(walk, start=1) == found[0][1]
        assert run(walk) == found[0][1]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_states_that_stay_on_the_device_change_no_byte(
    family: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for resident in (0, LARGE):
        room = Walk._room
        with monkeypatch.context() as patch, walking(tiny(family), tmp_path / str(resident)) as (walk, _):
            patch.setattr(Walk, "_room", lambda self, n=resident, room=room: replace(room(self), resident_bytes=n))
            moments: dict[str, bytes] = {}

            def each(layer: Any, site: Any, moments: dict[str, bytes] = moments) -> None:
                moments[site.refs[0].name] = site.moment.numpy().tobytes()
                if site.refs[0].projection == "down" and site.refs[0].expert == 1:
                    error = layer.expert_error(1, *(torch.zeros(ref.shape) for ref in _expert(layer, 1)))
                    moments[f"error {layer.number}"] = str(error).encode()

            all_stages(walk, each)
            assert bool(list(walk.folder.glob("*.scratch*"))) is False
            found.append((moments, (walk.folder / f"boundary-{LAYERS:05}.f32").read_bytes()))
    assert found[0] == found[1]


def _expert(layer: Any, expert: int) -> list[Any]:
    own = {ref.projection: ref for ref in layer.refs if ref.expert == expert}
    return [own[name] for name in ("gate", "up", "down")]


def test_a_killed_walk_goes_on_from_its_last_boundary(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "source", "mixtral", num_hidden_layers=4)
    with walking(folder, tmp_path / "whole") as (walk, _):
        whole = run(walk, depth=4)
        assert walk.boundaries() == [0, 3, 4]
    with walking(folder, tmp_path / "cut") as (walk, _):
        for layer in walk.layers():
            next(layer.stages())
            if layer.number == 2:
                break
        assert walk.boundaries() == [0, 1, 2]
    with walking(folder, tmp_path / "cut") as (walk, _):
        assert [layer.number for layer in walk.layers(start=2)] == [2, 3]
        assert (walk.folder / "boundary-00004.f32").read_bytes() == whole


def test_boundaries_of_a_replaced_run_are_not_mixed_with_later_ones(tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny("mixtral"), tmp_path) as (walk, _):
        run(walk)
        next(walk.layers(start=1))
        assert walk.boundaries() == [0, 1]


def test_only_a_walk_of_the_same_kind_can_be_continued(tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny("mixtral"), tmp_path / "work", fingerprint="a") as (walk, source):
        run(walk)
        for settings, key in [({"fingerprint": "b"}, "fingerprint"), ({"fingerprint": "a", "batch": 2}, "batch")]:
            other = Walk(source, window_ids(), folder=tmp_path / "work", **settings)
            assert other.boundaries() == [0]
            with pytest.raises(CalibrationError, match=rf"another run \({key} differs\); start from layer 0"):
                next(other.layers(start=1))
        other = Walk(source, window_ids() + 1, folder=tmp_path / "work", fingerprint="a")
        with pytest.raises(CalibrationError, match="ids differs"):
            next(other.layers(start=1))
        with pytest.raises(CalibrationError, match=r"no boundary 7 \(stored: 1, 2\); start from layer 0"):
            next(walk.layers(start=7))
        (tmp_path / "work" / "boundary-00001.f32").write_bytes(b"short")
        with pytest.raises(CalibrationError, match="has 5 bytes, but hidden states of shape"):
            next(walk.layers(start=1))


# ---------------------------------------------------------------------------------------------- misuse


def test_a_site_is_of_no_use_after_its_stage(tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny("mixtral"), tmp_path) as (walk, _):
        layers = walk.layers()
        layer = next(layers)
        old = next(layer.stages())[0]
        name = old.refs[0].name
        with pytest.raises(CalibrationError, match="does not read this input"):
            old.replace("other", torch.zeros(1))
        with pytest.raises(CalibrationError, match=r"has shape \(3, 3\), the old one \(32, 64\)"):
            old.replace(name, torch.zeros(3, 3))
        next(layer.stages())
        for use in (lambda: old.moment, lambda: old.inputs(), lambda: old.replace(name, torch.zeros(32, 64))):
            with pytest.raises(CalibrationError, match=r"stage of .*k_proj.weight is over"):
                use()


def test_a_model_without_a_class_is_refused_early(tiny: Tiny, tmp_path: Path) -> None:
    with (
        open_source(tiny("deepseek")) as source,
        pytest.raises(CalibrationError, match=r"no model class for model_type 'deepseek'.*rtn, hqq, milo"),
    ):
        Walk(source, window_ids(), folder=tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 4), 96), "run from 96 to 96, the model knows 0 to 96 - 1"),
        (torch.zeros(4, dtype=torch.int64), r"not torch.int64 \(4,\)"),
        (torch.zeros(2, 2), "whole numbers"),
    ],
)
def test_ids_of_another_tokenizer_are_refused(ids: torch.Tensor, message: str, tiny: Tiny, tmp_path: Path) -> None:
    with open_source(tiny("mixtral")) as source, pytest.raises(CalibrationError, match=message):
        Walk(source, ids, folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("input_layernorm.weight", None, "lack model.layers.1.input_layernorm.weight, which MixtralDecoderLayer needs"),
        ("block_sparse_moe.gate.weight", None, "lack model.layers.1.mlp.gate.weight"),
        ("input_layernorm.weight", torch.ones(3), r"input_layernorm.weight has shape \(3,\) in the files and \(64,\)"),
        ("self_attn.q_proj.bias", torch.ones(64), "which MixtralDecoderLayer has no place for"),
        ("self_attn.extra.bias", torch.ones(64), "no module for model.layers.1.self_attn.extra.bias"),
    ],
)
def test_every_tensor_of_a_layer_is_claimed(
    name: str, tensor: torch.Tensor | None, message: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = edit_tensors(tiny("mixtral"), tmp_path / "source", {f"model.layers.1.{name}": tensor})
    with walking(folder, tmp_path / "work") as (walk, _), pytest.raises(CheckpointError, match=message):
        run(walk)


def test_a_work_folder_that_cannot_be_made_is_told(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with walking(tiny("mixtral"), tmp_path / "file") as (walk, _), pytest.raises(WriteError, match="as a work folder"):
        run(walk)


@pytest.mark.gpu
@pytest.mark.parametrize("family", NATIVE)
def test_the_walk_on_a_gpu_is_that_on_the_cpu(family: str, tiny: Tiny, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    moments: dict[str, list[torch.Tensor]] = {}
    for device in ("cpu", "cuda"):
        with walking(tiny(family), tmp_path / device, device=device) as (walk, _):

            def each(layer: Any, site: Any) -> None:
                moments.setdefault(site.refs[0].name, []).append(site.moment.cpu())
                if (ref := site.refs[0]).role == "expert.down":
                    own = {r.projection: torch.ones(r.shape) for r in layer.refs if r.expert == ref.expert}
                    assert layer.expert_error(ref.expert, **own) > 0 or not site.tokens

            all_stages(walk, each)
            moments.setdefault("end", []).append(walk.read(LAYERS, 0, WINDOWS))
    for name, (cpu, gpu) in moments.items():
        assert close(gpu, cpu, 1e-3), name


def test_short_windows_and_one_window_work(tiny: Tiny, tmp_path: Path) -> None:
    ids = window_ids(1, 2)
    with open_source(tiny("deepseek_v2")) as source:
        walk = Walk(source, ids, folder=tmp_path, batch=8)
        run(walk)
        assert close(walk.read(LAYERS, 0, 1), hidden_states(load(tiny("deepseek_v2")), ids)[LAYERS])
    assert LENGTH > 2
