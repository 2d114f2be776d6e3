# SPDX-License-Identifier: Apache-2.0
"""Real processes, really killed: a run that is cut off anywhere continues to the bytes of an undisturbed one."""

from __future__ import annotations

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
from moepress.checkpoint.reader import CheckpointReader
from moepress.checkpoint.writer import work_folder
from moepress.errors import CheckpointError, ReadError, ResumeError
from tiny import FAMILIES, fingerprint, left_behind

Tiny = Callable[..., Path]
MANY = {"num_experts": 32, "num_hidden_layers": 3, "intermediate_size": 64}
SETTINGS = moepress.Settings(method="milo", bits=3, ranks="dense-8+kurtosis-4", iterations=2)
CHILD = """
import sys
import torch
import moepress
from moepress.checkpoint import writer
torch.set_num_threads(1)
writer.SYNC_SECONDS = 0.02
settings = moepress.Settings(method="milo", bits=3, ranks="dense-8+kurtosis-4", iterations=2)
moepress.compress_checkpoint(*sys.argv[1:], settings)
"""


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Path:
    return tiny("olmoe", shards=3, **MANY)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The files of a run that nobody disturbed, and how long it took."""
    target = tmp_path_factory.mktemp("undisturbed") / "target"
    begin = time.monotonic()
    moepress.compress_checkpoint(source, target, SETTINGS)
    return fingerprint(target), time.monotonic() - begin


def fork_and_kill(source: Path, target: Path, after: float) -> bool:
    """A forked run, killed after so many seconds; whether it was still running."""
    child = os.fork()
    if child == 0:
        # nothing but the run happens in the child, and it never returns to pytest
        code = 1
        try:
            moepress.compress_checkpoint(source, target, SETTINGS, resume=True)
            code = 0
        finally:
            os._exit(code)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the run failed by itself: status {status}"
    return status != 0


def kill_and_finish(
    source: Path,
    target: Path,
    wanted: dict[str, str],
    length: float,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[int, int]:
    """Two kills at random moments, then a run to the end. Returns the kills that hit and the jobs found done."""
    monkeypatch.setattr("moepress.checkpoint.writer.SYNC_SECONDS", 0.01)
    moments = random.Random(seed)
    hits = sum(fork_and_kill(source, target, moments.uniform(0.0, 0.8) * length) for _ in range(2))
    result = moepress.compress_checkpoint(source, target, SETTINGS, resume=True)
    assert fingerprint(target) == wanted
    assert left_behind(target) == [target.name]
    return hits, result.resumed


def test_a_killed_process_is_continued_by_another(
    source: Path, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    journal = work_folder(target) / "journal.jsonl"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(target)]) as child:
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
            assert child.poll() is None, "the child ended by itself"
            assert time.monotonic() < deadline, "nothing was journaled"
            time.sleep(0.002)
        child.send_signal(signal.SIGSTOP)
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="another process is writing"):
                moepress.compress_checkpoint(source, target, SETTINGS, resume=resume)
        child.kill()
    assert not target.exists()
    with pytest.raises(ResumeError, match=r"unfinished run.*--resume"):
        moepress.compress_checkpoint(source, target, SETTINGS)
    result = moepress.compress_checkpoint(source, target, SETTINGS, resume=True)
    assert result.resumed >= 20
    assert set(result.errors) == set(result.plan.weights), "errors of resumed weights must not be lost"
    assert fingerprint(target) == undisturbed[0]
    assert left_behind(target) == ["target"]


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_a_run_ends_in_the_same_bytes(
    source: Path,
    undisturbed: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    kill_and_finish(source, tmp_path / "target", *undisturbed, seed, monkeypatch)


@pytest.mark.slow
def test_forty_more_kills(
    source: Path, undisturbed: tuple[dict[str, str], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        kill_and_finish(source, tmp_path / f"target-{seed}", *undisturbed, seed, monkeypatch)
        for seed in range(100, 120)
    ]
    assert sum(hits for hits, _ in told) > 20, "most kills came too late to test anything"
    assert sum(done > 0 for _, done in told) > 10, "most runs had nothing to resume"


@pytest.mark.parametrize("call", ["rename", "replace"])
@pytest.mark.parametrize("before", [True, False])
def test_killed_just_before_or_after_the_last_rename(
    source: Path, undisturbed: tuple[dict[str, str], float], tmp_path: Path, call: str, before: bool
) -> None:
    """The moments a random kill will hardly ever meet."""
    target = tmp_path / "target"
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs shall not hang the tests
        real = getattr(os, call)

        def then_die(*arguments: object) -> None:
            if not before:
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, call, then_die)
        try:
            moepress.compress_checkpoint(source, target, SETTINGS)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert target.exists() == (call == "rename" and not before)
    moepress.compress_checkpoint(source, target, SETTINGS, resume=True)
    assert fingerprint(target) == undisturbed[0]
    assert left_behind(target) == ["target"]


def test_resuming_a_complete_target_does_nothing(
    source: Path, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    first = moepress.compress_checkpoint(source, target, SETTINGS)
    times = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    again = moepress.compress_checkpoint(source, target, SETTINGS, resume=True)
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == times
    assert again.summary == first.summary
    assert again.errors == first.errors
    assert again.resumed == len(first.plan.weights)
    assert fingerprint(target) == undisturbed[0]


def test_a_complete_target_of_other_settings_is_not_taken_for_this_run(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    moepress.compress_checkpoint(source, target, moepress.Settings(method="hqq", bits=2))
    before = fingerprint(target)
    with pytest.raises(ResumeError, match=r"finished result of another run: .*b2g64.*b4g64.*name another target"):
        moepress.compress_checkpoint(source, target, moepress.Settings(method="hqq", bits=4), resume=True)
    assert fingerprint(target) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_are_equal_byte_for_byte(tiny: Tiny, tmp_path: Path, family: str) -> None:
    settings = moepress.Settings(ranks="dense-8+kurtosis-4", group_size=32, iterations=1)
    for name in ("first", "second"):
        moepress.compress_checkpoint(tiny(family), tmp_path / name / "same", settings)
    assert fingerprint(tmp_path / "first") == fingerprint(tmp_path / "second")


@pytest.mark.parametrize("shards", [1, 3])
def test_the_split_of_the_source_into_files_does_not_matter_to_the_tensors(
    tiny: Tiny, tmp_path: Path, shards: int
) -> None:
    settings = moepress.Settings(ranks="dense-8", group_size=32, iterations=0)
    moepress.compress_checkpoint(tiny("glm4_moe"), tmp_path / "whole", settings)
    moepress.compress_checkpoint(tiny("glm4_moe", shards=shards), tmp_path / "split", settings)
    assert fingerprint(tmp_path / "whole")["model.safetensors"] == fingerprint(tmp_path / "split")["model.safetensors"]


@pytest.mark.parametrize("settings", [
    moepress.Settings(method="rtn", bits=4, group_size=32), moepress.Settings(method="hqq", bits=1, group_size=32),
    moepress.Settings(ranks="dense-7+sparse-3", bits=3, group_size=32, iterations=0, factor_bits=16),
    moepress.Settings(ranks="uniform-5", bits=5, group_size=32, iterations=0, keep=("*layers.1.*",)),
], ids=["rtn", "hqq", "milo", "keep"])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_bytes_are_those_on_disk(
    tiny: Tiny, tmp_path: Path, family: str, settings: moepress.Settings
) -> None:
    target = tmp_path / "target"
    predicted = moepress.plan_checkpoint(tiny(family), settings).notes["predicted"]
    result = moepress.compress_checkpoint(tiny(family), target, settings)
    files = list(target.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert predicted["file_bytes"] == sum(path.stat().st_size for path in files)
    assert predicted["tensor_bytes"] == predicted["file_bytes"] - headers
    assert predicted == dict(result.summary)
    assert set(result.errors) == {name for name, spec in result.plan.weights.items() if spec}
    assert predicted["compressed_bytes"] == sum(each["bytes"] for each in predicted["groups"].values())


def test_a_failed_read_keeps_the_finished_weights(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = moepress.Settings(method="rtn", group_size=32)
    moepress.compress_checkpoint(tiny("olmoe"), tmp_path / "whole", settings)
    load, calls = CheckpointReader.load, []

    def load_some(self: CheckpointReader, name: str, expert: int | None = None) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 20:
            raise ReadError(f"{name} cannot be read: the disk says so")
        return load(self, name, expert)

    monkeypatch.setattr(CheckpointReader, "load", load_some)
    with pytest.raises(ReadError, match="the disk says so"):
        moepress.compress_checkpoint(tiny("olmoe"), tmp_path / "target", settings)
    assert not (tmp_path / "target").exists()
    resumed = moepress.compress_checkpoint(tiny("olmoe"), tmp_path / "target", settings, resume=True)
    assert resumed.resumed > 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "target" / path.name).read_bytes(), path.name
