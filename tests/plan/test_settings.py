# SPDX-License-Identifier: Apache-2.0
"""Settings refuse contradictions; presets are the papers' numbers for their models and scaled for others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moepress.errors import PlanError
from moepress.plan.settings import Settings, preset

MIXTRAL = ("mixtral", 4096, 8)
DEEPSEEK_16B = ("deepseek", 2048, 64)


@pytest.mark.parametrize(
    ("name", "model", "ranks", "iterations"),
    [
        # as published
        ("milo-s1", MIXTRAL, "dense-512+milo-kurtosis-16", 20),
        ("milo-s2", MIXTRAL, "dense-1024+milo-kurtosis-32", 20),
        ("milo-s1", DEEPSEEK_16B, "dense-800", 10),
        ("milo-s2", DEEPSEEK_16B, "dense-1024+frequency-32", 10),
        # Mixtral-8x22B: the same kind, half as wide again, and the general rule
        ("milo-s1", ("mixtral", 6144, 8), "dense-768+kurtosis-24", 20),
        ("milo-s2", ("mixtral", 6144, 8), "dense-1536+kurtosis-48", 20),
        # another family of Mixtral's size does not get the published rule
        ("milo-s1", ("granitemoe", 4096, 8), "dense-512+kurtosis-16", 20),
        # the line between the two kinds lies at 16 experts
        ("milo-s1", ("qwen2_moe", 2048, 16), "dense-256+kurtosis-8", 20),
        ("milo-s1", ("qwen2_moe", 2048, 17), "dense-800", 10),
        # Qwen3-30B-A3B and DeepSeek-V3
        ("milo-s2", ("qwen3_moe", 2048, 128), "dense-1024+frequency-32", 10),
        ("milo-s1", ("deepseek_v3", 7168, 256), "dense-2800", 10),
        ("milo-s2", ("deepseek_v3", 7168, 256), "dense-3584+frequency-112", 10),
        # a toy
        ("milo-s1", ("qwen2_moe", 256, 8), "dense-32+kurtosis-1", 20),
        ("milo-s2", ("olmoe", 100, 64), "dense-50+frequency-1.5625", 10),
    ],
)
def test_presets(name: str, model: tuple[str, int, int], ranks: str, iterations: int) -> None:
    chosen = preset(name, *model)
    assert (chosen.ranks, chosen.iterations) == (ranks, iterations)
    assert (chosen.method, chosen.bits, chosen.group_size, chosen.factor_bits) == ("milo", 3, 64, 3)


def test_an_unknown_preset_is_told_with_the_known() -> None:
    with pytest.raises(PlanError, match="preset 'milo-s3' is unknown; choose one of milo-s1, milo-s2"):
        preset("milo-s3", *MIXTRAL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "awq", "ranks": "dense-1"}, "method 'awq' is unknown; choose one of rtn, hqq, milo"),
        ({"method": "hqq", "bits": 7}, "bits 7 is not supported"),
        ({"method": "hqq", "group_size": 16}, "group_size 16 is not supported"),
        ({"ranks": "dense-8", "factor_bits": 2}, "factor_bits 2 is not supported"),
        ({"ranks": "dense-8", "iterations": -1}, "iterations -1 is not between 0 and 1000"),
        ({"ranks": "dense-8", "iterations": 1001}, "iterations 1001 is not between 0 and 1000"),
        ({"ranks": "dense-8+nonsense"}, "rank policy 'nonsense' is not understood"),
        (
            {"method": "rtn", "ranks": "dense-8"},
            "method rtn has no compensators, but ranks are dense-8; use --method milo",
        ),
        ({"method": "rtn", "ranks": "uniform-0+kurtosis-1"}, "method rtn has no compensators"),
        ({}, r"method milo without ranks \(uniform-0\) is method hqq"),
        ({"ranks": "dense-0+frequency-0"}, "method milo without ranks"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Settings(**values)


def test_limits_themselves_are_allowed() -> None:
    for iterations in (0, 1000):
        assert Settings(ranks="dense-1", iterations=iterations).iterations == iterations
    assert Settings(method="rtn", ranks="dense-0").ranks == "dense-0"


def test_settings_are_values() -> None:
    with pytest.raises(AttributeError):
        Settings(method="hqq").bits = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(method="hqq", bitz=4)  # type: ignore[call-arg]
    assert Settings(method="hqq") == Settings(method="hqq")


def test_settings_can_be_written_as_json() -> None:
    chosen = Settings(ranks="dense-8", keep=("attn.q",))
    body = json.loads(json.dumps(chosen.as_dict()))
    assert Settings(**(body | {"keep": tuple(body["keep"])})) == chosen
