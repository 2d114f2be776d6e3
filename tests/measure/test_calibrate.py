# SPDX-License-Identifier: Apache-2.0
"""Calibration's numbers, from the folder it writes, against the whole model watched by plain hooks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from walking import TOKENS, change, load, moment, plain_inputs, watching, window_ids

from moepress.errors import CalibrationError, CheckpointError, ResumeError
from moepress.format.weight import affine
from moepress.graph.view import ROUTED, WeightRef
from moepress.measure.calibrate import calibrate
from moepress.measure.calibration import CalibrationSettings
from moepress.measure.corpus import evenly
from moepress.measure.gradients import predicted_loss
from moepress.measure.probe import end_factors
from moepress.measure.stats_folder import read_stats, recorded_kind
from moepress.measure.tables import batches_of, reference_rtn, usable_moment
from moepress.measure.walk import Walk
from moepress.plan.joint import plan_joint, plan_pmq
from moepress.plan.statistics import Statistics
from moepress.quantize.affine import AffineWeight
from moepress.quantize.gptq import GptqOptions, gptq, make_metric
from moepress.quantize.hqq import hqq
from moepress.quantize.rtn import rtn
from moepress.source import Source, open_source
from tiny import EXPERTS, LAYERS, edit_tensors, fingerprint, read_all

Tiny = Callable[..., Path]
LARGE = 1 << 30
SMALL = CalibrationSettings(method="rtn", bits=(2, 3), group_sizes=(32,), min_tokens=1)


def fisher(source: Source, seed: int = 3) -> dict[str, torch.Tensor]:
    """Sensitivities of the size that a model's might have; of every weight that is walked."""
    generator = torch.Generator().manual_seed(seed)
    return {
        ref.name: torch.rand(ref.shape[0], generator=generator) for ref in source.graph.weights if ref.layer < LAYERS
    }


@contextmanager
def calibrated(
    folder: Path, stats: Path, settings: CalibrationSettings = SMALL, **options: Any
) -> Iterator[tuple[Source, Statistics]]:
    with open_source(folder) as source:
        options = {"gradients": fisher(source), "memory": LARGE} | options
        yield source, calibrate(source, window_ids(), stats, settings, **options)


def quantise(method: str, weight: torch.Tensor, own: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """A weight after its quantiser, float32."""
    base: AffineWeight
    if method == "gptq":
        options = GptqOptions(sweeps=1)
        (base,) = gptq(["w"], weight.unsqueeze(0), make_metric(own.unsqueeze(0), options), [bits], size, options)
    else:
        base = {"rtn": rtn, "hqq": hqq}[method]("w", weight, bits, size)
    return affine(base.codes, base.scale, base.zero, size)


# ---------------------------------------------------------------------------------------------- predicted losses


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_every_loss_is_that_of_the_whole_model(family: str, method: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, method=method, ranks=())
    with calibrated(tiny(family), tmp_path / "stats", settings) as (source, found):
        inputs, rows = plain_inputs(load(tiny(family)), source, window_ids()), fisher(source)
        assert list(found.errors) == [ref.name for ref in source.graph.weights]
        for ref in source.graph.weights:
            own, weight = moment(*inputs[ref.name]), source.weight(ref).float()
            if f"{ref.bank}.{ref.expert}" in found.short:
                assert not own.any()
                continue
            assert list(found.errors[ref.name]) == [f"{method} b2g32", f"{method} b3g32"]
            for bits in (2, 3):
                error = quantise(method, weight, own, bits, 32) - weight
                expected = predicted_loss(error, own, rows[ref.name])
                # gptq's codes may turn on the last bit of a moment
                tolerance = 0.05 if method == "gptq" else 1e-3
                assert found.errors[ref.name][f"{method} b{bits}g32"] == pytest.approx(expected, rel=tolerance), ref


def test_widths_above_four_follow_from_four(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, bits=(3, 4, 6, 8), group_sizes=(32, 64))
    with calibrated(tiny("mixtral"), tmp_path / "stats", settings) as (source, found):
        for ref in source.graph.weights:
            assert {bits for bits, _ in settings.widths(ref)} == {3, 4}
            for size in (32, 64):
                own = {bits: found.errors[ref.name][f"rtn b{bits}g{size}"] for bits in settings.bits}
                assert own[6] == pytest.approx(1.1 * (15 / 63) ** 2 * own[4])
                assert own[8] == pytest.approx(1.1 * (15 / 255) ** 2 * own[4])


def test_widths_above_four_are_measured_where_four_is_not(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, bits=(3, 6))
    with calibrated(tiny("mixtral"), tmp_path / "stats", settings) as (source, found):
        ref = source.graph.weights[0]
        own = moment(*plain_inputs(load(tiny("mixtral")), source, window_ids())[ref.name])
        weight = source.weight(ref).float()
        expected = predicted_loss(quantise("rtn", weight, own, 6, 32) - weight, own, fisher(source)[ref.name])
        assert found.errors[ref.name]["rtn b6g32"] == pytest.approx(expected, rel=1e-3)


def test_compensated_losses_are_what_the_largest_eigenvalues_leave(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, method="hqq", ranks=(4, 16, 400))
    with calibrated(tiny("deepseek_v3"), tmp_path / "stats", settings) as (source, found):
        inputs, rows = plain_inputs(load(tiny("deepseek_v3")), source, window_ids()), fisher(source)
        for ref in source.graph.weights:
            ranks = [] if ref.group == ROUTED else [4, 16]
            labels = [f"hqq b{b}g32{r}" for b in (2, 3) for r in ("", *(f"r{rank}f4" for rank in ranks))]
            assert list(found.errors[ref.name]) == labels
            own, weight = moment(*inputs[ref.name]).double(), source.weight(ref).float()
            error = (quantise("hqq", weight, own, 3, 32) - weight).double() * rows[ref.name].sqrt().unsqueeze(1)
            values = torch.linalg.eigvalsh(error @ own @ error.T).flip(0)
            for rank in ranks:
                expected = 0.5 * (values[rank:].sum() + 0.02 * values[:rank].sum()).item()
                assert found.errors[ref.name][f"hqq b3g32r{rank}f4"] == pytest.approx(expected, rel=1e-3)


def test_local_losses_use_each_layers_own_sensitivities(tiny: Tiny, tmp_path: Path) -> None:
    with calibrated(tiny("qwen2_moe"), tmp_path / "stats", gradients=None) as (source, found):
        assert found.kind == "local"
        inputs = plain_inputs(load(tiny("qwen2_moe")), source, window_ids())
        layers = Walk(source, window_ids(), folder=tmp_path / "work").layers()
        rows = [layer.sensitivities(4, 0) for layer in layers]
        of_attention = [rows[i][f"model.layers.{i}.self_attn.o_proj.weight"].mean().item() for i in range(LAYERS)]
        factors = end_factors(of_attention)
        for ref in source.graph.weights:
            weight, own = source.weight(ref).float(), moment(*inputs[ref.name])
            error = quantise("rtn", weight, own, 3, 32) - weight
            expected = 2 * factors[ref.layer] * predicted_loss(error, own, rows[ref.layer][ref.name])
            assert found.errors[ref.name]["rtn b3g32"] == pytest.approx(expected, rel=1e-3)
    assert read_stats(tmp_path / "stats").gradients is None


def test_the_compressed_feed_reads_what_earlier_weights_became(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, feed="compressed", feed_bits=3)
    with calibrated(tiny("mixtral"), tmp_path / "stats", settings) as (source, found):
        model, rows = load(tiny("mixtral")), fisher(source)
        stages = [("attn.q", "attn.k", "attn.v"), ("attn.o",), ("expert.gate", "expert.up"), ("expert.down",)]
        for layer in range(LAYERS):
            for roles in stages:
                inputs = plain_inputs(model, source, window_ids())
                for ref in (r for r in source.graph.weights if r.layer == layer and r.role in roles):
                    weight, own = source.weight(ref).float(), moment(*inputs[ref.name])
                    error = quantise("rtn", weight, own, 2, 32) - weight
                    expected = predicted_loss(error, own, rows[ref.name])
                    assert found.errors[ref.name]["rtn b2g32"] == pytest.approx(expected, rel=2e-3), ref.name
                    change(model, source, ref, quantise("rtn", weight, own, 3, 128))
    with calibrated(tiny("mixtral"), tmp_path / "full") as (source, plain):
        first = {n for n in plain.errors if "layers.0.self_attn" in n and "o_proj" not in n}
        same = {n for n in plain.errors if plain.errors[n] == found.errors[n]}
        assert same == first


# ---------------------------------------------------------------------------------------------- PMQ


def plain_rtn(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """MC-MoE's rounding of the whole row as one group (all rows here are shorter than 128), number by number."""
    rows = []
    for row in weight.tolist():
        if bits == 1:
            size = sum(map(abs, row)) / len(row)
            rows.append([size if w >= 0 else -size for w in row])
            continue
        low, high, top = min(*row, 0.0), max(*row, 0.0), 2**bits - 1
        scale = (high - low) / top
        zero = round(-low / scale)
        rows.append([(min(max(round(w / scale) + zero, 0), top) - zero) * scale for w in row])
    return torch.tensor(rows)


def test_reference_rtn_rounds_as_the_paper_does() -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    weight[0] = weight[0].abs() + 1  # its range must still include 0
    weight[1, :50] = 0
    for bits in (1, 2, 3):
        assert torch.allclose(reference_rtn(weight, bits), plain_rtn(weight, bits), atol=1e-5)
    assert not reference_rtn(torch.zeros(2, 128), 2).any()
    wide = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    parts = [plain_rtn(part, 3) for part in wide.split(128, 1)]
    assert torch.allclose(reference_rtn(wide, 3), torch.cat(parts, 1), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("family", "block"), [("mixtral", "mlp"), ("qwen2_moe", "mlp")])
def test_expert_losses_are_changes_of_the_blocks_output(family: str, block: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, method="hqq", ranks=())
    with calibrated(tiny(family), tmp_path / "stats", settings) as (source, found):
        layer, expert = 1, 2
        refs = [r for r in source.graph.weights if r.layer == layer and r.expert == expert]
        before = outputs(load(tiny(family)), f"model.layers.{layer}.{block}")

        def loss(new: Callable[[WeightRef], torch.Tensor]) -> float:
            model = load(tiny(family))
            for ref in refs:
                change(model, source, ref, new(ref))
            return (outputs(model, f"model.layers.{layer}.{block}") - before).double().norm().item()

        (own,) = (experts[expert] for bank, experts in found.experts.items() if f"layers.{layer}." in bank)
        assert set(own.loss) == {"rtn", "hqq"} and set(own.loss["rtn"]) == {1, 2, 3}
        assert set(own.loss["hqq"]) == {1, 2, 3, 4}
        for bits, value in own.loss["rtn"].items():
            assert value == pytest.approx(loss(lambda r, b=bits: plain_rtn(source.weight(r).float(), b)), rel=1e-3)
        for bits, value in own.loss["hqq"].items():
            expected = loss(lambda r, b=bits: quantise("hqq", source.weight(r).float(), torch.empty(0), b, 128))
            assert value == pytest.approx(expected, rel=1e-3)
        inputs = plain_inputs(load(tiny(family)), source, window_ids())
        x, scale = inputs[next(r.name for r in refs if r.projection == "down")]
        assert own.tokens == len(x)
        assert own.weight_after == pytest.approx(scale.sum().item(), rel=1e-4)


def outputs(model: Any, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(out))
    model(window_ids(), use_cache=False)
    hook.remove()
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


def test_gptq_losses_come_from_gptqs_own_codes(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, method="gptq", bits=(4,), ranks=())
    with calibrated(tiny("mixtral"), tmp_path / "stats", settings) as (source, found):
        model = load(tiny("mixtral"))
        inputs = plain_inputs(model, source, window_ids())
        before = outputs(model, "model.layers.0.mlp")
        for ref in source.graph.weights:
            if ref.layer == 0 and ref.expert == 1:
                own = moment(*inputs[ref.name])
                change(model, source, ref, quantise("gptq", source.weight(ref).float(), own, 2, 128))
        expected = (outputs(model, "model.layers.0.mlp") - before).double().norm().item()
        (experts,) = (e for bank, e in found.experts.items() if "layers.0." in bank)
        assert experts[1].loss["gptq"][2] == pytest.approx(expected, rel=0.05)


# ---------------------------------------------------------------------------------------------- starved experts


def starved(tiny: Tiny, folder: Path) -> Path:
    """Of the experts in layer 1, numbers 0 and 2 never get a token."""
    bias = torch.tensor([-9.0, 9.0, -9.0, 9.0])
    return edit_tensors(tiny("deepseek_v3"), folder, {"model.layers.1.mlp.gate.e_score_correction_bias": bias})


@pytest.mark.parametrize("feed", ["full", "compressed"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_experts_without_tokens_are_named_and_have_losses(method: str, feed: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, method=method, ranks=None, feed=feed, min_tokens=0)
    with open_source(starved(tiny, tmp_path / "source")) as source:
        rows = fisher(source)
        for ref in source.graph.weights:
            if ref.expert in (0, 2):
                rows[ref.name] = torch.zeros(ref.shape[0])
        found = calibrate(source, window_ids(), tmp_path / "stats", settings, gradients=rows, memory=LARGE)
        assert found.short == ("model.layers.1.mlp.experts.0", "model.layers.1.mlp.experts.2")
        (experts,) = found.experts.values()
        assert [e.tokens for e in experts] == [0, TOKENS, 0, TOKENS]
        assert all(math.isfinite(loss) and loss > 0 for own in found.errors.values() for loss in own.values())
        assert all(e.loss["rtn"][2] == 0 for e in (experts[0], experts[2]))
        if method == "rtn" and feed == "full":
            inputs = plain_inputs(load(tmp_path / "source"), source, window_ids())
            fed = [r for r in source.graph.weights if r.role == "expert.down" and r.expert in (1, 3)]
            mean_f = sum(rows[r.name].mean().item() for r in fed) / 2
            mean_m = sum(moment(*inputs[r.name]).diagonal().mean().item() / TOKENS for r in fed) / 2
            ref = next(r for r in source.graph.weights if r.role == "expert.down" and r.expert == 2)
            weight = source.weight(ref).float()
            error = quantise("rtn", weight, torch.empty(0), 3, 32) - weight
            expected = 0.5 * error.square().sum().item() * mean_f * mean_m
            assert found.errors[ref.name]["rtn b3g32"] == pytest.approx(expected, rel=1e-3)


def test_all_experts_may_be_short(tiny: Tiny, tmp_path: Path) -> None:
    with calibrated(tiny("mixtral"), tmp_path / "stats", replace(SMALL, min_tokens=1000)) as (_, found):
        assert len(found.short) == LAYERS * EXPERTS
        assert all(math.isfinite(loss) and loss > 0 for own in found.errors.values() for loss in own.values())


def test_a_usable_moment_is_isotropic_where_tokens_are_few(tiny: Tiny, tmp_path: Path) -> None:
    with open_source(starved(tiny, tmp_path / "source")) as source:
        for layer in Walk(source, window_ids(), folder=tmp_path / "work", memory=LARGE).layers():
            for stage in layer.stages():
                assert [s for batch in batches_of(stage, "cpu") for s in batch] == stage
                for batch in batches_of(stage, "cpu"):
                    assert len({site.refs[0].shape[1] for site in batch}) == 1
                for site in stage:
                    own = usable_moment(site, stage)
                    if site.refs[0].expert not in (0, 2):
                        assert own is site.moment
                        continue
                    fed = [s.moment.diagonal().mean().item() / s.tokens for s in stage if s.tokens]
                    assert torch.allclose(own, torch.eye(len(own)) * sum(fed) / len(fed), rtol=1e-4)
                    assert torch.equal(usable_moment(site, [site]), torch.eye(len(own)))


# ---------------------------------------------------------------------------------------------- layers not walked


def test_a_next_token_layer_gets_a_menu_from_the_last_walked_one(tiny: Tiny, tmp_path: Path) -> None:
    own = {n: t for n, t in read_all(tiny("deepseek_v3")).items() if n.startswith("model.layers.1.")}
    extra: dict[str, torch.Tensor | None] = {n.replace("layers.1.", "layers.2."): t * 3 for n, t in own.items()}
    extra["model.layers.2.eh_proj.weight"] = torch.ones(64, 128).bfloat16()
    folder = edit_tensors(tiny("deepseek_v3"), tmp_path / "source", extra)
    for kind in ("fisher", "local"):
        options = {} if kind == "fisher" else {"gradients": None}
        with calibrated(folder, tmp_path / kind, replace(SMALL, method="gptq", ranks=(4,)), **options) as (src, found):
            assert found.settings["unwalked"] == [2]
            assert set(found.errors) == {ref.name for ref in src.graph.weights}
            for role in {ref.role for ref in src.graph.weights if ref.layer == 2}:
                means = [
                    sum(sum(found.errors[r.name].values()) for r in refs) / len(refs)
                    for refs in ([r for r in src.graph.weights if r.layer == n and r.role == role] for n in (1, 2))
                ]
                assert means[1] == pytest.approx(means[0])
            name = "model.layers.2.self_attn.o_proj.weight"
            losses = found.errors[name]
            assert losses["gptq b2g32"] > losses["gptq b2g32r4f4"] > losses["gptq b3g32"] > losses["gptq b3g32r4f4"]
            assert found.residual[2] == found.residual[1]
            first, second = found.experts["model.layers.1.mlp.experts"], found.experts["model.layers.2.mlp.experts"]
            assert len(second) == EXPERTS and second[0] == second[3]
            assert second[0].loss["gptq"][2] == pytest.approx(sum(e.loss["gptq"][2] for e in first) / EXPERTS)
            size = 3 * sum(ref.numel for ref in src.graph.weights) // 8 * 3 // 2
            plan_joint(src.graph, src.digest, found.errors, size)
            plan_pmq(src.graph, src.digest, found, 3.0, group_size=32)


# ---------------------------------------------------------------------------------------------- the folder


def test_a_complete_folder_is_read_back(tiny: Tiny, tmp_path: Path) -> None:
    with calibrated(tiny("mixtral"), tmp_path / "stats") as (source, found):
        stats = read_stats(tmp_path / "stats")
        assert stats.statistics == found
        assert torch.equal(stats.ids, window_ids())
        assert stats.gradients is not None
        assert all(torch.equal(stats.gradients[name], rows) for name, rows in fisher(source).items())
        assert found.settings["text"] and found.settings["method"] == "rtn" and found.kind == "fisher"
        assert found.source == source.digest and found.tokens == TOKENS
    names = ["gradients.safetensors", "statistics.json", "tokens.safetensors"]
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == names
    assert recorded_kind(tmp_path / "stats") == "fisher"
    assert recorded_kind(tmp_path / "none") is None


def test_memory_changes_no_byte(tiny: Tiny, tmp_path: Path) -> None:
    settings = replace(SMALL, method="gptq", ranks=(4,), min_tokens=60)
    for memory in (0, 2_000_000, LARGE):
        with calibrated(tiny("qwen2_moe"), tmp_path / str(memory), settings, memory=memory) as (_, found):
            assert 0 < len(found.short) < EXPERTS
    assert fingerprint(tmp_path / "0") == fingerprint(tmp_path / "2000000") == fingerprint(tmp_path / str(LARGE))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "statistics.json").unlink(), r"holds no statistics.json; make one with moepress calibrate"),
        (lambda f: (f / "statistics.json").write_text("{"), "statistics.json is damaged"),
        (lambda f: (f / "tokens.safetensors").unlink(), "tokens.safetensors is missing or damaged"),
        (lambda f: (f / "tokens.safetensors").write_bytes(b"12345678"), "tokens.safetensors is missing or damaged"),
        (lambda f: (f / "gradients.safetensors").unlink(), "gradients.safetensors is missing or damaged"),
        (lambda f: save_file({"x": torch.zeros(2)}, f / "tokens.safetensors"), "holds no ids"),
        (lambda f: save_file({"ids": torch.zeros(2, 3).int()}, f / "tokens.safetensors"), "holds other ids than"),
    ],
)
def test_a_damaged_folder_is_told(spoil: Callable[[Path], Any], message: str, tiny: Tiny, tmp_path: Path) -> None:
    with calibrated(tiny("mixtral"), tmp_path / "stats"):
        spoil(tmp_path / "stats")
    with pytest.raises(CalibrationError, match=message):
        read_stats(tmp_path / "stats")


def test_an_existing_folder_needs_resume_and_the_same_run(tiny: Tiny, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    with calibrated(tiny("mixtral"), stats) as (source, found):
        before = fingerprint(stats)
        with pytest.raises(CalibrationError, match=r"exists; continue it with --resume"):
            calibrate(source, window_ids(), stats, SMALL)
        rows = fisher(source)
        assert calibrate(source, window_ids(), stats, SMALL, gradients=rows, resume=True) == found
        for settings, ids, given, message in [
            (replace(SMALL, bits=(2,)), window_ids(), rows, r"bits was \[2, 3\] and is now \[2\]"),
            (SMALL, window_ids(3), rows, "windows was 4 and is now 3"),
            (SMALL, window_ids() + 1, rows, "text was "),
            (SMALL, window_ids(), None, "kind was fisher and is now local"),
        ]:
            with pytest.raises(ResumeError, match=message):
                calibrate(source, ids, stats, settings, gradients=given, resume=True)
        assert fingerprint(stats) == before
    other = edit_tensors(
        tiny("mixtral"), tmp_path / "other", {"model.layers.1.input_layernorm.weight": torch.ones(64).bfloat16()}
    )
    with pytest.raises(ResumeError, match="values was "), calibrated(other, stats, resume=True):
        pass
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    with pytest.raises(ResumeError, match=r"holds thesis.tex and no run"):
        calibrated(tiny("mixtral"), tmp_path / "foreign", resume=True).__enter__()
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_gradients_are_taken_once_and_checked(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(tiny("mixtral")) as source:
        rows, ids = fisher(source), window_ids()
        name = source.graph.weights[5].name
        for unfit, message in [
            ({**rows, name: rows[name][:-1]}, "gradients of shape"),
            ({n: r for n, r in rows.items() if n != name}, "there are none"),
            ({**rows, name: rows[name] * math.nan}, "not all finite"),
        ]:
            with pytest.raises(CalibrationError, match=message):
                calibrate(source, ids, tmp_path / "unfit", SMALL, gradients=unfit)
            assert not (tmp_path / "unfit").exists()
        calls = []

        def take() -> dict[str, torch.Tensor]:
            calls.append(1)
            return rows

        def stop(*_: Any) -> None:
            raise CheckpointError("stop here")

        monkeypatch.setattr("moepress.measure.calibrate._measure", stop)
        with pytest.raises(CheckpointError, match="stop here"):
            calibrate(source, ids, tmp_path / "stats", SMALL, gradients=take)
        monkeypatch.undo()
        with pytest.raises(CalibrationError, match=r"unfinished calibration \(0 layers done\)"):
            read_stats(tmp_path / "stats")
        with pytest.raises(ResumeError, match=rf"the gradients of {source.graph.weights[0].name} are not those"):
            calibrate(source, ids, tmp_path / "stats", SMALL, gradients=fisher(source, 4), resume=True)
        calibrate(source, ids, tmp_path / "stats", SMALL, gradients=take, resume=True)
        assert len(calls) == 1
        assert recorded_kind(tmp_path / "stats") == "fisher"


def test_a_model_that_cannot_be_walked_leaves_no_folder(tiny: Tiny, tmp_path: Path) -> None:
    with open_source(tiny("deepseek")) as source, pytest.raises(CalibrationError, match="no model class"):
        calibrate(source, window_ids(), tmp_path / "stats", SMALL)
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "milo"}, "method 'milo' is unknown; choose one of gptq, hqq, rtn"),
        ({"feed": "raw"}, "feed 'raw' is unknown"),
        ({"bits": ()}, "give each value once"),
        ({"bits": (7,)}, "bits 7 is not supported"),
        ({"feed_bits": 7}, "bits 7 is not supported"),
        ({"group_sizes": (64, 64)}, "give each value once"),
        ({"method": "rtn", "ranks": (4,)}, "rtn has no compensators"),
        ({"ranks": (0,)}, "none below 1"),
        ({"sweeps": -1}, "sweeps is -1; the least is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSettings(**given)


def test_settings_are_plain_json() -> None:
    body = CalibrationSettings().as_dict()
    assert json.loads(json.dumps(body)) == body
    assert body["ranks"] == [16, 64] and CalibrationSettings(method="rtn").ranks == ()
    assert evenly(torch.arange(10).unsqueeze(1), 4).flatten().tolist() == [0, 2, 5, 7]
    assert evenly(torch.arange(3).unsqueeze(1), 4).flatten().tolist() == [0, 1, 2]


def test_inputs_are_watched_where_they_should_be(tiny: Tiny) -> None:
    """The helper of the tests above sees one call of each module."""
    model = load(tiny("mixtral"))
    with watching({"x": model.model.layers[0].self_attn.q_proj}) as seen:
        model(window_ids(), use_cache=False)
    assert seen["x"][0].shape[:2] == window_ids().shape
