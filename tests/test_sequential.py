# SPDX-License-Identifier: Apache-2.0
"""Compressing with calibration text: each weight is fitted to what the compressed weights before it really give."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import moepress
from moepress.checkpoint.reader import CheckpointReader
from moepress.checkpoint.writer import CheckpointWriter, work_folder
from moepress.errors import CalibrationError, CheckpointError, PlanError, ResumeError
from moepress.format.manifest import BankEntry, Manifest
from moepress.format.packing import unpack_codes
from moepress.format.spec import WeightSpec
from moepress.format.weight import dequantize
from moepress.graph.view import WeightRef
from moepress.measure.corpus import windows_digest
from moepress.measure.layer_pass import LayerPass
from moepress.measure.stats_folder import STATISTICS, TOKENS
from moepress.plan.statistics import Statistics
from moepress.quantize.gptq import gptq, make_metric
from moepress.source import Source, open_source
from moepress.verify import load_parts
from tiny import EXPERTS, LAYERS, VOCABULARY, edit_tensors, fingerprint, left_behind, read_all, tokens

Tiny = Callable[..., Path]
Made = Callable[..., tuple[Path, Path, Path]]
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "granitemoe")
SETTINGS = moepress.Settings(method="gptq", bits=2, group_size=32)
MIN_TOKENS = 64
RECIPES: dict[str, list[tuple[str, WeightSpec]]] = {
    "calibrated": [
        ("gptq", WeightSpec(bits=1, group_size=32)),
        ("gptq", WeightSpec(bits=2, group_size=32, rank=5, factor_bits=4)),
        ("hqq", WeightSpec(bits=3, group_size=64, rank=2, factor_bits=3)),
        ("gptq-mcmoe", WeightSpec(bits=4, group_size=32, rank=1, factor_bits=16)),
    ],
    "data-free": [
        ("rtn", WeightSpec(bits=1, group_size=32)),
        ("milo", WeightSpec(bits=2, group_size=32, rank=5, factor_bits=3)),
        ("hqq", WeightSpec(bits=3, group_size=64)),
        ("milo", WeightSpec(bits=4, group_size=32, rank=16, factor_bits=8)),
    ],
}
"""One expert of each width side by side, with methods and compensators of their own."""


def window_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(8))


def write_stats(folder: Path, source: Path) -> Path:
    """What `compress` reads of a calibration: the text, and which model it is for."""
    ids = window_ids()
    folder.mkdir()
    save_file({"ids": ids.int()}, folder / TOKENS)
    with open_source(source) as src:
        made = Statistics(
            source=src.digest, tokens=ids.numel(), settings={"text": windows_digest(ids)}, experts={}, errors={},
            residual={}, short=(), kind="local",
        )  # fmt: skip
    (folder / STATISTICS).write_text(made.to_json())
    return folder


def with_next_token_layer(source: Path, folder: Path) -> Path:
    """A copy whose last layer comes once more as the one that transformers does not run."""
    own = {name: tensor for name, tensor in read_all(source).items() if name.startswith("model.layers.1.")}
    extra: dict[str, torch.Tensor | None] = {n.replace("layers.1.", "layers.2."): t.flip(0) for n, t in own.items()}
    return edit_tensors(source, folder, extra | {"model.layers.2.eh_proj.weight": torch.ones(64, 128).bfloat16()})


def mixed_plan(source: Path, recipe: str) -> moepress.Plan:
    """Experts of four widths in each layer, gate and up another one than down; attention in two methods."""
    weights, methods, choices = {}, {}, RECIPES[recipe]
    with open_source(source) as src:
        for ref in src.graph.weights:
            number = (ref.expert or 0) + (ref.projection == "down") if ref.expert is not None else len(weights) % 3 + 1
            methods[ref.name], spec = choices[number % EXPERTS]
            weights[ref.name] = replace(spec, group_size=min(spec.group_size, ref.shape[1]))
        plan = moepress.Plan(src.digest, "gptq" if recipe == "calibrated" else "milo", 1, True, weights, {}, methods)
    return moepress.Plan.from_json(plan.to_json())


@pytest.fixture(scope="session")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(family, recipe) -> source, statistics and target, made once. Never write into them."""
    done: dict[tuple[str, str], tuple[Path, Path, Path]] = {}

    def get(family: str, recipe: str = "gptq") -> tuple[Path, Path, Path]:
        if (family, recipe) not in done:
            folder = tmp_path_factory.mktemp(f"{family}-{recipe}")
            source = tiny(family)
            if family == "deepseek_v3":
                source = with_next_token_layer(source, folder / "source")
            stats, target = write_stats(folder / "stats", source), folder / "target"
            if recipe == "gptq":
                moepress.compress_checkpoint(source, target, SETTINGS, statistics=stats)
            else:
                given = {"statistics": stats} if recipe == "calibrated" else {}
                moepress.compress_checkpoint(source, target, plan=mixed_plan(source, recipe), **given)
            done[family, recipe] = source, stats, target
        return done[family, recipe]

    return get


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def values_of(reader: CheckpointReader, manifest: Manifest, ref: WeightRef) -> torch.Tensor:
    return dequantize(load_parts(reader, manifest, ref), spec_of(manifest, ref), *ref.shape)


def spec_of(manifest: Manifest, ref: WeightRef) -> WeightSpec:
    entry = manifest.linears[ref.module] if ref.bank is None else manifest.banks[ref.bank]
    return entry.specs(ref.projection)[ref.expert or 0] if isinstance(entry, BankEntry) else entry.spec


@torch.no_grad()
def dequantised(source: Path, target: Path) -> Any:
    """The source model with every compressed weight in it, dequantised."""
    model = load(source)
    with open_source(source) as src, CheckpointReader(target) as reader:
        manifest = Manifest.from_config(reader.config["quantization_config"])
        for ref in walked(src):
            place = model.get_submodule(src.graph.family.module_name(ref.bank or ref.module))
            put(place, ref, values_of(reader, manifest, ref))
    return model


def put(place: Any, ref: WeightRef, weight: torch.Tensor) -> None:
    if ref.expert is None:
        place.weight.copy_(weight)
    elif ref.projection == "down":
        place.down_proj[ref.expert].copy_(weight)
    else:
        first = 0 if ref.projection == "gate" else place.gate_up_proj.shape[1] // 2
        place.gate_up_proj[ref.expert, first : first + ref.shape[0]].copy_(weight)


def walked(src: Source) -> list[WeightRef]:
    return [ref for ref in src.graph.weights if ref.layer < LAYERS]


@torch.no_grad()
def inputs_of(model: Any, src: Source, ref: WeightRef) -> torch.Tensor:
    """What a weight reads in a whole model, times the factor on its output, seen by a plain hook: [n, K]."""
    seen: list[tuple[torch.Tensor, ...]] = []
    place = model.get_submodule(src.graph.family.module_name(ref.bank or ref.module))
    hook = place.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(window_ids(), use_cache=False)
    hook.remove()
    hidden, *routing = seen[0]
    x = hidden.reshape(-1, hidden.shape[-1])
    if ref.expert is None:
        return x
    token, choice = (routing[0] == ref.expert).nonzero(as_tuple=True)
    if ref.projection != "down":
        return x[token]
    gate, up = (x[token] @ place.gate_up_proj[ref.expert].T).chunk(2, -1)
    return place.act_fn(gate) * up * routing[1][token, choice, None]


def codes_by_hand(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    return gptq(["w"], weight.float()[None], make_metric(moment[None]), [SETTINGS.bits], SETTINGS.group_size)[0].codes


# ---------------------------------------------------------------------------------------------- what it is fitted to


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_fitted_to_the_compressed_model_before_it(family: str, made: Made) -> None:
    source, _, target = made(family)
    original, compressed, fed, starved = load(source), dequantised(source, target), 0, 0
    with open_source(source) as src, CheckpointReader(target) as reader:
        manifest = Manifest.from_config(reader.config["quantization_config"])
        for ref in walked(src):
            packed = load_parts(reader, manifest, ref)["packed"]
            stored = unpack_codes(packed, SETTINGS.bits, ref.shape[1])
            x = inputs_of(compressed, src, ref)
            if ref.expert is not None and len(x) < MIN_TOKENS:
                starved += 1
                assert torch.equal(stored, codes_by_hand(src.weight(ref), torch.eye(ref.shape[1]))), ref.name
                continue
            found = agreement(stored, src, ref, x)
            # a code may turn on the last bit of a moment, and then others of its row do
            assert found > 0.98, (ref.name, found)
            if ref.layer == LAYERS - 1:
                fed += 1
                assert agreement(stored, src, ref, inputs_of(original, src, ref)) < found - 0.02, ref.name
    assert fed >= 6, "hardly any weight was looked at"


def agreement(stored: torch.Tensor, src: Source, ref: WeightRef, x: torch.Tensor) -> float:
    moment = (x.double().T @ x.double() / window_ids().numel()).float()
    return (stored == codes_by_hand(src.weight(ref), moment)).float().mean().item()


def test_a_layer_that_no_token_reaches_is_fitted_as_if_all_inputs_were_alike(made: Made) -> None:
    source, _, target = made("deepseek_v3")
    with open_source(source) as src, CheckpointReader(target) as reader:
        manifest = Manifest.from_config(reader.config["quantization_config"])
        own = [ref for ref in src.graph.weights if ref.layer == LAYERS]
        assert len(own) > 3 * EXPERTS
        for ref in own:
            stored = unpack_codes(load_parts(reader, manifest, ref)["packed"], SETTINGS.bits, ref.shape[1])
            assert torch.equal(stored, codes_by_hand(src.weight(ref), torch.eye(ref.shape[1]))), ref.name


# ---------------------------------------------------------------------------------------------- what comes of it


@pytest.mark.parametrize("recipe", ["gptq", *RECIPES])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_sound_and_runs(family: str, recipe: str, made: Made) -> None:
    source, _, target = made(family, recipe)
    assert verify_problems(target) == ()
    assert left_behind(target) == ["target"] and not list(target.rglob("*.f32"))
    model, wanted = load(target), dequantised(source, target)
    ids = tokens()
    with torch.no_grad():
        found, expected, original = (each(ids).logits for each in (model, wanted, load(source)))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - original).norm() > 0.01 * original.norm()
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), wanted.generate(ids, **arguments))


def verify_problems(target: Path) -> tuple[str, ...]:
    return moepress.verify_checkpoint(target).problems


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_all_widths_lie_side_by_side(family: str, recipe: str, made: Made) -> None:
    source, _, target = made(family, recipe)
    plan = mixed_plan(source, recipe)
    errors = moepress.verify_checkpoint(target, against=source).errors
    with open_source(source) as src, CheckpointReader(target) as reader:
        manifest = Manifest.from_config(reader.config["quantization_config"])
        assert {name: spec_of(manifest, ref) for ref in src.graph.weights for name in [ref.name]} == dict(plan.weights)
        for bank in {ref.bank for ref in src.graph.weights if ref.bank}:
            for projection in ("gate", "up", "down"):
                own = [ref for ref in src.graph.weights if ref.bank == bank and ref.projection == projection]
                assert {spec_of(manifest, ref).bits for ref in own} == {1, 2, 3, 4}
                # the width decides, so no two experts can have been swapped
                by_width = {spec_of(manifest, ref).bits: errors[ref.name] for ref in own}
                assert by_width[1] > by_width[2] > by_width[3] > by_width[4]


def test_calibration_serves_the_model_that_it_is_for(made: Made, tmp_path: Path) -> None:
    source, _, target = made("mixtral")
    moepress.compress_checkpoint(source, tmp_path / "hqq", replace(SETTINGS, method="hqq"))
    with torch.no_grad():
        original, found, plain = (load(each)(window_ids()).logits for each in (source, target, tmp_path / "hqq"))
    assert (found - original).norm() < 0.9 * (plain - original).norm()


# ---------------------------------------------------------------------------------------------- cut off


MOMENTS: dict[str, tuple[Any, str, int, int]] = {
    # class, method and the call of it before which the process dies; the first layer that is walked again
    "before any weight": (LayerPass, "stages", 1, 0),
    "within the first layer": (CheckpointWriter, "put", 8, 0),
    "before the first layer's outputs": (LayerPass, "finish", 1, 0),
    "before the second layer": (LayerPass, "stages", 2, 1),
    "within the second layer": (CheckpointWriter, "put", 24, 1),
    "before the last layer's outputs": (LayerPass, "finish", 3, 1),
    "before a kept tensor": (CheckpointWriter, "put", 36, 2),
    "before the end": (CheckpointWriter, "publish", 1, 2),
}


@pytest.mark.parametrize("when", MOMENTS)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(
    when: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats, whole = made("mixtral")
    target, again = tmp_path / "target", MOMENTS[when][-1]
    # what is not yet on the disk when a layer ends must be put there then
    monkeypatch.setattr("moepress.checkpoint.writer.SYNC_SECONDS", 0.0 if "within" in when else 1e9)
    run_and_kill(source, stats, target, when)
    assert not target.exists()
    with pytest.raises(ResumeError, match=r"unfinished run.*--resume"):
        moepress.compress_checkpoint(source, target, SETTINGS, statistics=stats)
    walked_again = watch(monkeypatch)
    result = moepress.compress_checkpoint(source, target, SETTINGS, statistics=stats, resume=True)
    assert fingerprint(target) == fingerprint(whole)
    assert left_behind(target) == ["target"]
    assert walked_again == list(range(again, LAYERS))
    assert set(result.errors) == set(result.plan.weights), "errors of resumed weights must not be lost"


def test_a_layer_is_walked_again_for_a_weight_that_was_lost(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats, whole = made("mixtral")
    target = tmp_path / "target"
    run_and_kill(source, stats, target, "before the last layer's outputs")
    journal = work_folder(target) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:10]))
    walked_again = watch(monkeypatch)
    moepress.compress_checkpoint(source, target, SETTINGS, statistics=stats, resume=True)
    assert walked_again == [0, 1]
    assert fingerprint(target) == fingerprint(whole)


def run_and_kill(source: Path, stats: Path, target: Path, when: str) -> None:
    owner, method, call, _ = MOMENTS[when]
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs shall not hang the tests
        real, left = getattr(owner, method), iter(range(call - 1))

        def then_die(*given: Any, **named: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        setattr(owner, method, then_die)
        try:
            moepress.compress_checkpoint(source, target, SETTINGS, statistics=stats)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are walked from here on."""
    seen: list[int] = []
    stages = LayerPass.stages
    monkeypatch.setattr(LayerPass, "stages", lambda self: seen.append(self.number) or stages(self))
    return seen


def test_another_text_is_another_run(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, stats, _ = made("mixtral")
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            moepress.compress_checkpoint(source, target, SETTINGS, statistics=stats)
    monkeypatch.setattr("test_sequential.window_ids", lambda: tokens(8, 32))
    other = write_stats(tmp_path / "other", source)
    with pytest.raises(ResumeError, match="calibration"):
        moepress.compress_checkpoint(source, target, SETTINGS, statistics=other, resume=True)
    moepress.compress_checkpoint(source, target, SETTINGS, statistics=stats, resume=True)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------- refusals


def test_without_statistics_the_way_to_them_is_told(tiny: Tiny, made: Made, tmp_path: Path) -> None:
    for settings in (SETTINGS, moepress.Settings(method="hqq", ranks="uniform-4")):
        with pytest.raises(PlanError, match=r"moepress calibrate SRC .*--stats"):
            moepress.compress_checkpoint(tiny("mixtral"), tmp_path / "target", settings)
    with pytest.raises(PlanError, match=r"statistics of a source with digest .* calibrate this model"):
        moepress.compress_checkpoint(tiny("olmoe"), tmp_path / "target", SETTINGS, statistics=made("mixtral")[1])
    assert left_behind(tmp_path / "target") == []


def test_a_plan_knows_its_statistics(made: Made, tmp_path: Path) -> None:
    source, stats, target = made("mixtral")
    plan = moepress.plan_checkpoint(source, SETTINGS, statistics=stats)
    assert moepress.Plan.from_json(plan.to_json()).statistics == str(stats.resolve())
    moepress.compress_checkpoint(source, tmp_path / "target", plan=moepress.Plan.from_json(plan.to_json()))
    assert fingerprint(tmp_path / "target")["model.safetensors"] == fingerprint(target)["model.safetensors"]


def test_kept_weights_stay_and_are_walked_with(made: Made, tiny: Tiny, tmp_path: Path) -> None:
    source, stats, _ = made("mixtral")
    settings = replace(SETTINGS, keep=("expert",))
    moepress.compress_checkpoint(source, tmp_path / "target", settings, statistics=stats)
    found, original = read_all(tmp_path / "target"), read_all(source)
    experts = [name for name in original if ".experts." in name]
    assert experts and all(torch.equal(found[name], original[name]) for name in experts)
    assert verify_problems(tmp_path / "target") == ()


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_damaged_source_is_named_and_nothing_is_left(tiny: Tiny, tmp_path: Path, name: str) -> None:
    tensor = read_all(tiny("olmoe"))[name].clone()
    tensor.view(-1)[3] = float("nan")
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {name: tensor})
    stats = write_stats(tmp_path / "stats", source)
    for settings in (SETTINGS, moepress.Settings(method="hqq", ranks="uniform-4", group_size=32)):
        with pytest.raises(CheckpointError, match=f"{name} holds 1 NaN and 0 Inf"):
            moepress.compress_checkpoint(source, tmp_path / "target", settings, statistics=stats)
        assert left_behind(tmp_path / "target") == []


def test_a_damaged_weight_that_is_kept_is_named_too(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {name: torch.full((32, 64), torch.inf).bfloat16()})
    stats, settings = write_stats(tmp_path / "stats", source), replace(SETTINGS, keep=("attn",))
    with pytest.raises(CheckpointError, match=f"{name} holds 0 NaN and 2048 Inf"):
        moepress.compress_checkpoint(source, tmp_path / "target", settings, statistics=stats)


def test_a_model_that_overflows_is_told(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {name: torch.full((64,), 1e30).bfloat16()})
    stats = write_stats(tmp_path / "stats", source)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.[qkv]_proj\.weight reads values .* not finite"):
        moepress.compress_checkpoint(source, tmp_path / "target", SETTINGS, statistics=stats)


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_path_on_a_gpu(family: str, made: Made, tmp_path: Path) -> None:
    source, stats, on_cpu = made(family)
    for name in ("a", "b"):
        moepress.compress_checkpoint(source, tmp_path / name, SETTINGS, statistics=stats, device="cuda")
        assert verify_problems(tmp_path / name) == ()
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    ours, theirs = (moepress.verify_checkpoint(each, against=source).errors for each in (tmp_path / "a", on_cpu))
    assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=0.02)
