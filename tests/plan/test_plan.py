# SPDX-License-Identifier: Apache-2.0
"""Plans: their text, their digest, what `make_plan` decides, and what `check_plan` refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.format.spec import WeightSpec
from moepress.graph.view import ROUTED, ModelGraph
from moepress.plan.plan import (
    COMPENSATED,
    Plan,
    check_plan,
    label_of,
    make_plan,
    manifest_of,
    parse_label,
    source_digest,
)  # fmt: skip
from moepress.plan.ranks import Evidence
from moepress.plan.settings import MAX_ITERATIONS, METHODS, Settings
from strategies import weight_specs

Mixtral = Callable[..., ModelGraph]
HQQ = Settings(method="hqq")
LOW, HIGH = WeightSpec(bits=2), WeightSpec(bits=4, group_size=32)
RANKED = WeightSpec(bits=3, rank=4, factor_bits=3)

names = st.text(st.characters(blacklist_categories=()), max_size=30)
notes = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3)


@st.composite
def plans_of(draw: st.DrawFn) -> Plan:
    """Any plan; ranks only where the weight's method has them, whatever the default is."""
    weights = draw(st.dictionaries(names, st.none() | weight_specs(), max_size=8))
    overridable = [name for name, spec in weights.items() if spec]
    methods = {name: draw(st.sampled_from(METHODS)) for name in overridable if draw(st.booleans())}
    methods = {name: method for name, method in methods.items() if method in COMPENSATED or not weights[name].rank}
    head = (draw(st.text(max_size=10)), draw(st.sampled_from(METHODS)), draw(st.integers(0, MAX_ITERATIONS)))
    return Plan(*head, draw(st.booleans()), weights, draw(notes), methods)


plans = plans_of()


@given(plans)
def test_from_json_is_the_inverse_of_to_json(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest() == plan.digest()


def test_the_text_has_one_line_a_weight() -> None:
    plan = Plan("d", "milo", 10, True, {"a": LOW, "b": None, "c": RANKED})
    lines = [line.strip() for line in plan.to_json().splitlines()]
    assert {'"a": "b2g64",', '"b": "keep",', '"c": "b3g64r4f3"'} <= set(lines)


def test_a_weight_can_have_a_method_of_its_own() -> None:
    plan = Plan("d", "milo", 10, True, {"a": LOW, "b": None, "c": LOW}, {}, {"a": "hqq", "c": "milo"})
    assert [plan.method_of(name) for name in "abc"] == ["hqq", "milo", "milo"]
    assert [plan.tag_of(name) for name in "abc"] == ["hqq b2g64", "keep", "b2g64"]
    assert plan.methods == {"a": "hqq"}  # what repeats the default is no decision
    assert '"a": "hqq b2g64"' in plan.to_json()
    assert Plan.from_json(plan.to_json().replace('"c": "', '"c": "milo ')) == plan


def test_digests_of_plans_with_one_method_stay_what_they_were() -> None:
    plan = Plan("d", "milo", 10, True, {"a": LOW, "b": None, "c": RANKED})
    text = '["d", "milo", 10, true, [["a", "b2g64"], ["b", "keep"], ["c", "b3g64r4f3"]]]'
    assert plan.digest() == hashlib.sha256(text.encode()).hexdigest()
    assert replace(plan, methods={"a": "milo"}).digest() == plan.digest()
    assert replace(plan, methods={"a": "hqq"}).digest() != plan.digest()


@pytest.mark.parametrize("name", ["b", "elsewhere"])
def test_a_method_for_what_is_not_compressed_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=f"gives {name} the method hqq but no spec; drop it from methods"):
        Plan("d", "milo", 10, True, {"a": LOW, "b": None}, {}, {name: "hqq"})


@given(weight_specs(), st.sampled_from(METHODS))
def test_parse_label_is_the_inverse_of_label_of(spec: WeightSpec, method: str) -> None:
    if spec.rank and method not in COMPENSATED:
        with pytest.raises(PlanError, match="needs one of the methods"):
            parse_label(label_of(method, spec))
    else:
        assert parse_label(label_of(method, spec)) == (method, spec)


@given(plans, st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), st.randoms(use_true_random=False))
def test_notes_and_order_do_not_enter_the_digest(plan: Plan, notes: dict[str, int], random: Any) -> None:
    shuffled = list(plan.weights.items())
    random.shuffle(shuffled)
    assert replace(plan, notes=notes, weights=dict(shuffled)).digest() == plan.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"source": "e"}, {"method": "hqq"}, {"iterations": 11}, {"refit": False}, {"weights": {"a": LOW}},
        {"weights": {"a": LOW, "b": LOW}}, {"weights": {"a": LOW, "c": None}}, {"weights": {"a": RANKED, "b": None}},
    ],
)  # fmt: skip
def test_every_decision_enters_the_digest(change: dict[str, Any]) -> None:
    plan = Plan("d", "milo", 10, True, {"a": LOW, "b": None})
    assert replace(plan, **change).digest() != plan.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moepress_plan": 2}, "plan version 2; this moepress reads 1"),
        ({"method": "awq"}, "method 'awq' is unknown; choose one of rtn, hqq, milo"),
        ({"weights": {"a": "awq b3g64"}}, "'awq b3g64' is not a method and a spec; write one of rtn, hqq, milo"),
        ({"weights": {"a": " b3g64"}}, "' b3g64' is not a method and a spec"),
        ({"weights": {"a": "hqq  b3g64"}}, "' b3g64' is not a weight spec"),
        ({"weights": {"a": "hqq keep"}}, "'keep' is not a weight spec"),
        (
            {"weights": {"a": "rtn b3g64r4f3"}},
            "rtn b3g64r4f3: rank 4 needs one of the methods milo, hqq, gptq, gptq-mcmoe, not rtn",
        ),
        ({"weights": {"a": 3}}, "3 is not a weight spec"),
        ({"iterations": 1001}, "iterations 1001 is not between 0 and 1000"),
        ({"iterations": -1}, "iterations -1 is not"),
        ({"iterations": None}, "not a moepress plan"),
        ({"refit": "no"}, "refit is 'no'"),
        ({"weights": ["a"]}, "not a moepress plan"),
        ({"weights": {"a": "b9g64"}}, "bits 9 is not supported"),
        ({"weights": {"a": "KEEP"}}, "'KEEP' is not a weight spec"),
        ({"weights": {"a": None}}, "None is not a weight spec"),
        ({"notes": 3}, "not a moepress plan"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    body = json.loads(Plan("d", "milo", 10, True, {"a": LOW}).to_json())
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(body | change))


# make_plan


def planned(graph: ModelGraph, settings: Settings = HQQ, **evidence: Any) -> Plan:
    return make_plan(graph, "digest", settings, Evidence(**evidence))


def test_every_weight_gets_the_spec_of_the_settings(mixtral: Mixtral) -> None:
    graph = mixtral()
    plan = planned(graph, Settings(method="hqq", bits=4, group_size=32))
    assert plan.weights == {ref.name: HIGH for ref in graph.weights}
    assert (plan.source, plan.method) == ("digest", "hqq")


def test_ranks_and_factor_bits_enter_the_specs(mixtral: Mixtral) -> None:
    graph = mixtral()
    plan = planned(graph, Settings(ranks="dense-6", factor_bits=8, bits=2, iterations=7, refit=False))
    dense = WeightSpec(bits=2, rank=6, factor_bits=8)
    assert plan.weights == {ref.name: LOW if ref.group == ROUTED else dense for ref in graph.weights}
    assert (plan.iterations, plan.refit) == (7, False)


@pytest.mark.parametrize(
    ("pattern", "roles"),
    [
        ("attn", {"attn.q", "attn.k", "attn.v", "attn.o"}),
        ("attention", {"attn.q", "attn.k", "attn.v", "attn.o"}),
        ("attn.q", {"attn.q"}),
        ("attn.[qk]", {"attn.q", "attn.k"}),
        ("*o_proj.weight", {"attn.o"}),
        ("expert", {"expert.gate", "expert.up", "expert.down"}),
        ("routed", {"expert.gate", "expert.up", "expert.down"}),
        ("*.w?.weight", {"expert.gate", "expert.up", "expert.down"}),
    ],
)
def test_patterns_keep_by_name_role_and_group(pattern: str, roles: set[str], mixtral: Mixtral) -> None:
    graph = mixtral()
    plan = planned(graph, Settings(method="hqq", keep=(pattern,)))
    assert {ref.role for ref in graph.weights if plan.weights[ref.name] is None} == roles
    assert {ref.role for ref in graph.weights if plan.weights[ref.name]}.isdisjoint(roles)


def test_one_layer_can_be_kept_and_its_ranks_go_nowhere(mixtral: Mixtral) -> None:
    graph = mixtral()
    settings = Settings(ranks="kurtosis-4", keep=("model.layers.0.block_sparse_moe.*",))
    plan = planned(graph, settings, kurtosis={ref.name: 0.0 for ref in graph.weights})
    for ref in graph.weights:
        expected = None if ref.group == ROUTED and ref.layer == 0 else WeightSpec(bits=3)
        if ref.group == ROUTED and ref.layer == 1:
            expected = RANKED
        assert plan.weights[ref.name] == expected, ref.name


@pytest.mark.parametrize("pattern", ["nothing", "attn.x", "", "model.layers.7.*", "ATTN"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, mixtral: Mixtral) -> None:
    with pytest.raises(PlanError, match=f"--keep '{pattern}' matches no weight".replace("*", r"\*")):
        planned(mixtral(), Settings(method="hqq", keep=("attn", pattern)))


def test_what_cannot_be_stored_is_refused_while_planning(mixtral: Mixtral) -> None:
    with pytest.raises(PlanError, match="in_features 32 is smaller than group_size 64"):
        planned(mixtral(hidden=32))
    with pytest.raises(PlanError, match="would stay at full size beside compressed experts"):
        planned(mixtral(), Settings(method="hqq", keep=("expert.down",)))


# check_plan


def test_a_plan_must_decide_every_weight_and_no_other(mixtral: Mixtral) -> None:
    graph = mixtral()
    plan = planned(graph)
    first, *rest = plan.weights
    check_plan(plan, graph)
    with pytest.raises(PlanError, match=f"says nothing of {first}; add a spec"):
        check_plan(replace(plan, weights={name: plan.weights[name] for name in rest}), graph)
    with pytest.raises(PlanError, match=r"says nothing of .*, .*, .* and \d+ more"):
        check_plan(replace(plan, weights={}), graph)
    with pytest.raises(PlanError, match=r"names lm_head\.weight, which the source does not have"):
        check_plan(replace(plan, weights={**plan.weights, "lm_head.weight": None}), graph)


def edited(graph: ModelGraph, role: str, spec: WeightSpec | None, method: str = "hqq", expert: int | None = 1) -> Plan:
    plan = replace(planned(graph), method=method)
    chosen = next(ref for ref in graph.weights if ref.role == role and (ref.expert in (None, expert)))
    return replace(plan, weights={**plan.weights, chosen.name: spec})


def test_specs_must_fit_their_weights_and_the_method(mixtral: Mixtral) -> None:
    graph = mixtral()
    with pytest.raises(PlanError, match=r"rank 129 exceeds the smaller side of its shape \(128, 128\)"):
        check_plan(edited(graph, "attn.q", replace(RANKED, rank=129), "milo"), graph)
    with pytest.raises(
        PlanError, match=r"q_proj\.weight: rank 4 needs one of the methods milo, hqq, gptq, gptq-mcmoe, not rtn"
    ):
        check_plan(edited(graph, "attn.q", RANKED, "rtn"), graph)
    for method in ("milo", "hqq", "gptq"):
        check_plan(edited(graph, "attn.q", RANKED, method), graph)
    name = next(ref.name for ref in graph.weights if ref.role == "attn.q")
    check_plan(replace(edited(graph, "attn.q", RANKED, "rtn"), methods={name: "hqq"}), graph)
    with pytest.raises(PlanError, match="rank 4 needs one of"):
        check_plan(replace(edited(graph, "attn.q", RANKED), methods={name: "rtn"}), graph)
    check_plan(edited(graph, "attn.q", None), graph)


def test_gate_and_up_share_a_spec_and_down_has_its_own(mixtral: Mixtral) -> None:
    graph = mixtral()
    for role in ("expert.gate", "expert.up"):
        with pytest.raises(
            PlanError, match=r"w1\.weight and .*w3\.weight must share one spec and one method.* gives b\dg"
        ):
            check_plan(edited(graph, role, HIGH), graph)
    check_plan(edited(graph, "expert.down", HIGH), graph)
    gate, up, down = (
        next(ref.name for ref in graph.weights if ref.role == f"expert.{x}") for x in ("gate", "up", "down")
    )
    with pytest.raises(PlanError, match=r"share one spec and one method; the plan gives rtn b3g64 and b3g64"):
        check_plan(replace(planned(graph), methods={gate: "rtn"}), graph)
    check_plan(replace(planned(graph), methods={gate: "rtn", up: "rtn", down: "milo"}), graph)


def test_a_bank_is_compressed_whole_or_not_at_all(mixtral: Mixtral) -> None:
    graph = mixtral()
    with pytest.raises(PlanError, match=r"experts: .*experts\.1\.w2\.weight would stay at full size"):
        check_plan(edited(graph, "expert.down", None), graph)
    whole = {ref.name: None if ref.group == ROUTED and ref.layer == 1 else LOW for ref in graph.weights}
    check_plan(Plan("d", "hqq", 0, True, whole), graph)


# the manifest and the source's digest


def test_the_manifest_says_what_the_plan_says(mixtral: Mixtral) -> None:
    graph = mixtral(layers=2, experts=3)
    plan = planned(graph, Settings(method="hqq", keep=("attn.k", "model.layers.1.block_sparse_moe.*")))
    plan = replace(plan, weights={**plan.weights, "model.layers.0.block_sparse_moe.experts.2.w2.weight": HIGH})
    manifest = manifest_of(plan, graph)
    assert manifest.linears.keys() == {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qvo"}
    assert manifest.banks.keys() == {"model.layers.0.block_sparse_moe.experts"}
    bank = manifest.banks["model.layers.0.block_sparse_moe.experts"]
    usual = WeightSpec(bits=3)
    assert (bank.gate_up, bank.down) == ((usual,) * 3, (usual, usual, HIGH))
    assert (bank.gate_up_shape, bank.down_shape) == ((256, 128), (128, 256))


def test_the_source_digest_is_of_names_dtypes_and_shapes() -> None:
    tensors = {"a": ("BF16", (2, 3)), "b": ("F32", (4,))}
    digest = source_digest("mixtral", tensors)
    assert digest == source_digest("mixtral", dict(reversed(tensors.items())))
    for model_type, other in [
        ("olmoe", tensors),
        ("mixtral", tensors | {"a": ("F16", (2, 3))}), ("mixtral", tensors | {"a": ("BF16", (3, 2))}),
        ("mixtral", {"a": tensors["a"], "c": tensors["b"]}), ("mixtral", {"a": tensors["a"]}),
    ]:  # fmt: skip
        assert source_digest(model_type, other) != digest
