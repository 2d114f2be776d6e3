# SPDX-License-Identifier: Apache-2.0
"""`moepress bench` without a GPU: its options, its output, and that one failure costs one row. Nothing is timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benching import CPU, MACHINE, SETTING, SMALL_DENSE, FakeClock, Ones, run

import moepress.cli.bench as cli_bench
from moepress.bench import report
from moepress.bench.clock import Call, Recording
from moepress.bench.contenders import OURS, Contender
from moepress.bench.humming_peer import Humming, unsupported
from moepress.bench.peers import lineup
from moepress.bench.problems import DENSE, Problem
from moepress.bench.run import describe, warm_up
from moepress.cli import main
from moepress.errors import EvaluationError
from moepress.kernels import banks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layer", "llama"), "--layer 'llama' is unknown; choose one of mixtral-8x7b, qwen3-30b-a3b"),
        (("--dense", "8192"), "--dense '8192' is not of the form 8192x8192"),
        (("--dense", "8192x0"), "--dense '8192x0' is not of the form"),
        (("--moe", "8,2,4096"), "--moe '8,2,4096' is not of the form 8,2,4096,14336"),
        (("--moe", "4,8,64,64"), "chooses 8 of 4 experts"),
        (("--dense", "64x64", "--moe", "4,2,64,64"), "give one of them"),
        (("--tokens", "1,x"), "--tokens '1,x' is not of the form 1,8,64"),
        (("--tokens", ""), "--tokens '' is not of the form"),
        (("--dtype", "fp8"), "--dtype 'fp8' is unknown; choose one of bf16, fp16"),
    ],
)
def test_unusable_options_are_one_line_and_status_2(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *words) == 2
    assert said in capsys.readouterr().err


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit status of `moepress bench words`."""
    monkeypatch.setattr(sys, "argv", ["moepress", "bench", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: moepress bench needs a CUDA GPU: torch ") and "--device auto is cpu" in said
    with pytest.raises(EvaluationError, match="--device cpu is cpu"):
        cli_bench.cuda_device("cpu")


def test_explain_names_everyone_and_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Humming, "why_not", lambda self, problem: unsupported(problem))
    monkeypatch.setattr(banks, "_why_not_device", lambda kind: "no device of that kind")
    assert command(monkeypatch, "--explain", "--layer", "qwen3-30b-a3b", "--tokens", "1,64", "--rank", "32") == 0
    shown = capsys.readouterr().out
    assert "qwen3-30b-a3b, 3 bits, groups of 64, rank 32, bf16, T = 64" in shown
    assert shown.count("moepress cuda") == 2 and shown.count("no device of that kind") == 2
    assert shown.count("moepress reference  runs") == 2 and shown.count("bf16 by expert      runs") == 2
    assert shown.count("has no compensators") == 2


@pytest.mark.parametrize("to_file", [True, False])
def test_the_command_prints_a_table_for_each_token_count_and_json(
    to_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_bench, "cuda_device", lambda name: CPU)
    monkeypatch.setattr(cli_bench, "CudaClock", lambda device: FakeClock([30.0] * 9))
    file = tmp_path / "out.json"
    words = ["--moe", "8,2,64,48", "--tokens", "1,5", "--no-peers", "--seconds", "0.3"]
    assert command(monkeypatch, *words, *(("--json", str(file)) if to_file else ())) == 0
    out = capsys.readouterr().out
    assert "a card, L2 60 MB; measured now: copies at 4.00 TB/s (read and written), bf16 products at 800 TFLOP/s" in out
    for tokens in (1, 5):
        assert f"experts 8,2,64,48, 3 bits, groups of 64, bf16, T = {tokens}: " in out
    assert out.count("bf16 by expert") == (2 if to_file else 4)
    body = json.loads(file.read_text() if to_file else out.splitlines()[-1])
    assert [(row["problem"]["tokens"], row["contender"]) for row in body["rows"]] == [
        (tokens, name) for tokens in (1, 5) for name in ("moepress", "bf16 grouped", "bf16 by expert")
    ]
    assert [row["us"] for row in body["rows"]] == [None, 30.0, 30.0] * 2


def broken(where: str) -> Contender:
    contender = Ones(f"breaks in {where}")

    def fail(*arguments: Any) -> Any:
        raise RuntimeError(f"\n  no {where} today\nmore")

    setattr(contender, where, fail)
    return contender


@pytest.mark.parametrize("where", ["why_not", "bits_per_weight", "note", "prepare", "reference"])
def test_a_contender_that_raises_costs_its_own_row_only(where: str) -> None:
    clock = FakeClock()
    bad, good = run(SMALL_DENSE, [broken(where), Ones("good")], clock)
    assert bad.us is None and bad.reason.startswith(f"RuntimeError: no {where} today (test_bench.py:")
    assert "Traceback" in bad.trace and clock.released == 1
    assert good.us == 10.0 and good.reason is None


def test_a_contender_that_fails_while_it_is_timed_is_taken_out() -> None:
    class Stumbling(FakeClock):
        def replay(self, recording: Recording, seconds: float) -> list[float]:
            if recording.graph == 0 and len(self.replayed) >= 2:
                raise RuntimeError("an illegal memory access")
            return super().replay(recording, seconds)

    clock = Stumbling()
    bad, good = run(SMALL_DENSE, [Ones("bad"), Ones("good")], clock)
    assert clock.replayed == [0, 1, 1, 1]
    assert bad.us is None and "an illegal memory access" in bad.reason
    assert good.us == 20.0 and good.replays == 15


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_a_wrong_result_gets_no_time(value: float) -> None:
    class Wrong(Ones):
        def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
            return [lambda: torch.full((problem.tokens, 4), value)] * copies

    rows = run(SMALL_DENSE, [Wrong("wrong")])
    assert rows[0].us is None and "the result is wrong: relative error" in rows[0].reason
    body = json.dumps(report.document([rows], MACHINE, {}), allow_nan=False)
    assert json.loads(body)["rows"][0]["reason"] == rows[0].reason


def test_what_cannot_run_is_a_row_with_its_reason_and_no_trace() -> None:
    row = run(Problem(DENSE, (48, 64), 3, bits=7), lineup(DENSE, "bf16"))[0]
    assert (row.contender, row.role, row.trace) == ("moepress", OURS, None)
    assert row.reason.startswith("bits 7 is not supported")


def test_too_little_memory_is_a_reason() -> None:
    (row,) = run(SMALL_DENSE, [Ones()], FakeClock(free=1000))
    assert row.reason.startswith("MemoryError: two copies of the weights take")


def test_contenders_take_turns() -> None:
    clock = FakeClock()
    run(SMALL_DENSE, [Ones("a"), broken("prepare"), Ones("b")], clock)
    assert clock.replayed == [0, 1] * 3


def test_an_unsteady_result_is_noticed() -> None:
    counter = iter(range(1000))

    class Unsteady(Ones):
        def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
            return [lambda: torch.ones(problem.tokens, 4) + 1e-4 * next(counter)] * copies

    (row,) = run(SMALL_DENSE, [Unsteady()])
    assert row.repeatable is False and "not bitwise repeatable" in report.remarks(row)


def test_compiling_ahead_may_fail_aloud() -> None:
    class Loud(Ones):
        def warm_up(self, problems: Sequence[Problem], device: torch.device) -> None:
            raise OSError("no compiler")

    (line,) = warm_up([Loud("loud"), Ones()], [SMALL_DENSE], SETTING)
    assert line.startswith("loud could not compile ahead: OSError: no compiler (test_bench.py:")


def test_an_error_without_words_still_has_a_place() -> None:
    try:
        assert SMALL_DENSE.moe
    except AssertionError as error:
        error.args = ()
        said = describe(error)
    assert said.startswith("AssertionError (test_bench.py:")
