# SPDX-License-Identifier: Apache-2.0
"""A calibration that is killed anywhere continues to the bytes of one that was not; and the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moepress
from moepress.cli import main
from moepress.errors import CalibrationError
from moepress.measure.calibrate import calibrate
from moepress.measure.calibration import CalibrationSettings
from moepress.measure.stats_folder import read_stats
from moepress.source import open_source
from tiny import edit_tensors, fingerprint, read_all, tiny_checkpoint, tokens

Tiny = Callable[..., Path]
SETTINGS = {
    kind: CalibrationSettings(method=method, bits=(2,), group_sizes=(32,), ranks=(), feed=feed, min_tokens=4)
    for kind, method, feed in (("fisher", "hqq", "full"), ("local", "gptq", "compressed"))
}
CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from pathlib import Path
torch.set_num_threads(1)
from test_calibrate_resume import run
run(Path(sys.argv[1]), Path(sys.argv[2]), "local")
"""


def run(source: Path, stats: Path, kind: str) -> None:
    with open_source(source) as src:
        rows = {ref.name: torch.linspace(0.1, 1, ref.shape[0]) for ref in src.graph.weights}
        gradients = (lambda: rows) if kind == "fisher" else None
        calibrate(src, tokens(4, 12), stats, SETTINGS[kind], gradients=gradients, memory=1 << 20, resume=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, and a fourth that is not walked."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("calibrate") / "source", "deepseek_v3", num_hidden_layers=3)
    own = {n: t for n, t in read_all(folder).items() if n.startswith("model.layers.2.")}
    extra: dict[str, torch.Tensor | None] = {n.replace("layers.2.", "layers.3."): t for n, t in own.items()}
    return edit_tensors(folder, folder.parent / "extended", extra)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], float]]:
    """Kind -> the files of a run that nobody disturbed, and how long it took."""
    found = {}
    for kind in SETTINGS:
        stats, begin = tmp_path_factory.mktemp(kind) / "stats", time.monotonic()
        run(source, stats, kind)
        found[kind] = fingerprint(stats), time.monotonic() - begin
    return found


def in_child(work: Callable[[], None]) -> int:
    """The pid of a fork that does the work and nothing else."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a child that hangs shall not hang the tests
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.parametrize(
    ("kind", "before"),
    [("fisher", True), ("fisher", False), *(pytest.param("local", b, marks=pytest.mark.slow) for b in (True, False))],
)
def test_killed_around_any_file_a_run_ends_in_the_same_bytes(
    source: Path, undisturbed: dict[str, tuple[dict[str, str], float]], tmp_path: Path, before: bool, kind: str
) -> None:
    """Just before or after the n-th file appears, for every n."""
    real, reached = os.replace, True
    for number in range(100):
        stats = tmp_path / str(number)

        def work(number: int = number, stats: Path = stats) -> None:
            seen = 0

            def counting(*names: object) -> None:
                nonlocal seen
                seen += 1
                if before and seen > number:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*names)
                if seen > number:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = counting
            run(source, stats, kind)

        status = os.waitpid(in_child(work), 0)[1]
        assert status in (0, signal.SIGKILL)
        reached = status != 0
        if reached and not (stats / "statistics.json").exists():
            with pytest.raises(CalibrationError, match=r"unfinished|holds no"):
                read_stats(stats)
        run(source, stats, kind)
        assert fingerprint(stats) == undisturbed[kind][0], f"killed at file {number}"
        if not reached:
            break
    assert not reached and number > 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_killed_at_any_moment_a_run_ends_in_the_same_bytes(
    source: Path, undisturbed: dict[str, tuple[dict[str, str], float]], tmp_path: Path, seed: int, kind: str
) -> None:
    wanted, length = undisturbed[kind]
    moments = random.Random(seed)
    for _ in range(3):
        child = in_child(lambda: run(source, tmp_path / "stats", kind))
        time.sleep(moments.uniform(0.0, 0.7) * length)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)
    run(source, tmp_path / "stats", kind)
    assert fingerprint(tmp_path / "stats") == wanted


def test_a_killed_process_is_continued_and_a_living_one_left_alone(
    source: Path, undisturbed: dict[str, tuple[dict[str, str], float]], tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    command = [sys.executable, "-c", CHILD, str(source), str(stats), str(Path(__file__).parent)]
    with subprocess.Popen(command) as child:
        deadline = time.monotonic() + 120
        while not (stats / "layers" / "00000.json").exists():
            assert child.poll() is None, "the child ended by itself"
            assert time.monotonic() < deadline, "no layer was finished"
            time.sleep(0.002)
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(CalibrationError, match="another process is calibrating into"):
            run(source, stats, "local")
        child.kill()
    with pytest.raises(CalibrationError, match="layers done"):
        read_stats(stats)
    run(source, stats, "local")
    assert fingerprint(stats) == undisturbed["local"][0]


# ---------------------------------------------------------------------------------------------- the command line

MODEL = Path(moepress.__file__).parent / "demo" / "model"
TEXT = MODEL.parent / "excerpt.txt"


def cli(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["moepress", "calibrate", *map(str, words)])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


@pytest.mark.parametrize("gradients", ["auto", "off"])
def test_the_embedded_model_is_calibrated(
    gradients: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [MODEL, "--text", TEXT, "-o", tmp_path / "stats", "--windows", 4, "--length", 128, "--method", "hqq",
             "--bits", "2,3,4", "--group-sizes", 64, "--ranks", 16, "--gradients", gradients, "--device", "cpu",
             "--json"]  # fmt: skip
    assert cli(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    body = json.loads(out.splitlines()[-1])
    kind = {"auto": "fisher", "off": "local"}[gradients]
    assert (body["kind"], body["tokens"], body["weights"], body["banks"]) == (kind, 512, 124, 4)
    assert "predicted loss" in out and "hqq b3g64" in out and "expert use" in out and "attn.q" in out
    assert ("gradients: whole-model" in out) == (gradients == "auto")
    stats = read_stats(tmp_path / "stats")
    assert stats.ids.shape == (4, 128) and stats.statistics.kind == kind
    assert list(body["short"]) == list(stats.statistics.short)
    assert all(name in out for name in stats.statistics.short[:8])
    before = fingerprint(tmp_path / "stats")
    assert cli(monkeypatch, *words) == 2
    assert "exists; continue it with --resume" in capsys.readouterr().err
    assert cli(monkeypatch, *words, "--resume") == 0
    assert cli(monkeypatch, *words, "--resume", "--seed", 1) == 2
    assert "text was" in capsys.readouterr().err
    assert fingerprint(tmp_path / "stats") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gradients", "on", "--memory", "1MB"], "--gradients on: the model in float32 takes about"),
        (["--gradients", "maybe"], "--gradients 'maybe' is unknown"),
        (["--memory", "8"], "8"),
        (["--bits", "2,x"], "--bits '2,x' is no list of whole numbers"),
        (["--method", "milo"], "method 'milo' is unknown"),
        (["--windows", "100000"], "windows"),
        (["--device", "warp"], "device 'warp' cannot be used here"),
    ],
)
def test_what_cannot_be_done_is_told(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats"
    assert cli(monkeypatch, MODEL, "--text", TEXT, "-o", stats, "--windows", 2, "--length", 32, *words) == 2
    assert message in capsys.readouterr().err
    assert not stats.exists()
