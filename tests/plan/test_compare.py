# SPDX-License-Identifier: Apache-2.0
"""Plans in numbers and side by side: from notes while they hold, from names where not; and what the tables print."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from moepress.cli.show import show_difference, show_plan_file
from moepress.errors import PlanError
from moepress.format.spec import WeightSpec
from moepress.graph.view import ROUTED, ModelGraph
from moepress.plan.compare import allocation_note, compare_plans, describe, kind_of, summary_by_role
from moepress.plan.joint import plan_joint
from moepress.plan.plan import Plan

Mixtral = Callable[..., ModelGraph]
THREE, FOUR, RANKED = WeightSpec(bits=3), WeightSpec(bits=4), WeightSpec(bits=3, rank=16, factor_bits=4)


def plan_of(graph: ModelGraph, dense: WeightSpec | None = FOUR) -> Plan:
    weights = {ref.name: THREE if ref.group == ROUTED else dense for ref in graph.weights}
    return Plan("d", "hqq", 10, True, weights)


def noted(graph: ModelGraph, dense: WeightSpec | None = FOUR) -> Plan:
    plan = plan_of(graph, dense)
    losses = {ref.name: 3.0 if ref.group == ROUTED else 1.0 for ref in graph.weights}
    note = allocation_note(plan, graph, losses, loss=sum(losses.values()), lower_bound=70.0, loss_per_byte=1e-6)
    return replace(plan, notes={"allocation": note})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.experts.5.up_proj.weight", "mlp.experts.*.up_proj"),
        ("model.layers.0.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.0.moe.input_linear.weight#7.gate", "moe.input_linear.gate"),
    ],
)
def test_kinds_are_names_without_numbers(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_numbers_by_role_are_exact(mixtral: Mixtral) -> None:
    graph = mixtral()
    rows = {row.name: row for row in summary_by_role(plan_of(graph), graph)}
    assert list(rows) == ["attn.q", "attn.k", "attn.v", "attn.o", "expert.gate", "expert.up", "expert.down"]
    down = rows["expert.down"]
    assert (down.matrices, down.weights, down.labels) == (8, 8 * 128 * 256, {"hqq b3g64": 8})
    assert down.bytes == 8 * THREE.num_bytes(128, 256) and down.bpw == 3.5
    assert (down.widths, down.ranks, down.loss, down.share) == ({3: 8}, {0: 8}, None, None)
    kept = summary_by_role(plan_of(graph, None), graph)[0]
    assert (kept.labels, kept.widths, kept.weights, kept.bytes, kept.bpw) == ({"keep": 2}, {}, 0, 0, None)


def test_notes_tell_what_the_graph_would_while_they_hold(mixtral: Mixtral) -> None:
    graph = mixtral()
    plan = Plan.from_json(noted(graph, RANKED).to_json())
    found = describe(plan)
    losses = {ref.name: 3.0 if ref.group == ROUTED else 1.0 for ref in graph.weights}
    assert found.rows == summary_by_role(plan, graph, losses)
    assert found.bytes == sum(row.bytes or 0 for row in found.rows)
    assert (found.loss, found.edited, found.facts["lower_bound"]) == (80.0, False, 70.0)
    assert found.rows[0].ranks == {16: 2} and sum(row.share or 0 for row in found.rows) == pytest.approx(1)


def test_an_edited_plan_is_counted_not_believed(mixtral: Mixtral) -> None:
    graph = mixtral()
    plan = noted(graph)
    first = graph.weights[0].name
    edited = replace(plan, weights={**plan.weights, first: THREE})
    found = describe(edited)
    assert (found.edited, found.bytes, found.loss, dict(found.facts)) == (True, None, None, {})
    assert {row.name: row.labels for row in found.rows}["self_attn.q_proj"] == {"hqq b3g64": 1, "hqq b4g64": 1}
    with_graph = describe(edited, graph)
    assert with_graph.edited and with_graph.rows == summary_by_role(edited, graph)
    plain = describe(plan_of(graph))
    assert not plain.edited and plain.bytes is None
    assert describe(plan_of(graph), graph).bytes == describe(plan).bytes


def test_damaged_notes_are_told(mixtral: Mixtral) -> None:
    plan = noted(mixtral())
    note = dict(plan.notes["allocation"])
    for broken in ({"roles": []}, {"roles": {"attn.q": {}}}, {"bytes": None}):
        with pytest.raises(PlanError, match="its notes on the allocation are damaged"):
            describe(replace(plan, notes={"allocation": note | broken}))
    assert not describe(replace(plan, notes={"allocation": "none"})).edited


def test_differences_are_listed_and_counted(mixtral: Mixtral) -> None:
    graph = mixtral()
    old = noted(graph)
    names = [ref.name for ref in graph.weights if ref.role == "expert.down"]
    new = replace(old, weights={**old.weights, **dict.fromkeys(names[:3], FOUR), names[3]: None}, iterations=3)
    found = compare_plans(old, new)
    assert found.changed == (*((name, "hqq b3g64", "hqq b4g64") for name in names[:3]), (names[3], "hqq b3g64", "keep"))
    assert found.moved == {"block_sparse_moe.experts.*.w2": {("hqq b3g64", "hqq b4g64"): 3, ("hqq b3g64", "keep"): 1}}
    assert found.heads == {"iterations": (10, 3)}
    assert found.bytes == (describe(old).bytes, None)
    assert compare_plans(old, new, graph).bytes[1] is not None
    assert not compare_plans(old, old).changed and not compare_plans(old, old).heads


def test_a_method_is_part_of_the_difference(mixtral: Mixtral) -> None:
    graph = mixtral()
    plan = plan_of(graph)
    name = graph.weights[0].name
    assert compare_plans(plan, replace(plan, methods={name: "rtn"})).changed == ((name, "hqq b4g64", "rtn b4g64"),)
    # another default, every weight's method spelt out: the same decisions
    same = replace(plan, method="rtn", methods=dict.fromkeys(plan.weights, "hqq"))
    assert compare_plans(plan, same).changed == ()
    assert len(compare_plans(plan, replace(plan, method="rtn")).changed) == len(graph.weights)
    fewer = replace(plan, weights={n: s for n, s in plan.weights.items() if n != name})
    assert compare_plans(plan, fewer).changed == ((name, "hqq b4g64", "absent"),)


def test_a_plan_file_is_shown_by_role(mixtral: Mixtral, capsys: pytest.CaptureFixture[str]) -> None:
    graph = mixtral()
    body = show_plan_file(noted(graph, RANKED))
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("expert.down"))
    assert row.split() == ["expert.down", "8", "3", "hqq", "0.1", "MiB", "3.500", "24", "(30.0%)"]
    assert "predicted loss 80, at least 70 at this size; one more MiB would save 1.05" in out
    assert body["roles"]["attn.q"]["labels"] == {"hqq b3g64r16f4": 2} and json.dumps(body)
    edited = replace(noted(graph), weights={**noted(graph).weights, graph.weights[0].name: None})
    body = show_plan_file(edited)
    out = capsys.readouterr().out
    assert "edited since it was planned" in out and "4: 1, keep: 1" in out
    assert body["bytes"] is None and body["edited"]


def test_a_difference_is_shown_and_cut(mixtral: Mixtral, capsys: pytest.CaptureFixture[str]) -> None:
    graph = mixtral()
    old, new = noted(graph), noted(graph, RANKED)
    body = show_difference(old, new, limit=3)
    out = capsys.readouterr().out
    assert "8 weights change" in out and "and 5 more" in out
    first = graph.weights[0].name
    assert f"  {first}: hqq b4g64 -> hqq b3g64r16f4" in out
    assert len(body["changed"]) == 8 and body["bytes"] == [describe(old).bytes, describe(new).bytes]
    assert json.dumps(body)
    show_difference(old, old)
    assert "no weight changes" in capsys.readouterr().out
    show_difference(plan_of(graph), replace(new, source="e"))
    out = capsys.readouterr().out
    assert "source: d -> e" in out and "unknown -> " in out


def test_a_joint_plan_explains_itself(mixtral: Mixtral, capsys: pytest.CaptureFixture[str]) -> None:
    graph = mixtral()
    menus = {ref.name: {"gptq b2g64": 4.0, "hqq b3g64": 2.0, "gptq b4g64": 1.0} for ref in graph.weights}
    budget = sum(THREE.num_bytes(*ref.shape) for ref in graph.weights) + 12_345
    body = show_plan_file(Plan.from_json(plan_joint(graph, "d", menus, budget).to_json()))
    assert body["facts"]["by"] == "joint" and body["bytes"] <= budget
    assert "bits per weight" in capsys.readouterr().out
