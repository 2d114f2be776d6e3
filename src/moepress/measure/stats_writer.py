# SPDX-License-Identifier: Apache-2.0
"""StatsFolder: the folder of a calibration (moepress.measure.stats_folder) while it is written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from moepress.errors import CalibrationError, ResumeError, WriteError
from moepress.measure.corpus import windows_digest
from moepress.measure.stats_folder import (
    GRADIENTS,
    LAYERS,
    LOCK,
    RUN,
    STATISTICS,
    TOKENS,
    WORK,
    fingerprint_of,
    read_statistics,
    read_tensors,
    recorded,
)
from moepress.plan.statistics import Header, LayerStatistics, Statistics

_DRAFT = ".part"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is stored of one layer."""

    statistics: LayerStatistics
    attn_o: float | None
    """Mean sensitivity of its attn.o, where sensitivities were measured layer by layer."""

    def to_json(self) -> str:
        return json.dumps({"attn_o": self.attn_o, "statistics": self.statistics.to_json()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Part:
        """Raises ValueError, TypeError or KeyError for anything that `to_json` could not have written."""
        body = json.loads(text)
        attn_o = None if body["attn_o"] is None else float(body["attn_o"])
        return cls(statistics=LayerStatistics.from_json(body["statistics"]), attn_o=attn_o)


class StatsFolder:
    """A calibration being written; a context manager that leaves unfinished work in place."""

    def __init__(self, path: str | Path, header: Header, *, resume: bool = False) -> None:
        """Raises CalibrationError for an existing folder without `resume` or one that another process writes, and
        ResumeError for one of a run with another header."""
        self.path, self._header = Path(path), header
        if not resume and (self.path.exists() or self.path.is_symlink()):
            raise CalibrationError(f"{self.path} exists; continue it with --resume, remove it or name another folder")
        self._complete = False
        with self._disk_errors():
            self.path.mkdir(parents=True, exist_ok=resume)
            self._lock = self._acquire()
        try:
            with self._disk_errors():
                self._start()
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> StatsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._complete or (kind is not None and not self._worth_keeping()):
            with suppress(OSError):
                self._clear(everything=not self._complete)
        else:
            self._unlock()

    @property
    def finished(self) -> Statistics | None:
        """What an earlier run completed."""
        if not (self.path / STATISTICS).exists():
            return None
        self._complete = True
        return read_statistics(self.path)

    def parts(self) -> dict[int, Part]:
        """Those that are stored, by layer; one that cannot be read counts as not there."""
        found = {}
        for path in (self.path / LAYERS).glob("*.json"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                part = Part.from_json(path.read_text(encoding="utf-8"))
                found[part.statistics.layer] = part
        return found

    def store_part(self, part: Part) -> None:
        with self._disk_errors():
            (self.path / LAYERS).mkdir(exist_ok=True)
            _write(self.path / LAYERS / f"{part.statistics.layer:05}.json", part.to_json().encode())

    def store_ids(self, ids: torch.Tensor) -> None:
        with self._disk_errors():
            _write(self.path / TOKENS, save({"ids": ids.to("cpu", torch.int32)}, {"sha256": windows_digest(ids)}))

    def gradients(self) -> dict[str, torch.Tensor] | None:
        """Those that are stored."""
        return read_tensors(self.path / GRADIENTS) if (self.path / GRADIENTS).exists() else None

    def store_gradients(self, rows: Mapping[str, torch.Tensor]) -> None:
        with self._disk_errors():
            plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in rows.items()}
            _write(self.path / GRADIENTS, save(plain))

    def publish(self, statistics: Statistics) -> None:
        """Completes the folder; what only an unfinished one has is removed."""
        with self._disk_errors():
            _write(self.path / STATISTICS, statistics.to_json().encode())
        self._complete = True

    def _acquire(self) -> Any:
        while True:
            lock = open(self.path / LOCK, "w")  # noqa: SIM115  (held until the end)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise CalibrationError(
                    f"another process is calibrating into {self.path}; wait for it or name another folder"
                ) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / LOCK)):
                    return lock
            lock.close()  # a run that ended meanwhile had removed it

    def _start(self) -> None:
        mine = fingerprint_of(self._header)
        there = recorded(self.path)
        if there is None:
            foreign = [p.name for p in self.path.iterdir() if p.name != LOCK and not p.name.endswith(_DRAFT)]
            if foreign:
                raise ResumeError(
                    f"{self.path} holds {sorted(foreign)[0]} and no run that could be continued; name another folder"
                )
            _write(self.path / RUN, json.dumps(mine, indent=1).encode())
            return
        changed = [key for key in mine | there if mine.get(key) != there.get(key)]
        if changed:
            values = "; ".join(f"{key} was {there.get(key)} and is now {mine.get(key)}" for key in changed[:4])
            more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
            raise ResumeError(
                f"cannot resume {self.path}: {values}{more}; restore them, or name another folder to start over"
            )

    def _worth_keeping(self) -> bool:
        return any((self.path / LAYERS).glob("*.json")) or (self.path / GRADIENTS).exists()

    def _clear(self, *, everything: bool) -> None:
        """Removes what only an unfinished folder has, or `everything`."""
        for name in (LAYERS, WORK):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for draft in self.path.glob(f"*{_DRAFT}"):
            draft.unlink()
        for name in (RUN, TOKENS) if everything else (RUN,):
            (self.path / name).unlink(missing_ok=True)
        self._unlock()
        if everything:
            self.path.rmdir()

    def _unlock(self) -> None:
        with suppress(OSError):
            (self.path / LOCK).unlink(missing_ok=True)
        self._lock.close()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(f"{self.path} cannot be written: {error}; make room and continue with --resume") from error


def _write(path: Path, data: bytes) -> None:
    """The file appears whole and on the disk, or not at all."""
    draft = path.with_name(path.name + _DRAFT)
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
