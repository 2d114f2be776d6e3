# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with the input is one error that says what, before or without leaving anything behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moepress
from moepress import Plan, Settings, WeightSpec
from moepress.errors import CheckpointError, MoepressError, PlanError
from moepress.source import open_source
from tiny import EXPERTS, edit_json, edit_tensors, fingerprint, left_behind, read_all

Tiny = Callable[..., Path]
Copy = Callable[[Path], Path]
HQQ = Settings(method="hqq")
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def refuses(source: Path, target: Path, kind: type[MoepressError], words: str, **arguments: Any) -> str:
    """compress_checkpoint raises this, leaves nothing of the target, and does not touch the source."""
    before = fingerprint(source) if source.is_dir() else {}
    arguments = arguments or {"settings": HQQ}
    with pytest.raises(kind, match=words) as caught:
        moepress.compress_checkpoint(source, target, **arguments)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value), "the command line prints errors as one line"
    assert left_behind(target) == []
    assert before == (fingerprint(source) if source.is_dir() else {})
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("nans", "infs"), [(1, 0), (0, 1), (3, 2), (64 * 64, 0)])
@pytest.mark.parametrize(
    "settings", [HQQ, Settings(ranks="uniform-4"), Settings(method="rtn"), Settings(ranks="kurtosis-4")]
)
def test_nan_and_inf_are_counted_and_named(
    tiny: Tiny, tmp_path: Path, settings: Settings, nans: int, infs: int
) -> None:
    weight = read_all(tiny("olmoe"))[EXPERT].clone()
    weight.view(-1)[:nans] = float("nan")
    weight.view(-1)[nans : nans + infs] = float("inf")
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {EXPERT: weight})
    words = f"{EXPERT} holds {nans} NaN and {infs} Inf of 4096 values".replace(".", r"\.")
    refuses(source, tmp_path / "target", CheckpointError, words, settings=settings)


def test_inf_of_both_signs_and_nan_in_fp8_scales_are_found(tiny: Tiny, tmp_path: Path) -> None:
    weight = read_all(tiny("olmoe"))[EXPERT].clone()
    weight[0, 0], weight[5, 5] = float("inf"), float("-inf")
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {EXPERT: weight})
    refuses(source, tmp_path / "target", CheckpointError, "holds 0 NaN and 2 Inf")
    change = {
        EXPERT: torch.zeros(64, 64).to(torch.float8_e4m3fn),
        f"{EXPERT}_scale_inv": torch.full((1, 1), float("nan")),
    }
    source = edit_tensors(tiny("olmoe"), tmp_path / "fp8", dict(change))
    refuses(source, tmp_path / "target", CheckpointError, "holds 4096 NaN and 0 Inf")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"])
def test_kept_tensors_must_be_finite_too(tiny: Tiny, tmp_path: Path, name: str) -> None:
    tensor = read_all(tiny("olmoe"))[name].clone()
    tensor.view(-1)[3] = float("nan")
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {name: tensor})
    refuses(source, tmp_path / "target", CheckpointError, f"{name} holds 1 NaN and 0 Inf")


@pytest.mark.parametrize("value", [3e38, 1e9])
def test_finite_values_beyond_fp16_are_told(tiny: Tiny, tmp_path: Path, value: float) -> None:
    weight = read_all(tiny("olmoe"))[EXPERT].clone()
    weight[0, 0], weight[0, 1] = value, -value
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {EXPERT: weight})
    refuses(source, tmp_path / "target", CheckpointError, rf"{EXPERT}: a (scale|zero) of .* does not fit fp16.*--keep")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float64, torch.float8_e5m2, torch.bool])
def test_weights_of_other_dtypes_are_named(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {EXPERT: torch.zeros(64, 64).to(dtype)})
    refuses(source, tmp_path / "target", CheckpointError, rf"{EXPERT} has dtype \w+; supported: .*'BF16'")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_kept_tensors_may_have_any_dtype(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    extra = torch.tensor([0, 1, 1, 0]).to(dtype)
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {"model.layers.0.extra": extra})
    moepress.compress_checkpoint(source, tmp_path / "target", HQQ)
    found = read_all(tmp_path / "target")["model.layers.0.extra"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), extra.view(torch.uint8))


@pytest.mark.parametrize("value", [0.0, 0.25, 1e-30])
@pytest.mark.parametrize("settings", [HQQ, Settings(ranks="uniform-4", factor_bits=4), Settings(ranks="kurtosis-4")])
def test_constant_weights_are_no_error(tiny: Tiny, tmp_path: Path, settings: Settings, value: float) -> None:
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", {EXPERT: torch.full((64, 64), value).bfloat16()})
    result = moepress.compress_checkpoint(source, tmp_path / "target", settings)
    assert result.errors[EXPERT] <= (1.0 if value == 1e-30 else 1e-3)
    assert not moepress.verify_checkpoint(tmp_path / "target", source).problems


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("model_type", ["llama", "", None, 5, ["mixtral"], {"mixtral": 1}])
def test_an_unknown_model_type_is_told_with_those_known(
    tiny: Tiny, copy_of: Copy, tmp_path: Path, model_type: Any
) -> None:
    source = copy_of(tiny("olmoe"))
    edit_json(source / "config.json", model_type=model_type)
    said = refuses(source, tmp_path / "target", CheckpointError, "which moepress does not know; known: deepseek, ")
    assert repr(model_type) in said


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", None])
def test_a_quantised_source_is_refused(tiny: Tiny, copy_of: Copy, tmp_path: Path, method: Any) -> None:
    source = copy_of(tiny("olmoe"))
    edit_json(source / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refuses(source, tmp_path / "target", CheckpointError, rf"already quantised with {method!r}; name the original")


def test_our_own_output_is_refused_as_a_source(pressed: Callable[..., Path], tmp_path: Path) -> None:
    source = pressed("olmoe", method="hqq")
    refuses(source, tmp_path / "target", CheckpointError, "already compressed by moepress; name the original")


def test_an_existing_target_stays_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("mine")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="target exists; remove it or name another target"):
            moepress.compress_checkpoint(tiny("olmoe"), target, HQQ, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["nowhere", "LICENSE"])
def test_a_source_that_is_no_folder_is_told(tiny: Tiny, tmp_path: Path, name: str) -> None:
    refuses(tiny("olmoe") / name, tmp_path / "target", CheckpointError, f"{name} is not a folder")


def test_a_folder_where_a_side_file_is_expected_is_left_out(tiny: Tiny, copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of(tiny("olmoe"))
    for name in ("README.md", "tokenizer.json", "merges.txt"):
        (source / name).mkdir()
    moepress.compress_checkpoint(source, tmp_path / "target", HQQ)
    assert not (tmp_path / "target" / "merges.txt").exists()
    assert (tmp_path / "target" / "README.md").is_file()


@pytest.mark.parametrize("depth", [-1, 0, 10**15, 2**70, True, "2", 2.5, None, [2]])
def test_any_number_of_layers_in_the_config_is_survived(tiny: Tiny, copy_of: Copy, tmp_path: Path, depth: Any) -> None:
    source = copy_of(tiny("olmoe"))
    edit_json(source / "config.json", num_hidden_layers=depth)
    if isinstance(depth, int) and depth > 2:
        refuses(source, tmp_path / "target", CheckpointError, f"config.json says {depth} layers.* of layer 2")
    else:
        with open_source(source) as src:
            assert len(src.graph.weights) == 32


def test_odd_tensor_names_are_no_error(tiny: Tiny, tmp_path: Path) -> None:
    odd = {name: torch.ones(3) for name in ("model.².x", "9" * 5000, "a." + "8" * 5000 + ".b", 'é\n"', "..", "/")}
    source = edit_tensors(tiny("olmoe"), tmp_path / "source", dict(odd))
    moepress.compress_checkpoint(source, tmp_path / "target", HQQ)
    assert set(odd) < set(read_all(tmp_path / "target"))


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(("values", "words"), [
    ({"method": "awq"}, "method 'awq' is unknown; choose one of rtn, hqq, milo, mse, gptq"),
    ({"method": "hqq", "bits": 7}, "bits 7 is not supported; choose one of 1, 2, 3"),
    ({"method": "hqq", "bits": 0}, "bits 0 is not supported"),
    ({"method": "hqq", "group_size": 48}, "group_size 48 is not supported; choose one of 32, 64, 128"),
    ({"method": "rtn", "ranks": "dense-4"}, "method rtn has no compensators"),
    ({"method": "milo"}, r"method milo without ranks \(uniform-0\) is method hqq; use --method hqq or give a rank"),
    ({"method": "milo", "ranks": "dense-0+sparse-0"}, "method milo without ranks"),
    ({"ranks": "everywhere-4"}, "rank policy 'everywhere-4' is not understood"),
    ({"ranks": "dense"}, "rank policy 'dense' is not understood"),
    ({"ranks": "dense--4"}, "rank policy 'dense--4' is not understood"),
    ({"ranks": "dense-4.5"}, "dense takes a whole number"),
    ({"ranks": "milo-kurtosis-8"}, "knows 16 and 32 only; use kurtosis-8"),
    ({"ranks": "dense-4", "factor_bits": 5}, "factor_bits 5 is not supported"),
    ({"ranks": "dense-4", "iterations": -1}, "iterations -1 is not between 0 and 1000"),
])  # fmt: skip
def test_contradictory_settings_are_refused_at_once(values: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Settings(**values)


@pytest.mark.parametrize(("values", "words"), [
    ({"rank": -1}, "rank -1 is negative"), ({"rank": 0, "factor_bits": 3}, "factor_bits 3 without a compensator"),
    ({"rank": 4, "factor_bits": 0}, "factor_bits 0 is not supported"),
])  # fmt: skip
def test_contradictory_ranks_of_a_spec_are_refused(values: dict[str, int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        WeightSpec(bits=3, **values)


def test_a_group_larger_than_the_input_names_the_weight_and_the_way_out(tiny: Tiny, tmp_path: Path) -> None:
    words = r"model\.layers\.0\..*in_features 64 is smaller than group_size 128; use --group-size 64"
    refuses(tiny("olmoe"), tmp_path / "target", PlanError, words, settings=Settings(method="hqq", group_size=128))
    words = r"b_proj\.weight: in_features 32 is smaller than group_size 64; use --group-size 32"
    refuses(tiny("deepseek_v3"), tmp_path / "target", PlanError, words, settings=HQQ)


def test_an_input_smaller_than_any_group_can_only_be_kept(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("deepseek_v3", kv_lora_rank=16)
    settings = Settings(method="hqq", group_size=32)
    words = r"kv_b_proj.*in_features 16 is smaller.*--keep 'model"
    refuses(source, tmp_path / "target", PlanError, words, settings=settings)
    moepress.compress_checkpoint(source, tmp_path / "target", replace(settings, keep=("attn.kv_b",)))


@pytest.mark.parametrize("values", [{"method": "gptq"}, {"method": "hqq", "ranks": "uniform-4"}])
def test_what_is_fitted_to_text_needs_statistics(tiny: Tiny, tmp_path: Path, values: dict[str, Any]) -> None:
    words = rf"_proj.weight \({values['method']}\) and \d+ more weights .*calibrate.*--stats stats/.*--method milo"
    refuses(tiny("olmoe"), tmp_path / "target", PlanError, words, settings=Settings(**values))
    with pytest.raises(PlanError, match="needs statistics"):
        moepress.plan_budget(tiny("olmoe"), "3bpw", method="gptq")


@pytest.mark.parametrize("pattern", ["experts", "attn.z", "*.nothing.*", ""])
def test_a_pattern_that_keeps_nothing_is_refused(tiny: Tiny, tmp_path: Path, pattern: str) -> None:
    settings = Settings(method="hqq", keep=("attn", pattern))
    words = re.escape(f"--keep {pattern!r} matches no weight; give a name pattern")
    refuses(tiny("olmoe"), tmp_path / "target", PlanError, words, settings=settings)


def test_half_a_bank_cannot_be_kept(tiny: Tiny, tmp_path: Path) -> None:
    settings = Settings(method="hqq", keep=("*layers.1.*experts.2.*",))
    words = r"layers\.1\.mlp\.experts: .*experts\.2\..*full size beside compressed experts; keep all or none"
    refuses(tiny("olmoe"), tmp_path / "target", PlanError, words, settings=settings)


def test_frequencies_must_be_given_and_cover_the_experts(tiny: Tiny, tmp_path: Path) -> None:
    settings = Settings(ranks="frequency-4")
    source, target = tiny("olmoe"), tmp_path / "target"
    refuses(source, target, PlanError, "no expert frequencies; measure them with `moepress profile", settings=settings)
    banks = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    for counts in ([1, 2, 3], [0] * EXPERTS, []):
        given: Mapping[str, list[int]] = dict.fromkeys(banks, counts)
        refuses(source, target, PlanError, "do not cover expert", settings=settings, frequencies=given)


@pytest.mark.parametrize("both", [True, False])
def test_settings_or_a_plan_but_not_both(tiny: Tiny, tmp_path: Path, both: bool) -> None:
    plan = moepress.plan_checkpoint(tiny("olmoe"), HQQ) if both else None
    arguments = {"settings": HQQ if both else None, "plan": plan}
    refuses(tiny("olmoe"), tmp_path / "target", PlanError, "either settings or a plan", **arguments)


# ---------------------------------------------------------------------------------------------- plans


def spec(**values: int) -> WeightSpec:
    return WeightSpec(**({"bits": 3, "group_size": 64} | values))


def test_a_plan_for_another_source_is_refused_with_both_digests(tiny: Tiny, tmp_path: Path) -> None:
    plan = moepress.plan_checkpoint(tiny("olmoe"), HQQ)
    other = tiny("olmoe", num_experts=8)
    with open_source(other) as src:
        words = f"digest {plan.source[:12]}, .* has {src.digest[:12]}"
    refuses(other, tmp_path / "target", PlanError, words, plan=plan)


@pytest.mark.parametrize(("change", "words"), [
    ({"model.layers.7.ghost.weight": spec()}, "plan names model.layers.7.ghost.weight, which the source does not have"),
    ({EXPERT: "gone"}, f"the plan says nothing of {EXPERT}"),
    ({EXPERT: None}, f"{EXPERT} would stay at full size beside compressed experts"),
    ({EXPERT: spec(bits=4)}, f"gate_proj.weight and {EXPERT} must share one spec .*; the plan gives b3g64 and b4g64"),
    ({EXPERT: spec(rank=4, factor_bits=3)}, "must share one spec and one method; the plan gives b3g64 and b3g64r4f3"),
    ({"model.layers.0.self_attn.q_proj.weight": spec(group_size=128)}, "q_proj.*64 is smaller than group_size 128"),
    ({"model.layers.0.self_attn.q_proj.weight": spec(rank=65, factor_bits=3)}, "rank 65 exceeds the smaller side"),
])  # fmt: skip
def test_a_plan_edited_by_hand_is_checked(tiny: Tiny, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    plan = moepress.plan_checkpoint(tiny("olmoe"), HQQ)
    weights = {name: value for name, value in (plan.weights | change).items() if value != "gone"}
    refuses(tiny("olmoe"), tmp_path / "target", PlanError, words, plan=replace(plan, weights=weights))


def test_a_plan_that_keeps_everything_is_a_copy(tiny: Tiny, tmp_path: Path) -> None:
    plan = moepress.plan_checkpoint(tiny("olmoe"), HQQ)
    result = moepress.compress_checkpoint(
        tiny("olmoe"), tmp_path / "target", plan=replace(plan, weights=dict.fromkeys(plan.weights))
    )
    assert result.errors == {}
    copied, original = read_all(tmp_path / "target"), read_all(tiny("olmoe"))
    assert set(copied) == set(original)
    assert all(torch.equal(copied[name], tensor) for name, tensor in original.items())
    assert not moepress.verify_checkpoint(tmp_path / "target", tiny("olmoe")).problems


@pytest.mark.parametrize("change", [
    {"moepress_plan": 2}, {"moepress_plan": None}, {"refit": None}, {"refit": "x"}, {"method": "awq"},
    {"method": ["hqq"]}, {"iterations": "many"}, {"iterations": float("inf")}, {"iterations": -1},
    {"iterations": 10**9},
    {"iterations": None}, {"weights": None}, {"weights": []}, {"weights": "b3g64"}, {"weights": {"a": 5}},
    {"weights": {"a": "b9g64"}}, {"weights": {"a": "b3g64r0f0"}}, {"weights": {"a": "b3g64r4"}},
    {"weights": {"a": "b03g64"}}, {"weights": {"a": "b٣g64"}}, {"notes": 5}, {"notes": None}, {"notes": ["x"]},
])  # fmt: skip
def test_a_file_that_is_no_plan_is_refused(tiny: Tiny, change: dict[str, Any]) -> None:
    body = json.loads(moepress.plan_checkpoint(tiny("olmoe"), HQQ).to_json()) | change
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(body))


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "[" * 100_000, "{}", '{"moepress_plan": 1}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a moepress plan"):
        Plan.from_json(text)


def test_a_plan_survives_its_text(tiny: Tiny) -> None:
    plan = moepress.plan_checkpoint(tiny("deepseek"), Settings(ranks="dense-8+kurtosis-2", keep=("mlp",)))
    again = Plan.from_json(plan.to_json())
    assert (again, again.digest()) == (plan, plan.digest())


# ---------------------------------------------------------------------------------------------- verify


def test_verify_wants_a_folder_of_ours(tiny: Tiny, copy_of: Copy, pressed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has no moepress\.json"):
        moepress.verify_checkpoint(tiny("olmoe"))
    with pytest.raises(CheckpointError, match=r"has no moepress\.json"):
        moepress.verify_checkpoint(tiny("olmoe") / "nowhere")


def test_verify_against_the_source_gives_the_errors_that_compression_gave(tiny: Tiny, tmp_path: Path) -> None:
    result = moepress.compress_checkpoint(
        tiny("glm4_moe"), tmp_path / "target", Settings(ranks="uniform-4", iterations=1)
    )
    found = moepress.verify_checkpoint(tmp_path / "target", tiny("glm4_moe"))
    assert found.problems == ()
    assert {name: round(error, 6) for name, error in found.errors.items()} == result.errors
    assert all(0.01 < error < 0.5 for error in found.errors.values())
    with pytest.raises(PlanError, match="was made from a source with other names or shapes"):
        moepress.verify_checkpoint(tmp_path / "target", tiny("olmoe"))


@pytest.mark.parametrize(("file", "words"), [
    ("model.safetensors", "missing|neither"), ("LICENSE", "LICENSE is missing"), ("README.md", "README.md is missing"),
])  # fmt: skip
def test_verify_finds_files_that_are_gone(pressed: Callable[..., Path], copy_of: Copy, file: str, words: str) -> None:
    folder = copy_of(pressed("olmoe", method="hqq"))
    (folder / file).unlink()
    try:
        said = " ".join(moepress.verify_checkpoint(folder).problems)
    except CheckpointError as error:
        said = str(error)
    assert any(word in said for word in words.split("|")), said


def test_verify_finds_a_tensor_that_was_swapped_for_a_valid_one(pressed: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.scale"
    folder = pressed("olmoe", method="hqq")
    edit_tensors(folder, tmp_path / "changed", {name: read_all(folder)[name] * 2})
    problems = moepress.verify_checkpoint(tmp_path / "changed").problems
    assert any(f"tensor {name} in model.safetensors has changed" in problem for problem in problems)
    edit_tensors(folder, tmp_path / "more", {"model.layers.0.extra": torch.ones(1)})
    assert any(
        "model.layers.0.extra was not written" in p for p in moepress.verify_checkpoint(tmp_path / "more").problems
    )
