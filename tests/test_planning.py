# SPDX-License-Identifier: Apache-2.0
"""From a folder and a budget to a plan, and on to files that keep to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moepress
import moepress.planning as module
from moepress.errors import CalibrationError, PlanError
from moepress.format.spec import WeightSpec, check_shape
from moepress.graph.view import ROUTED, WeightRef
from moepress.measure.corpus import windows_digest
from moepress.measure.stats_folder import STATISTICS, TOKENS
from moepress.plan.compare import NOTE
from moepress.plan.joint import Menus, plan_joint
from moepress.plan.plan import label_of
from moepress.plan.statistics import ExpertStats, Statistics
from moepress.planning import data_free_menus, plan_budget, plan_by_pmq
from moepress.source import Source, open_source
from tiny import EXPERTS, FAMILIES, FUSED, edit_json, fingerprint, tokens

Tiny = Callable[..., Path]
Planned = Callable[..., moepress.Plan]
GROUPS = (32, 64)
QUICK: dict[str, Any] = {"method": "rtn", "group_sizes": GROUPS}


@pytest.fixture(scope="module")
def sources(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """sources(family) -> its tiny checkpoint, with the experts per token that a real config.json names."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family == "deepseek" and family not in made:
            folder = tmp_path_factory.mktemp(family) / "source"
            folder.mkdir()
            for path in tiny(family).iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            edit_json(folder / "config.json", num_experts_per_tok=2)
            made[family] = folder
        return made.get(family) or tiny(family)

    return get


@pytest.fixture(scope="module")
def planned(sources: Callable[[str], Path]) -> Planned:
    """planned(family, budget, **arguments of plan_budget) -> the data-free plan; what it goes by is measured once."""
    menus: dict[str, Menus] = {}

    def get(family: str, budget: str, keep: tuple[str, ...] = (), **given: Any) -> moepress.Plan:
        key = repr((family, sorted(given.items())))
        if key not in menus:
            with open_source(sources(family)) as src:
                menus[key] = data_free_menus(src, **(QUICK | given))
        return plan_budget(sources(family), budget, keep=keep, menus=menus[key])

    return get


def bpw(plan: moepress.Plan, source: Path) -> float:
    """Bits per compressed weight, from the specs alone."""
    with open_source(source) as src:
        own = [(ref, spec) for ref in src.graph.weights if (spec := plan.weights[ref.name])]
    return 8 * sum(spec.num_bytes(*ref.shape) for ref, spec in own) / sum(ref.numel for ref, _ in own)


def loss(plan: moepress.Plan) -> float:
    return plan.notes[NOTE]["loss"]


# ---------------------------------------------------------------------------------------------- without data


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_keep_to_the_budget_and_more_of_them_lose_less(
    family: str, sources: Callable[[str], Path], planned: Planned
) -> None:
    losses = []
    for asked in (2.6, 3.0, 4.25, 8.6):
        plan = planned(family, f"{asked}bpw")
        # an item is an expert's gate and up at most, of thirty and more
        assert 0.9 * asked < bpw(plan, sources(family)) <= asked
        losses.append(loss(plan))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_no_larger_than_the_budget(
    family: str, sources: Callable[[str], Path], planned: Planned, tmp_path: Path
) -> None:
    smallest = planned(family, "2.6bpw").notes["predicted"]["file_bytes"]
    losses = []
    for number, size in enumerate((smallest, smallest + 1, int(1.15 * smallest))):
        plan = planned(family, f"{size}B")
        moepress.compress_checkpoint(sources(family), tmp_path / f"{number}", plan=plan)
        found = sum(path.stat().st_size for path in (tmp_path / f"{number}").glob("*.safetensors"))
        assert 0.9 * size < found <= size
        assert plan.notes["predicted"]["file_bytes"] == found
        losses.append(loss(plan))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe"])
def test_the_same_call_gives_the_same_plan_and_its_text_the_same_bytes(
    family: str, sources: Callable[[str], Path], planned: Planned, tmp_path: Path
) -> None:
    plan = planned(family, "3.0bpw")
    again = plan_budget(sources(family), "3.0bpw", **QUICK)
    assert again == plan and again.to_json() == plan.to_json()
    read = moepress.Plan.from_json(plan.to_json())
    assert (read.weights, read.methods, read.digest()) == (plan.weights, plan.methods, plan.digest())
    for name, own in (("plan", plan), ("text", read)):
        moepress.compress_checkpoint(sources(family), tmp_path / name / "target", plan=own)
    assert fingerprint(tmp_path / "plan") == fingerprint(tmp_path / "text")
    assert moepress.verify_checkpoint(tmp_path / "text" / "target").problems == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_kept(family: str, sources: Callable[[str], Path], planned: Planned) -> None:
    for keep in (("attn",), ("expert",), ("*layers.1.*",)):
        plan = planned(family, "4.0bpw", keep=keep)
        with open_source(sources(family)) as src:
            wanted = {
                ref.name for ref in src.graph.weights
                if ref.group in keep or (keep == ("*layers.1.*",) and ref.layer == 1)
            }  # fmt: skip
        assert {name for name, spec in plan.weights.items() if spec is None} == wanted
        assert 3.6 < bpw(plan, sources(family)) <= 4.0


def test_the_menu_is_what_was_asked_for(sources: Callable[[str], Path], planned: Planned) -> None:
    plan = planned("olmoe", "3.2bpw", method="hqq", bits=(2, 4), group_sizes=(64,))
    assert {spec.tag for spec in plan.weights.values() if spec} == {"b2g64", "b4g64"}
    assert plan.method == "hqq" and not plan.methods


def test_no_group_is_larger_than_a_row(sources: Callable[[str], Path], planned: Planned) -> None:
    plan = planned("deepseek_v3", "3.0bpw", group_sizes=(32, 128))
    with open_source(sources("deepseek_v3")) as src:
        sizes = {(ref.shape[1] < 128, spec.group_size) for ref in src.graph.weights if (spec := plan.weights[ref.name])}
    assert (True, 32) in sizes and (False, 128) in sizes and (True, 128) not in sizes


def test_weights_that_lose_more_get_more(sources: Callable[[str], Path], planned: Planned) -> None:
    plan, found = planned("mixtral", "3.0bpw"), {}
    with open_source(sources("mixtral")) as src:
        for ref in src.graph.weights:
            spec = plan.weights[ref.name]
            assert spec
            found.setdefault(ref.role, []).append(8 * spec.num_bytes(*ref.shape) / ref.numel)
    mean = {role: sum(own) / len(own) for role, own in found.items()}
    assert mean["attn.v"] > mean["attn.q"] > mean["expert.gate"]


@pytest.mark.parametrize(("budget", "given", "words"), [
    ("1.0bpw", {}, r"budget"),
    ("1000B", {}, r"budget 1000B is 1,000 bytes, and what is kept .* already"),
    ("much", {}, r"budget 'much' is not understood"),
    ("3bpw", {"keep": ("nothing*",)}, r"--keep 'nothing\*' matches no weight"),
    ("3bpw", {"keep": ("attn", "expert")}, r"no weight to compress"),
    ("3bpw", {"method": "gptq"}, r"method gptq needs statistics"),
    ("3bpw", {"group_sizes": (128,)}, r"none of the \d labels offered fits shape .*smaller group size"),
])  # fmt: skip
def test_what_cannot_be_planned_is_told(
    budget: str, given: dict[str, Any], words: str, sources: Callable[[str], Path]
) -> None:
    with pytest.raises(PlanError, match=words):
        plan_budget(sources("olmoe"), budget, **(QUICK | given))


def test_a_config_without_top_k_is_told(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match="num_experts_per_tok"):
        plan_budget(tiny("deepseek"), "3bpw", **QUICK)


def test_a_budget_just_out_of_reach_is_told_at_once(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    least = planned("olmoe", "3.0bpw", bits=(2,), group_sizes=(32,)).notes["predicted"]["file_bytes"]
    assert planned("olmoe", f"{least}B", bits=(2,), group_sizes=(32,))
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(module, "plan_joint", lambda *a, **k: calls.append(a) or plan_joint(*a, **k))
        with pytest.raises(PlanError, match="budget"):
            planned("olmoe", f"{least - 1}B", bits=(2,), group_sizes=(32,))
    assert len(calls) == 2, "a plan that is a byte too large is not made again for every byte of the headers"


# ---------------------------------------------------------------------------------------------- with statistics


def statistics_of(src: Source, method: str = "gptq", ids: torch.Tensor | None = None) -> Statistics:
    """Hand-made: a weight's loss falls by 4 a bit; layer 1 and expert 2 count for more than the others."""
    banks = {ref.bank: ref.layer for ref in src.graph.weights if ref.bank}

    def size(ref: WeightRef) -> float:
        return (1 + 9 * (ref.layer == 1)) * (1 + 99 * (ref.expert == 2)) * ref.numel

    def menu(ref: WeightRef) -> Mapping[str, float]:
        specs = [WeightSpec(bits=bits, group_size=32) for bits in (1, 2, 3, 4)]
        if ref.group != ROUTED:
            specs.append(WeightSpec(bits=3, group_size=32, rank=4, factor_bits=4))
        return {label_of(method, spec): size(ref) / 4**spec.bits / (1 + spec.rank) for spec in specs}

    def expert(number: int) -> ExpertStats:
        losses = {bits: (10.0 if number == 2 else 1.0) / 4**bits for bits in (1, 2, 3, 4)}
        return ExpertStats(
            tokens=64 + number, weight_before=1.0, weight_after=1.0, loss={"rtn": losses, "gptq": losses}
        )

    ids = tokens(8, 32) if ids is None else ids
    return Statistics(
        source=src.digest, tokens=ids.numel(), settings={"text": windows_digest(ids)},
        experts={bank: tuple(expert(i) for i in range(EXPERTS)) for bank in banks if bank},
        errors={ref.name: menu(ref) for ref in src.graph.weights},
        residual={layer: 1.0 + layer for layer in banks.values()}, short=(), kind="local",
    )  # fmt: skip


@pytest.fixture(scope="module")
def stats(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """stats(family) -> a folder of hand-made statistics. Never write into it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("stats")
            with open_source(sources(family)) as src:
                (made[family] / STATISTICS).write_text(statistics_of(src).to_json())
            save_file({"ids": tokens(8, 32).int()}, made[family] / TOKENS)
        return made[family]

    return get


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", *FUSED])
def test_measured_losses_decide(
    family: str, sources: Callable[[str], Path], stats: Callable[[str], Path], tmp_path: Path
) -> None:
    source, folder = sources(family), stats(family)
    plan = plan_budget(source, "2.8bpw", statistics=folder)
    assert bpw(plan, source) <= 2.8
    assert plan.method == "gptq" and plan.statistics == str(folder.resolve())
    with open_source(source) as src:
        errors = statistics_of(src).errors
        chosen = sum(errors[name][label_of(plan.method_of(name), spec)] for name, spec in plan.weights.items() if spec)
        assert loss(plan) == pytest.approx(chosen)
        bits = {}
        for ref in src.graph.weights:
            spec = plan.weights[ref.name]
            assert spec
            check_shape(ref.name, spec, *ref.shape)
            if ref.expert is not None:
                bits.setdefault(ref.expert == 2, []).append(spec.bits)
    assert min(bits[True]) > max(bits[False])
    read = moepress.Plan.from_json(plan.to_json())
    assert (read.statistics, read.digest()) == (plan.statistics, plan.digest())
    # and the plan's text is all that compressing needs
    result = moepress.compress_checkpoint(source, tmp_path / "target", plan=read)
    assert dict(result.summary) == plan.notes["predicted"]
    assert moepress.verify_checkpoint(tmp_path / "target").problems == ()


def test_a_method_that_was_not_measured_is_told(sources: Callable[[str], Path], stats: Callable[[str], Path]) -> None:
    plan = plan_budget(sources("mixtral"), "2.8bpw", statistics=stats("mixtral"), method="gptq")
    assert plan == plan_budget(sources("mixtral"), "2.8bpw", statistics=stats("mixtral"))
    with pytest.raises(PlanError, match="no errors of method hqq, only of gptq"):
        plan_budget(sources("mixtral"), "2.8bpw", statistics=stats("mixtral"), method="hqq")


def test_statistics_of_another_model_are_refused(
    sources: Callable[[str], Path], stats: Callable[[str], Path], tmp_path: Path
) -> None:
    calls: list[Callable[..., Any]] = [
        lambda folder: plan_budget(sources("olmoe"), "3bpw", statistics=folder),
        lambda folder: plan_by_pmq(sources("olmoe"), 2.5, statistics=folder),
    ]
    for call in calls:
        with pytest.raises(PlanError, match="statistics of a source with digest"):
            call(stats("mixtral"))
        with pytest.raises(CalibrationError, match="holds no statistics"):
            call(tmp_path)


def test_pmq_from_end_to_end(sources: Callable[[str], Path], stats: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources("mixtral")
    plan = plan_by_pmq(source, 2.5, statistics=stats("mixtral"), group_size=32)
    with open_source(source) as src:
        by_expert: dict[tuple[int, int], set[int]] = {}
        for ref in src.graph.weights:
            spec = plan.weights[ref.name]
            assert spec and spec.group_size == 32
            if ref.expert is None:
                assert spec.bits == 4
            else:
                by_expert.setdefault((ref.layer, ref.expert), set()).add(spec.bits)
    assert all(len(own) == 1 for own in by_expert.values())
    widths = {key: min(own) for key, own in by_expert.items()}
    assert all(widths[layer, 2] == 3 for layer in (0, 1)) and set(widths.values()) >= {2, 3}
    assert plan.notes[NOTE]["mean_bits"] == pytest.approx(2.5, abs=0.15)
    read = moepress.Plan.from_json(plan.to_json())
    assert read.statistics == str(stats("mixtral").resolve())
    result = moepress.compress_checkpoint(source, tmp_path / "target", plan=read)
    assert dict(result.summary) == plan.notes["predicted"]
    assert moepress.verify_checkpoint(tmp_path / "target").problems == ()
    kept = plan_by_pmq(source, 2.5, statistics=stats("mixtral"), group_size=32, keep=("attn",), experts_only=True)
    assert {name for name, spec in kept.weights.items() if spec is None} == {
        n for n in kept.weights if ".self_attn." in n
    }


def test_a_plan_by_settings_names_its_statistics_too(
    sources: Callable[[str], Path], stats: Callable[[str], Path]
) -> None:
    settings = moepress.Settings(method="gptq", bits=3, group_size=32)
    plan = moepress.plan_checkpoint(sources("mixtral"), settings, statistics=stats("mixtral"))
    assert json.loads(plan.to_json())["statistics"] == str(stats("mixtral").resolve())
    assert "statistics" not in json.loads(replace(plan, statistics="").to_json())
    assert replace(plan, statistics="").digest() == plan.digest()
