# SPDX-License-Identifier: Apache-2.0
"""CheckpointWriter: fills a Layout piece by piece, survives being killed, and publishes the folder in one rename.

    .NAME.moepress/          beside the target NAME, removed at the end
        lock                 held by the process that writes
        journal.jsonl        line 1: the run's fingerprint; then one line per finished job with its digest
        out/                 becomes NAME by one rename, and only when it is complete

Data is synced before the journal line that vouches for it. On resume the fingerprint must match, and what the journal
claims is read back and digested: a job whose bytes did not survive is simply done again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moepress.checkpoint.layout import Layout
from moepress.errors import CheckpointError, ResumeError, WriteError

SYNC_BYTES = 256 << 20
SYNC_SECONDS = 2.0
_CHUNK = 8 << 20

Piece = tuple[str, int | None, torch.Tensor]
"""(stored tensor, slot of its leading dimension or None for the whole, data)."""


class CheckpointWriter:
    """Writes one target folder; a context manager that leaves the unfinished work in place when it is left early.

    `fingerprint` identifies source and settings, as named values; a resumed run must bring the same.
    Raises CheckpointError for an existing target, a full disk or a second writer, ResumeError for unfinished work
    that must not be mixed with this run.
    """

    def __init__(
        self, target: str | Path, layout: Layout, fingerprint: Mapping[str, str], *, resume: bool = False
    ) -> None:
        self.target = Path(target)
        self.work = work_folder(self.target)
        self.out = self.work / "out"
        self.layout = layout
        self.done: dict[str, dict[str, Any]] = {}
        self._files: dict[str, int] = {}
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._synced = time.monotonic()
        refuse_existing(self.target)
        with self._disk_errors():
            self._lock = self._acquire()
        try:
            with self._disk_errors():
                self._start(dict(fingerprint), resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._files:
                with self._disk_errors():
                    self._sync()
        except WriteError:
            # what is lost is done again on resume; the error that ended the run is the one to tell
            if kind is None:
                raise
        finally:
            self.close()

    def put(self, job: str, pieces: Sequence[Piece], info: Mapping[str, Any] | None = None) -> None:
        """Stores what one job produced; `info` is kept in the journal and comes back in `done` after a resume."""
        digest = hashlib.sha256()
        with self._disk_errors():
            for name, slot, tensor in pieces:
                data = _bytes_of(tensor)
                fd, offset = self._locate(name, slot, len(data))
                _write_at(fd, data, offset)
                digest.update(data)
                self._pending_bytes += len(data)
            self.done[job] = dict(info or {})
            where = [[name, slot] for name, slot, _ in pieces]
            entry = {"job": job, "sha256": digest.hexdigest(), "pieces": where, "info": self.done[job]}
            self._pending.append(json.dumps(entry).encode() + b"\n")
            if self._pending_bytes >= SYNC_BYTES or time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()

    def add_file(self, name: str, data: bytes) -> None:
        """Writes a small file whole."""
        with self._disk_errors():
            (self.out / name).write_bytes(data)

    def tensor_digests(self) -> dict[str, str]:
        """sha256 of every stored tensor, read back from the files."""
        with self._disk_errors():
            self._sync()
            return {name: self._digest([(name, None)]) for name in sorted(self.layout.places)}

    def publish(self) -> None:
        """Makes the folder appear under its final name; everything is on disk by then."""
        with self._disk_errors():
            self._sync()
            publish_folder(self.out, self.target)
        shutil.rmtree(self.work)

    def discard(self) -> None:
        """Removes the unfinished work, for a source that can never be finished."""
        self._pending = []
        shutil.rmtree(self.work)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._lock.close()

    def _acquire(self) -> Any:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        lock = open(self.work / "lock", "w")  # noqa: SIM115  (held until close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise CheckpointError(f"another process is writing {self.target}; wait for it or name another") from error
        return lock

    def _start(self, fingerprint: dict[str, str], resume: bool) -> None:
        entries = self._journal_entries(fingerprint, resume)
        self.out.mkdir(exist_ok=True)
        _check_space(self.out, self.layout)
        for file, header in self.layout.headers.items():
            self._files[file] = fd = os.open(self.out / file, os.O_RDWR | os.O_CREAT, 0o644)
            os.posix_fallocate(fd, 0, self.layout.sizes[file])
            os.ftruncate(fd, self.layout.sizes[file])
            _write_at(fd, memoryview(header), 0)
        entries = [entry for entry in entries if self._digest(entry["pieces"]) == entry["sha256"] != ""]
        self.done = {entry["job"]: entry["info"] for entry in entries}
        lines = [json.dumps({"fingerprint": fingerprint})] + [json.dumps(entry) for entry in entries]
        draft = self.work / "journal.new"
        draft.write_bytes("".join(line + "\n" for line in lines).encode())
        _fsync(draft)
        os.replace(draft, self.work / "journal.jsonl")
        self._files["journal"] = os.open(self.work / "journal.jsonl", os.O_WRONLY | os.O_APPEND)

    def _journal_entries(self, fingerprint: dict[str, str], resume: bool) -> list[dict[str, Any]]:
        lines = _complete_lines(self.work / "journal.jsonl")
        if not lines:
            return []
        recorded = lines[0].get("fingerprint")
        if not isinstance(recorded, dict):
            recorded = {}
        if not resume:
            raise ResumeError(
                f"{self.target} has an unfinished run ({len(lines) - 1} weights done); continue it with --resume "
                f"or remove {self.work} to start over"
            )
        changed = [key for key in fingerprint | recorded if fingerprint.get(key) != recorded.get(key)]
        if changed:
            values = "; ".join(f"{k} was {recorded.get(k)} and is now {fingerprint.get(k)}" for k in changed[:4])
            more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
            raise ResumeError(
                f"cannot resume {self.target}: {values}{more}; restore them, or remove {self.work} to start over"
            )
        return [entry for entry in lines[1:] if _is_entry(entry)]

    def _locate(self, name: str, slot: int | None, size: int) -> tuple[int, int]:
        place = self.layout.places[name]
        expected = place.num_bytes if slot is None else place.num_bytes // place.slots
        assert size == expected, f"{name}[{slot}] takes {expected} bytes by the layout, got {size}"
        return self._files[place.file], place.offset + (slot or 0) * expected

    def _digest(self, pieces: Sequence[Any]) -> str:
        digest = hashlib.sha256()
        for name, slot in pieces:
            place = self.layout.places.get(name)
            if place is None or not (slot is None or 0 <= slot < place.slots):
                return ""
            size = place.num_bytes if slot is None else place.num_bytes // place.slots
            offset = place.offset + (slot or 0) * size
            for start in range(0, size, _CHUNK):
                count = min(_CHUNK, size - start)
                digest.update(os.pread(self._files[place.file], count, offset + start))
        return digest.hexdigest()

    def flush(self) -> None:
        """Syncs what was put and the journal that vouches for it."""
        with self._disk_errors():
            self._sync()

    def _sync(self) -> None:
        if self._pending:
            for name, fd in self._files.items():
                if name != "journal":
                    os.fdatasync(fd)
            os.write(self._files["journal"], b"".join(self._pending))
            os.fdatasync(self._files["journal"])
        self._pending, self._pending_bytes, self._synced = [], 0, time.monotonic()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise WriteError(f"{self.target} cannot be written: {error}") from error
            raise WriteError(
                f"the disk of {self.target.parent} is full: the checkpoint takes {self.layout.file_bytes} bytes and "
                f"{_free(self.work)} are free; make room and continue with --resume"
            ) from error


def work_folder(target: Path) -> Path:
    """Where an unfinished run towards `target` keeps its work."""
    return target.parent / f".{target.name}.moepress"


def remove_work(target: Path) -> None:
    """Clears what a run leaves beside its finished target when it is killed just after the last rename."""
    shutil.rmtree(work_folder(target), ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raises CheckpointError unless the target's name is free."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists; remove it or name another target")


def publish_folder(out: Path, target: Path) -> None:
    """Puts a finished folder on disk and makes it appear as `target`, whose name must be free."""
    for path in out.iterdir():
        _fsync(path)
    _fsync(out)
    refuse_existing(target)
    os.rename(out, target)
    _fsync(target.parent)


def _check_space(folder: Path, layout: Layout) -> None:
    there = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    free = _free(folder)
    if layout.file_bytes - there > free:
        raise WriteError(
            f"the checkpoint takes {layout.file_bytes} bytes and {folder.parent.parent} has {free + there} free; "
            "make room or name a target on another disk"
        )


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    # a killed run may leave a torn last line, a crashed machine a damaged one: stop at the first that is not whole
    entries: list[dict[str, Any]] = []
    if not path.exists():
        return entries
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def _is_entry(entry: dict[str, Any]) -> bool:
    pieces = entry.get("pieces")
    return (
        set(entry) == {"job", "sha256", "pieces", "info"}
        and isinstance(entry["job"], str)
        and (isinstance(entry["info"], dict) and isinstance(pieces, list) and all(map(_is_place, pieces)))
    )


def _is_place(piece: Any) -> bool:
    return (
        isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str) and isinstance(piece[1], int | None)
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
