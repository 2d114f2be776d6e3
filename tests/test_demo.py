# SPDX-License-Identifier: Apache-2.0
"""The demo: its files are the ones that were measured, and its rows are in the order that the paper promises."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from moepress.demo.run import EXCERPT, MODEL, PROMPT, WINDOW, run_demo


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """The demo's rows by name."""
    return {row["name"]: row for row in run_demo(torch.device("cpu"))}


def test_the_model_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12_000_000


def test_the_excerpt_is_the_one_that_was_measured() -> None:
    data = EXCERPT.read_bytes()
    assert len(data) == 56_639
    assert hashlib.sha256(data).hexdigest() == "916f3888f9393c7cecc3d08b04fed20fc301337011543d0c19cfc59c2fea61a1"
    assert "56,639 bytes" in (MODEL / "README.md").read_text()


@pytest.mark.slow
def test_five_rows_of_known_sizes(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == ["original (bf16)", "RTN", "HQQ", "MiLo", "--budget 3.5bpw"]
    assert rows["original (bf16)"]["bpw"] == 16
    # 3 bits and two fp16 numbers for 64 weights, at no padding
    assert rows["RTN"]["bpw"] == rows["HQQ"]["bpw"] == 3.5
    assert 3.5 < rows["MiLo"]["bpw"] < 4.5
    assert 3.499 < rows["--budget 3.5bpw"]["bpw"] <= 3.5
    assert rows["original (bf16)"]["bytes"] == 2 * 5_582_080
    assert rows["RTN"]["bytes"] == rows["HQQ"]["bytes"] < rows["MiLo"]["bytes"] < rows["original (bf16)"]["bytes"] / 2


@pytest.mark.slow
def test_compensators_win_accuracy_back(rows: dict[str, dict[str, Any]]) -> None:
    ppl = {name: row["ppl"] for name, row in rows.items()}
    assert ppl["original (bf16)"] < ppl["MiLo"] < ppl["HQQ"]
    assert ppl["MiLo"] < ppl["RTN"]
    # the same bytes, better spent
    assert ppl["original (bf16)"] < ppl["--budget 3.5bpw"] < min(ppl["HQQ"], ppl["RTN"])
    # the model card's figure is of bfloat16, this is float32
    assert ppl["original (bf16)"] == pytest.approx(29.39, rel=0.01)
    for row in rows.values():
        assert str(WINDOW) in row["protocol"]
        assert row["text"].startswith(PROMPT) and len(row["text"].split()) > 8
