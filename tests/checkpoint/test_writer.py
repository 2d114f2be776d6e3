# SPDX-License-Identifier: Apache-2.0
"""The writer publishes complete folders only, and an interrupted one continues to the same bytes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.checkpoint import writer
from moepress.checkpoint.layout import Layout, lay_out
from moepress.checkpoint.writer import CheckpointWriter, work_folder
from moepress.errors import CheckpointError, ResumeError, WriteError
from tiny import fingerprint as bytes_of

RUN = {"source file a": "1234", "plan": "abcd"}
JOBS = 12
SLOTS = 3
TENSORS = {f"layers.{i}.w": ("F16", (SLOTS, 40)) for i in range(JOBS)} | {
    "scalar": ("F32", ()),
    "ids": ("I64", (7,)),
}


def layout() -> Layout:
    return lay_out(TENSORS, 1500)


def tensor(name: str, slot: int | None = None) -> torch.Tensor:
    dtype, shape = TENSORS[name]
    of = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64}[dtype]
    whole = torch.arange(max(1, int(torch.tensor(shape).prod()))).reshape(shape).to(of) + len(name) + hash_of(name)
    return whole if slot is None else whole[slot]


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def jobs() -> Iterator[tuple[str, list[Any]]]:
    """Stacked tensors go slot by slot, each slot a job of its own; the others whole."""
    for name, (_, shape) in TENSORS.items():
        if len(shape) == 2:
            for slot in range(SLOTS):
                yield f"{name}#{slot}", [(name, slot, tensor(name, slot))]
        else:
            yield name, [(name, None, tensor(name))]


def fill(out: CheckpointWriter, stop_after: int = 10**6) -> list[str]:
    done = []
    for job, pieces in jobs():
        if job not in out.done:
            if len(done) == stop_after:
                break
            out.put(job, pieces, {"error": 0.5})
            done.append(job)
    return done


def finish(target: Path, **arguments: Any) -> list[str]:
    with CheckpointWriter(target, layout(), RUN, **arguments) as out:
        done = fill(out)
        out.add_file("config.json", b"{}")
        out.publish()
    return done


def interrupt(target: Path, after: int) -> None:
    with CheckpointWriter(target, layout(), RUN) as out:
        fill(out, after)


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, str]:
    finish(tmp_path / "undisturbed")
    return bytes_of(tmp_path / "undisturbed")


def journal(target: Path) -> Path:
    return work_folder(target) / "journal.jsonl"


# ---------------------------------------------------------------------------------------------- publishing


def test_the_target_appears_complete_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "target"
    with CheckpointWriter(target, layout(), RUN) as out:
        fill(out)
        assert not target.exists()
        digests = out.tensor_digests()
        out.publish()
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert {path.name: path.stat().st_size for path in target.iterdir()} == dict(layout().sizes)
    assert set(digests) == set(TENSORS)


def test_leaving_early_publishes_nothing_and_keeps_the_work(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    target = tmp_path / "target"

    def run() -> None:
        with CheckpointWriter(target, layout(), RUN) as out:
            fill(out, 5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not target.exists()
    assert len(finish(target, resume=True)) == len(list(jobs())) - 5
    assert bytes_of(target) == undisturbed


def test_discarded_work_is_gone(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "target", layout(), RUN) as out:
        fill(out, 3)
        out.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_target_is_refused_before_anything_is_written(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "target"
    make(target)
    with pytest.raises(CheckpointError, match="target exists; remove it or name another"):
        CheckpointWriter(target, layout(), RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with CheckpointWriter(target, layout(), RUN) as out:
        fill(out)
        target.mkdir()
        (target / "precious").touch()
        with pytest.raises(CheckpointError, match="target exists"):
            out.publish()
    assert [path.name for path in target.iterdir()] == ["precious"]


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "target", layout(), RUN)


def test_a_piece_of_a_wrong_size_is_our_own_mistake(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="takes 80 bytes by the layout, got 240"),
        CheckpointWriter(tmp_path / "target", layout(), RUN) as out,
    ):
        out.put("job", [("layers.0.w", 0, tensor("layers.0.w"))])


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("after", [0, 1, 17, JOBS * SLOTS + 2])
def test_a_resumed_run_does_only_what_is_missing_and_ends_in_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str], after: int
) -> None:
    target = tmp_path / "target"
    interrupt(target, after)
    with CheckpointWriter(target, layout(), RUN, resume=True) as out:
        assert list(out.done) == [job for job, _ in jobs()][:after]
        assert all(info == {"error": 0.5} for info in out.done.values())
    assert len(finish(target, resume=True)) == len(list(jobs())) - after
    assert bytes_of(target) == undisturbed


def test_resuming_where_nothing_was_begun_just_begins(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    finish(tmp_path / "target", resume=True)
    assert bytes_of(tmp_path / "target") == undisturbed


def test_unfinished_work_is_not_overwritten_without_being_asked(tmp_path: Path) -> None:
    target = tmp_path / "target"
    interrupt(target, 5)
    before = journal(target).read_bytes()
    with pytest.raises(ResumeError, match=r"unfinished run \(5 weights done\).*--resume") as caught:
        CheckpointWriter(target, layout(), RUN)
    assert str(work_folder(target)) in str(caught.value)
    assert journal(target).read_bytes() == before


@pytest.mark.parametrize(("changed", "words"), [
    ({"plan": "ef01"}, "plan was abcd and is now ef01"),
    ({"source file a": "9"}, "source file a was 1234 and is now 9"),
    ({"device": "cuda"}, "device was None and is now cuda"),
])  # fmt: skip
def test_other_input_is_refused_with_both_values(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    target = tmp_path / "target"
    interrupt(target, 5)
    before = journal(target).read_bytes()
    with pytest.raises(ResumeError, match=words):
        CheckpointWriter(target, layout(), RUN | changed, resume=True)
    assert journal(target).read_bytes() == before


def test_input_that_is_gone_is_refused_too(tmp_path: Path) -> None:
    interrupt(tmp_path / "target", 2)
    with pytest.raises(ResumeError, match="plan was abcd and is now None"):
        CheckpointWriter(tmp_path / "target", layout(), {"source file a": "1234"}, resume=True)


@pytest.mark.parametrize(
    "tail", [b'{"job": "layers.9', b"\n", b"\x00" * 50, b"{}\n", b'{"job": 1}\n', b"[]\n", b"\xff\n"]
)
def test_a_torn_line_at_the_end_is_ignored(tmp_path: Path, undisturbed: dict[str, str], tail: bytes) -> None:
    target = tmp_path / "target"
    interrupt(target, 5)
    with journal(target).open("ab") as file:
        file.write(tail)
    assert len(finish(target, resume=True)) == len(list(jobs())) - 5
    assert bytes_of(target) == undisturbed


@pytest.mark.parametrize("cut", range(1, 260, 23))
def test_a_journal_cut_anywhere_only_costs_work(tmp_path: Path, undisturbed: dict[str, str], cut: int) -> None:
    target = tmp_path / "target"
    interrupt(target, 5)
    data = journal(target).read_bytes()
    journal(target).write_bytes(data[: max(0, len(data) - cut * len(data) // 260)])
    finish(target, resume=True)
    assert bytes_of(target) == undisturbed


@pytest.mark.parametrize("entry", [
    {"job": "x", "sha256": "", "pieces": [["nowhere", 0]], "info": {}},
    {"job": "x", "sha256": "", "pieces": [["layers.0.w", SLOTS]], "info": {}},
    {"job": "x", "sha256": "", "pieces": [["layers.0.w", -1]], "info": {}},
    {"job": "x", "sha256": "", "pieces": [["layers.0.w", "0"]], "info": {}},
    {"job": "x", "sha256": "", "pieces": [[["layers.0.w"], 0]], "info": {}},
    {"job": "x", "sha256": "", "pieces": [["layers.0.w"]], "info": {}},
    {"job": "x", "sha256": "", "pieces": 5, "info": {}},
    {"job": ["x"], "sha256": "", "pieces": [], "info": {}},
    {"job": "x", "sha256": "", "pieces": [["layers.0.w", 0]], "info": 3},
])  # fmt: skip
def test_a_line_that_makes_no_sense_is_not_believed(
    tmp_path: Path, undisturbed: dict[str, str], entry: dict[str, Any]
) -> None:
    target = tmp_path / "target"
    interrupt(target, 5)
    with journal(target).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    with CheckpointWriter(target, layout(), RUN, resume=True) as out:
        assert list(out.done) == [job for job, _ in jobs()][:5]
    finish(target, resume=True)
    assert bytes_of(target) == undisturbed


@pytest.mark.parametrize("first", [b"{}", b'{"fingerprint": 5}', b'{"fingerprint": {}}', b'{"fingerprint": null}'])
def test_a_damaged_first_line_is_refused_not_believed(tmp_path: Path, first: bytes) -> None:
    target = tmp_path / "target"
    interrupt(target, 5)
    lines = journal(target).read_bytes().split(b"\n")
    journal(target).write_bytes(b"\n".join([first, *lines[1:]]))
    with pytest.raises(ResumeError, match="plan was None and is now abcd"):
        CheckpointWriter(target, layout(), RUN, resume=True)


def test_data_that_was_journaled_but_did_not_survive_is_done_again(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    target = tmp_path / "target"
    interrupt(target, 20)
    place = layout().places["layers.2.w"]
    with (work_folder(target) / "out" / place.file).open("r+b") as file:
        file.seek(place.offset + place.num_bytes // SLOTS)  # in slot 1
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    redone = finish(target, resume=True)
    assert redone[0] == "layers.2.w#1"
    assert len(redone) == len(list(jobs())) - 19
    assert bytes_of(target) == undisturbed


def test_a_lost_shard_and_a_damaged_header_are_written_again(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    target = tmp_path / "target"
    interrupt(target, 30)
    shards = sorted((work_folder(target) / "out").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(b"")
    with shards[2].open("r+b") as file:
        file.write(b"xxxxxxxxxxxxxxxx")
    finish(target, resume=True)
    assert bytes_of(target) == undisturbed


def test_a_second_writer_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with CheckpointWriter(target, layout(), RUN) as out:
        fill(out, 3)
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="another process is writing"):
                CheckpointWriter(target, layout(), RUN, resume=resume)
        fill(out)
        out.publish()
    assert target.exists()


# ---------------------------------------------------------------------------------------------- a full disk


def failing_after(monkeypatch: pytest.MonkeyPatch, name: str, calls: int, code: int) -> None:
    """os.`name` works so many times and then fails as a full disk does."""
    real, made = getattr(os, name), [0]

    def wrapped(*arguments: Any) -> Any:
        made[0] += 1
        if made[0] > calls:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(writer.os, name, wrapped)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("name", "calls"), [
    ("pwrite", 0), ("pwrite", 20), ("posix_fallocate", 0), ("posix_fallocate", 2), ("write", 0), ("fdatasync", 0),
    ("fsync", 0), ("rename", 0), ("replace", 0),
])  # fmt: skip
def test_a_full_disk_is_an_error_and_the_run_continues_later(
    tmp_path: Path, undisturbed: dict[str, str], name: str, calls: int, code: int
) -> None:
    target = tmp_path / "target"
    with pytest.MonkeyPatch.context() as patch:
        failing_after(patch, name, calls, code)
        with pytest.raises(WriteError, match=r"full.*make room and continue with --resume"):
            finish(target)
    assert not target.exists()
    finish(target, resume=True)
    assert bytes_of(target) == undisturbed


def test_what_was_done_before_the_disk_was_full_is_not_done_again(tmp_path: Path) -> None:
    target, headers = tmp_path / "target", len(layout().headers)
    with pytest.MonkeyPatch.context() as patch:
        failing_after(patch, "pwrite", headers + 20, errno.ENOSPC)
        with pytest.raises(WriteError):
            finish(target)
    assert len(finish(target, resume=True)) == len(list(jobs())) - 20


def test_any_other_failure_of_the_disk_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_after(monkeypatch, "pwrite", 10, errno.EIO)
    with pytest.raises(WriteError, match=r"cannot be written: .*Input/output error"):
        finish(tmp_path / "target")


def test_too_little_room_is_told_before_the_first_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(WriteError, match=rf"takes {layout().file_bytes} bytes and .* has 1000 free"):
        CheckpointWriter(tmp_path / "target", layout(), RUN)


def test_short_writes_are_continued(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    real = os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.os, "pwrite", lambda fd, data, offset: real(fd, data[:33], offset))
        finish(tmp_path / "target")
    assert bytes_of(tmp_path / "target") == undisturbed


def test_a_journal_line_is_written_only_after_its_data_is_synced(tmp_path: Path) -> None:
    happened: list[str] = []
    with CheckpointWriter(tmp_path / "target", layout(), RUN) as out, pytest.MonkeyPatch.context() as patch:
        names = {fd: name for name, fd in out._files.items()}
        for call in ("pwrite", "write", "fdatasync"):
            real = getattr(os, call)
            patch.setattr(
                writer.os,
                call,
                lambda fd, *a, real=real, call=call: (happened.append(f"{call} {names[fd]}"), real(fd, *a))[1],
            )
        patch.setattr(writer, "SYNC_SECONDS", 0.0)
        fill(out, 1)
    first = layout().places["layers.0.w"].file
    data, sync, line = (happened.index(f"{call} {name}") for call, name in
                        [("pwrite", first), ("fdatasync", first), ("write", "journal")])  # fmt: skip
    assert data < sync < line < happened.index("fdatasync journal")
