# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves beside its target while it is not finished: `.TARGET.training/`.

    run.json     the run's fingerprint: settings, windows, source, versions
    state.pt     the last stored state (train.State)
    lock         held by the process that writes here

Each file is replaced in one step, so that a killed run leaves its last state whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from moepress.errors import ResumeError, WriteError
from moepress.pruning.train import State

_RUN, _STATE, _LOCK = "run.json", "state.pt", "lock"


class Unfinished:
    """The folder; a context manager that removes it where there is nothing to continue."""

    def __init__(self, target: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Raises ResumeError for a run that is there without `resume`, one with another fingerprint, or one that
        another process has in hand, WriteError where the folder cannot be made."""
        self.path = target.with_name(f".{target.name}.training")
        self._state = self.path / _STATE
        there = self._state.exists()
        if there and not resume:
            raise ResumeError(f"{self.path} is an unfinished run; continue it with --resume, or remove it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if there:
                self._compare(fingerprint)
            else:
                self._replace(self.path / _RUN, json.dumps(dict(fingerprint), indent=1).encode())
        except OSError as error:
            raise WriteError(f"{self.path} cannot be written: {error}") from error

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._state.exists():
            self.remove()
        self._lock.close()

    def load(self) -> State | None:
        """The state to continue from. Raises ResumeError for one that cannot be read."""
        if not self._state.exists():
            return None
        try:
            state: State = torch.load(self._state, map_location="cpu", weights_only=True)
        except Exception as error:  # torch names no error for a damaged file
            raise ResumeError(f"{self._state} cannot be read ({error}); remove {self.path} to start over") from error
        return state

    def save(self, state: State) -> None:
        """Replaces the stored state."""
        draft = self._state.with_suffix(".part")
        try:
            with draft.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._state)
        except OSError as error:
            raise WriteError(f"{self._state} cannot be written: {error}") from error

    def remove(self) -> None:
        """When the target is published."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _acquire(self) -> None:
        self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ResumeError(f"another process is training into {self.path}; wait for it or name another") from error

    def _compare(self, fingerprint: Mapping[str, Any]) -> None:
        mine, there = json.loads(json.dumps(dict(fingerprint))), {}
        with suppress(OSError, ValueError):
            there = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        changed = [key for key in {**mine, **there} if mine.get(key) != there.get(key)]
        if changed:
            self._lock.close()
            key = changed[0]
            raise ResumeError(
                f"cannot resume {self.path}: {key} was {there.get(key)} and is now {mine.get(key)}; restore it, or "
                "remove that folder to start over"
            )

    @staticmethod
    def _replace(path: Path, data: bytes) -> None:
        draft = path.with_suffix(".part")
        draft.write_bytes(data)
        draft.replace(path)
