# SPDX-License-Identifier: Apache-2.0
"""The manifest survives config.json exactly, stays small, and refuses descriptions that contradict themselves."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import CheckpointError
from moepress.format.manifest import BankEntry, LinearEntry, Manifest, bank_buckets, decode_ids, encode_ids
from moepress.format.spec import WeightSpec
from strategies import module_names, shapes_for, weight_specs

linears = weight_specs().flatmap(lambda spec: st.builds(LinearEntry, st.just(spec), shapes_for(spec)))
Damage = Callable[[dict[str, Any]], Any]


@st.composite
def banks(draw: st.DrawFn) -> BankEntry:
    """Experts that draw their specs from a few, in any order."""
    count = draw(st.integers(1, 20))
    few = draw(st.lists(weight_specs(), min_size=1, max_size=4))
    chosen = st.lists(st.sampled_from(few), min_size=count, max_size=count).map(tuple)
    shapes = shapes_for(*few)
    return BankEntry(draw(shapes), draw(shapes), draw(chosen), draw(chosen))


manifests = st.builds(
    Manifest,
    st.dictionaries(module_names, linears, max_size=6),
    st.dictionaries(module_names, banks(), max_size=3),
)


def through_json(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))


def small() -> Manifest:
    low, high = WeightSpec(bits=2), WeightSpec(bits=3, rank=4, factor_bits=3)
    bank = BankEntry((96, 64), (64, 96), (low, high, high, low), (high, high, high, high))
    entry = LinearEntry(high, (64, 64))
    return Manifest({"a.q": entry, "a.k": entry, "b.q": LinearEntry(low, (32, 64))}, {"a.experts": bank})


@given(manifests)
def test_from_config_is_the_inverse_of_to_config(manifest: Manifest) -> None:
    assert Manifest.from_config(through_json(manifest.to_config())) == manifest


@given(manifests)
def test_stored_tensors_do_not_depend_on_the_order_in_the_file(manifest: Manifest) -> None:
    again = Manifest.from_config(json.loads(json.dumps(manifest.to_config(), sort_keys=True)))
    assert again.stored() == manifest.stored()


@given(banks())
def test_buckets_hold_every_expert_once_in_order(bank: BankEntry) -> None:
    for projection in ("gate", "up", "down"):
        buckets = bank.buckets(projection)
        assert sorted(e for ids in buckets.values() for e in ids) == list(range(bank.num_experts))
        for tag, ids in buckets.items():
            assert ids == sorted(ids)
            assert {bank.specs(projection)[e].tag for e in ids} == {tag}
    assert bank.buckets("gate") == bank.buckets("up")


def test_stored_lists_the_tensors_of_linears_and_buckets() -> None:
    stored = small().stored()
    assert stored["a.q.packed"] == ("U8", (64, 24))
    assert stored["a.q.v_scale"] == ("F16", (4,))
    assert stored["b.q.packed"] == ("U8", (32, 16))
    # experts 0 and 3 have 2 bits in gate and up
    assert stored["a.experts.gate.b2g64.packed"] == ("U8", (2, 96, 16))
    assert stored["a.experts.up.b3g64r4f3.u_packed"] == ("U8", (2, 144))
    assert stored["a.experts.down.b3g64r4f3.scale"] == ("F16", (4, 64, 2))
    assert "a.experts.down.b2g64.packed" not in stored
    assert len(stored) == 2 * 7 + 3 + 2 * (3 + 7) + 7


def test_bank_buckets_go_through_projections_and_tags() -> None:
    bank = small().banks["a.experts"]
    assert list(bank_buckets(bank)) == [
        ("gate", "b2g64", [0, 3]), ("gate", "b3g64r4f3", [1, 2]),
        ("up", "b2g64", [0, 3]), ("up", "b3g64r4f3", [1, 2]),
        ("down", "b3g64r4f3", [0, 1, 2, 3]),
    ]  # fmt: skip


@given(st.sets(st.integers(0, 300), min_size=1).map(sorted))
def test_decode_is_the_inverse_of_encode(ids: list[int]) -> None:
    assert decode_ids(encode_ids(ids), 301) == ids


def test_ids_are_written_as_ranges() -> None:
    assert encode_ids([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert encode_ids([]) == ""
    assert decode_ids("0-2,5,7-8", 9) == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize("text", ["", "8", "0-8", "5-3", "-1", "a", "1--2", "1,,2", "0-99999999999999999999"])
def test_ids_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.7|invalid literal"):
        decode_ids(text, 8)


def test_a_uniform_bank_takes_one_range_whatever_its_size() -> None:
    spec = WeightSpec(bits=3, rank=16, factor_bits=3)
    bank = BankEntry((768, 2048), (2048, 768), (spec,) * 128, (spec,) * 128)
    config = Manifest({}, {f"model.layers.{i}.mlp.experts": bank for i in range(48)}).to_config()
    assert config["banks"]["model.layers.5.mlp.experts"]["gate_up"]["experts"] == {"b3g64r16f3": "0-127"}
    assert len(json.dumps(config)) < 48 * 250


def test_linears_of_one_spec_and_shape_are_listed_once() -> None:
    entry = LinearEntry(WeightSpec(bits=3), (64, 64))
    config = Manifest({f"layers.{i}.q": entry for i in range(100)}, {}).to_config()
    assert len(config["linears"]) == 1 and len(config["linears"][0]["names"]) == 100


def at(*path: Any, value: Any = None, drop: bool = False) -> Damage:
    """A change to one place of a config."""

    def damage(config: dict[str, Any]) -> None:
        *inner, last = path
        for key in inner:
            config = config[key]
        if drop:
            del config[last]
        else:
            config[last] = value

    return damage


BANK = ("banks", "a.experts")
DAMAGE: dict[str, tuple[Damage, str]] = {
    "another method": (at("quant_method", value="gptq"), "quant_method is 'gptq'"),
    "no method": (at("quant_method", drop=True), "quant_method is None"),
    "a newer format": (at("format_version", value=2), "format_version is 2 and this moepress reads 1; upgrade"),
    "no format": (at("format_version", drop=True), "format_version is None"),
    "no linears": (at("linears", drop=True), "KeyError"),
    "no banks": (at("banks", drop=True), "KeyError"),
    "linears of no kind": (at("linears", value=3), "damaged"),
    "banks as a list": (at("banks", value=[1]), "damaged"),
    "a linear without names": (at("linears", 0, "names", drop=True), "damaged"),
    "names that are one text": (at("linears", 0, "names", value="abc"), "damaged"),
    "a linear listed twice": (at("linears", 0, "names", value=["a.q", "a.q"]), "a.q is listed twice"),
    "a tag of nothing": (at("linears", 0, "spec", value="b9g64"), "bits 9"),
    "a tag that is no text": (at("linears", 0, "spec", value=["b3g64"]), "not a weight spec"),
    "a shape of three": (at("linears", 0, "shape", value=[1, 2, 3]), "damaged"),
    "a shape of zero": (at("linears", 0, "shape", value=[0, 64]), "0 is not a positive dimension"),
    "a negative shape": (at("linears", 0, "shape", value=[64, -64]), "-64 is not a positive dimension"),
    "a shape with a fraction": (at("linears", 0, "shape", value=[64, 64.0]), "64.0 is not a positive dimension"),
    "a shape that is true": (at("linears", 0, "shape", value=[True, 64]), "True is not a positive dimension"),
    "a shape out of this world": (at("linears", 0, "shape", value=[2**40, 64]), "not a positive dimension"),
    "a rank too large": (at("linears", 0, "shape", value=[3, 64]), "a.q: rank 4 exceeds the smaller side"),
    "a group too large": (at("linears", 1, "shape", value=[64, 63]), "b.q: in_features 63 is smaller"),
    "a bank too narrow": (at(*BANK, "down", "shape", value=[3, 64]), "a.experts.down: rank 4 exceeds"),
    "no experts": (at(*BANK, "num_experts", value=0), "0 is not a positive dimension"),
    "too many experts": (at(*BANK, "num_experts", value=10**9), "1000000000 is not"),
    "more experts than specs": (at(*BANK, "num_experts", value=6), "a.experts: experts 4-5 have no spec"),
    "fewer experts than specs": (at(*BANK, "num_experts", value=3), "outside 0..2"),
    "two specs for one": (at(*BANK, "down", "experts", "b2g64", value="2"), "a.experts: expert 2 has two specs"),
    "a range backwards": (at(*BANK, "down", "experts", "b3g64r4f3", value="3-0"), "damaged"),
    "a range that is a number": (at(*BANK, "down", "experts", "b3g64r4f3", value=3), "damaged"),
    "no down": (at(*BANK, "down", drop=True), "damaged"),
    "experts as a list": (at(*BANK, "gate_up", "experts", value=["b2g64"]), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_description_is_refused(kind: str) -> None:
    damage, message = DAMAGE[kind]
    config = through_json(small().to_config())
    assert Manifest.from_config(copy.deepcopy(config)) == small()
    damage(config)
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_config(config)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["linears", "banks", "format_version", "quant_method"]), json_values)
def test_nothing_but_a_checkpoint_error_comes_out_of_any_json(key: str, value: Any) -> None:
    with contextlib.suppress(CheckpointError):
        Manifest.from_config(through_json(small().to_config()) | {key: value})
