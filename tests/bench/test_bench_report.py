# SPDX-License-Identifier: Apache-2.0
"""Tables and JSON from made-up measurements."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benching import MACHINE

from moepress.bench import report
from moepress.bench.contenders import BASELINE, OURS, PEER
from moepress.bench.problems import DENSE, LAYERS, MOE, Problem
from moepress.bench.run import Row


def rows_of_a_decode() -> list[Row]:
    problem = Problem(MOE, LAYERS["mixtral-8x7b"], 1, name="mixtral-8x7b")
    quantised, plain = problem.weight_bytes(3.5, 2), problem.weight_bytes(16, 2)
    common: dict[str, Any] = {"problem": problem, "hit": 2, "p20": 49.5, "p80": 51.0, "cold": True, "repeatable": True}
    return [
        Row(contender="moepress", role=OURS, weight_bytes=quantised, us=50.0, error=3.2e-3, **common),
        Row(contender="bf16 grouped", role=BASELINE, weight_bytes=plain, us=300.0, **common),
        Row(contender="bf16 by expert", role=BASELINE, weight_bytes=plain, us=200.0, **common),
        Row(contender="humming", role=PEER, weight_bytes=quantised, us=80.0, note="3.5 b, real zeros",
            **common | {"cold": False, "repeatable": False}),
        Row(problem, "another", PEER, 2, reason="RuntimeError: broken (x.py:3)"),
    ]  # fmt: skip


def test_cells() -> None:
    rows = rows_of_a_decode()
    shown = [report.cells(row, rows, MACHINE) for row in rows]
    assert {len(line) for line in shown} == {len(report.COLUMNS)}
    # 154.27 MB in 50 us are 3,085 GB/s, of 4,000
    assert shown[0] == ["moepress", "50.0", "49.5 - 51.0", "3,085", "77% copy", "4.00x", "1.60x", "3.2e-03", ""]
    assert shown[2][5:8] == ["1.00x", "0.40x", "-"]
    assert shown[3][6] == "1.00x"
    assert shown[3][8] == "3.5 b, real zeros, weights may come from L2, not bitwise repeatable"
    assert shown[4] == ["another", "-", "-", "-", "-", "-", "-", "-", "RuntimeError: broken (x.py:3)"]
    assert report.heading(rows[0]) == "mixtral-8x7b, 3 bits, groups of 64, bf16, T = 1: 2 of 8 experts hit"


def test_many_tokens_are_held_against_the_matrix_rate() -> None:
    problem = Problem(DENSE, (8192, 8192), 4096)
    row = Row(problem, "bf16", BASELINE, 1, weight_bytes=problem.weight_bytes(16), us=1000.0, p20=990.0, p80=1010.0)
    found = report.entry(row, [row], MACHINE)
    assert found["share_of"] == "matrix" and found["share"] == pytest.approx(2 * 4096 * 8192**2 / 800e12 / 1e-3)
    assert found["speed_up_over_16_bits"] == 1.0 and found["speed_up_over_best_peer"] is None


def test_the_document_is_json_with_machine_and_versions() -> None:
    rows = rows_of_a_decode()
    body = json.loads(json.dumps(report.document([rows], MACHINE, {"rounds": 3}), allow_nan=False))
    assert body["bench"] == {"rounds": 3} and body["torch"] == torch.__version__ and body["date"].endswith("+00:00")
    assert {"driver", "triton", "commit", "moepress"} <= body.keys()
    assert body["machine"]["copy_bandwidth"] == MACHINE.copy_bandwidth
    first, last = body["rows"][0], body["rows"][-1]
    assert first["problem"]["shape"] == [8, 2, 4096, 14336] and first["us"] == 50.0
    assert first["bytes"] == first["weight_bytes"] + rows[0].problem.activation_bytes
    assert first["speed_up_over_16_bits"] == 4.0 and first["speed_up_over_best_peer"] == 1.6
    assert last["us"] is None and last["reason"] == "RuntimeError: broken (x.py:3)" and "share" not in last
