# SPDX-License-Identifier: Apache-2.0
"""Statistics: JSON there and back, layers joined in any order, and everything odd refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.plan.settings import METHODS
from moepress.plan.statistics import ExpertStats, Header, LayerStatistics, Statistics
from strategies import weight_specs

HEADER = Header(source="d", tokens=512, settings={"windows": 4, "text": "corpus"}, kind="fisher")

numbers = st.floats(0, allow_infinity=False, allow_nan=False)
names = st.text(max_size=8)
labels = st.builds(lambda spec: f"{METHODS[1]} {spec.tag}", weight_specs())
experts = st.builds(
    ExpertStats,
    tokens=st.integers(0, 10**9),
    weight_before=numbers,
    weight_after=numbers,
    loss=st.dictionaries(names, st.dictionaries(st.integers(1, 8), numbers, max_size=3), max_size=2),
)


@st.composite
def layers_of(draw: st.DrawFn) -> LayerStatistics:
    layer = draw(st.integers(0, 99_999))
    bank = st.dictionaries(st.just(f"layers.{layer}.experts"), st.lists(experts, max_size=3).map(tuple))
    weight_names = names.map(lambda name: f"layers.{layer}.{name}")
    return LayerStatistics(
        layer=layer,
        experts=draw(bank),
        errors=draw(st.dictionaries(weight_names, st.dictionaries(labels, numbers, max_size=3), max_size=3)),
        residual=draw(numbers),
        short=tuple(draw(st.lists(names, max_size=2))),
    )


layer_lists = st.lists(layers_of(), max_size=4, unique_by=lambda part: part.layer)


@given(layers_of())
def test_a_layer_survives_its_json(part: LayerStatistics) -> None:
    assert LayerStatistics.from_json(part.to_json()) == part


@given(layer_lists, st.randoms(use_true_random=False))
def test_joined_statistics_survive_their_json_in_any_order(parts: list[LayerStatistics], draw: Any) -> None:
    joined = Statistics.join(parts, HEADER)
    again = Statistics.from_json(joined.to_json())
    assert again == joined and again.digest() == joined.digest()
    shuffled = Statistics.join(draw.sample(parts, len(parts)), HEADER)
    assert shuffled.to_json() == joined.to_json()
    assert list(joined.residual) == sorted(part.layer for part in parts)


def sample(layer: int = 0) -> LayerStatistics:
    seen = ExpertStats(tokens=3, weight_before=1.0, weight_after=1.5, loss={"rtn": {1: 3.0, 2: 1.0}})
    return LayerStatistics(
        layer=layer,
        experts={f"layers.{layer}.experts": (seen, seen)},
        errors={f"layers.{layer}.q": {"hqq b3g64": 0.5, "hqq b4g64r16f4": 0.1}},
        residual=2.0,
        short=(f"layers.{layer}.experts.1",),
    )


def test_the_parts_of_all_layers_are_there() -> None:
    joined = Statistics.join([sample(1), sample(0)], HEADER)
    assert (joined.source, joined.tokens, joined.kind) == ("d", 512, "fisher")
    assert joined.settings == HEADER.settings
    assert list(joined.experts) == ["layers.0.experts", "layers.1.experts"]
    assert joined.errors["layers.1.q"]["hqq b4g64r16f4"] == 0.1
    assert joined.residual == {0: 2.0, 1: 2.0}
    assert joined.short == ("layers.0.experts.1", "layers.1.experts.1")


def test_nothing_may_be_told_twice() -> None:
    with pytest.raises(PlanError, match="statistics tell of layer 3 twice"):
        Statistics.join([sample(3), sample(3)], HEADER)
    with pytest.raises(PlanError, match=r"statistics tell of bank 'layers\.3\.experts' twice"):
        Statistics.join([sample(3), replace(sample(4), experts=sample(3).experts)], HEADER)
    with pytest.raises(PlanError, match=r"statistics tell of weight 'layers\.3\.q' twice"):
        Statistics.join([sample(3), replace(sample(4), errors=sample(3).errors)], HEADER)


def test_numbers_that_are_not_finite_are_not_written() -> None:
    with pytest.raises(PlanError, match="statistics cannot be written"):
        replace(sample(), residual=math.nan).to_json()


def changed(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    inner = changed(body[path[0]], path[1:], value)
    if isinstance(body, dict):
        return body | {path[0]: inner}
    return [*body[: path[0]], inner, *body[path[0] + 1 :]]


BANK = "layers.0.experts"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("moepress_statistics",), 2, "statistics version 2; this moepress reads 1"),
        (("moepress_statistics",), True, "statistics version True"),
        (("source",), 3, "source is 3, not a text"),
        (("tokens",), -1, "tokens is -1, not a whole number of at least 0"),
        (("tokens",), 1.0, "tokens is 1.0, not a whole number"),
        (("tokens",), True, "tokens is True"),
        (("settings",), [], r"settings is \[\], not an object"),
        (("kind",), None, "kind is None, not a text"),
        (("residual",), {"-1": 1.0}, "residual: key is '-1', not a whole number"),
        (("residual",), {"01": 1.0}, "residual: key is '01'"),
        (("residual",), {"²": 1.0}, "residual: key is '²'"),
        (("residual", "0"), math.inf, "residual is inf, not a finite number of at least 0"),
        (("residual", "0"), "1", "residual is '1', not a finite"),
        (("short",), "abc", "short is 'abc', not a list"),
        (("short",), [1], "short is 1, not a text"),
        (("experts",), [], r"experts is \[\], not an object"),
        (("experts", BANK), {}, r"experts is \{\}, not a list"),
        (("experts", BANK, 0), {}, r"keys \['loss', 'tokens', 'weight_after', 'weight_before'\] are missing"),
        (("experts", BANK, 1, "tokens"), 2.5, "tokens is 2.5, not a whole number"),
        (("experts", BANK, 1, "weight_before"), math.nan, "weight_before is nan, not a finite"),
        (("experts", BANK, 1, "weight_after"), -0.5, "weight_after is -0.5"),
        (("experts", BANK, 1, "weight_after"), 10**400, "weight_after is 1000"),
        (("experts", BANK, 1, "loss"), None, "is None, not an object"),
        (("experts", BANK, 1, "loss", "rtn"), {"two": 1.0}, "key is 'two', not a whole number"),
        (("experts", BANK, 1, "loss", "rtn", "2"), None, "is None, not a finite"),
        (("errors", "layers.0.q"), 1.0, "is 1.0, not an object"),
        (("errors", "layers.0.q"), {"b3g64": 1.0}, "'b3g64' is not a method and a spec"),
        (("errors", "layers.0.q"), {"hqq b9g64": 1.0}, "bits 9 is not supported"),
        (("errors", "layers.0.q"), {"hqq b3g64": -1.0}, r"layers.0.q: hqq b3g64 is -1\.0, not a finite"),
        (("errors", "layers.0.q"), {"hqq b3g64": True}, "is True, not a finite"),
    ],
)
def test_odd_values_are_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    body = json.loads(Statistics.join([sample()], HEADER).to_json())
    with pytest.raises(PlanError, match=message):
        Statistics.from_json(json.dumps(changed(body, path, value)))


@pytest.mark.parametrize("read", [Statistics.from_json, LayerStatistics.from_json])
@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "null", "{", '{"a": 1, "a": 1}', "[" * 100_000, '{"layer": 0}'])
def test_other_files_are_refused(read: Callable[[str], Any], text: str) -> None:
    with pytest.raises(PlanError, match="statistics"):
        read(text)


def test_keys_are_just_those_that_are_written() -> None:
    body = json.loads(sample().to_json())
    with pytest.raises(PlanError, match=r"keys \[\] are missing and \['extra'\] are unknown"):
        LayerStatistics.from_json(json.dumps(body | {"extra": 1}))
    del body["residual"]
    with pytest.raises(PlanError, match=r"keys \['residual'\] are missing"):
        LayerStatistics.from_json(json.dumps(body))
    with pytest.raises(PlanError, match="moepress_statistics is missing"):
        Statistics.from_json(sample().to_json())
