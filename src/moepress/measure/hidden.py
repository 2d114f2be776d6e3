# SPDX-License-Identifier: Apache-2.0
"""HiddenStates: the activations of all calibration windows at one place of the model, on disk with a bounded cache.

Reads and writes are explicit (pread, pwrite), not a memory map: mapped pages would count as resident memory and grow
to the size of the file. A window is either whole in the cache or read from the file each time; the values are the
same, so the cache's limit changes speed and never bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from moepress.errors import CalibrationError, ReadError, WriteError

_PARTIAL = ".partial"
_ITEM = 4  # float32


class Pool:
    """How many bytes of hidden states may stay in memory, shared by all that live at the same time."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def take(self, size: int) -> bool:
        """Reserves `size` bytes if they fit."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        self.used -= size


class HiddenStates:
    """[windows, T, D] in float32.

    `lasting` states write every window to the file, under a temporary name until `complete`; others (scratch) write
    only what the cache cannot hold, and `close` deletes them. Raises WriteError when the disk is full.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], pool: Pool, *, lasting: bool = False) -> None:
        self.path, self.shape, self.lasting = path, shape, lasting
        self._pool, self._cache = pool, dict[int, torch.Tensor]()
        self._temporary: Path | None = path.with_name(path.name + _PARTIAL)
        try:
            self._check_room()
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.ftruncate(self._file, self.num_bytes)  # unwritten windows read as zeros and take no room
        except OSError as error:
            raise WriteError(f"{self._temporary} cannot be made: {error}; choose another work folder") from error

    @classmethod
    def open(cls, path: Path, shape: tuple[int, int, int], pool: Pool) -> HiddenStates:
        """Completed states of an earlier run. Raises CalibrationError if the file has another size."""
        self = cls.__new__(cls)
        self.path, self.shape, self.lasting = path, shape, True
        self._pool, self._cache, self._temporary = pool, {}, None
        size = path.stat().st_size if path.is_file() else -1
        if size != self.num_bytes:
            raise CalibrationError(
                f"{path} has {size} bytes, but hidden states of shape {shape} have {self.num_bytes}; start from layer 0"
            )
        self._file = os.open(path, os.O_RDONLY)
        return self

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self._window_bytes

    @property
    def _window_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * _ITEM

    def read(self, first: int, last: int) -> torch.Tensor:
        """Windows first to last - 1, [last - first, T, D], a copy."""
        out = torch.empty(last - first, *self.shape[1:])
        for window in range(first, last):
            if window not in self._cache:
                self._pread(out[window - first], window, 0)
                if not (self.lasting and self._room_for(window)):
                    continue
                self._cache[window].copy_(out[window - first])
            out[window - first] = self._cache[window]
        return out

    def write(self, first: int, values: torch.Tensor) -> None:
        """Sets windows from `first` on to values [n, T, D]."""
        values = values.detach().to("cpu", torch.float32)
        for window, value in enumerate(values, first):
            cached = self._room_for(window)
            if cached:
                self._cache[window].copy_(value)
            if self.lasting or not cached:
                self._pwrite(value, window, 0)

    def keep_zeros(self) -> None:
        """Lets the cache hold what it can of states that are all zero so far; the rest are holes in the file."""
        for window in range(self.shape[0]):
            if not self._room_for(window):
                return
            self._cache[window].zero_()

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The vectors [n, D] of tokens [n] (window * T + position, ascending); reads little more than those."""
        out = torch.empty(len(tokens), self.shape[2])
        for window, part, places in self._by_window(tokens):
            if window in self._cache:
                out[part] = self._cache[window][places]
            else:
                self._read_places(out[part], window, places)
        return out

    def add_rows(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """Adds values [n, D] to the vectors of tokens [n] (ascending, each once). For scratch states only."""
        values = values.detach().to("cpu", torch.float32)
        for window, part, places in self._by_window(tokens):
            if window in self._cache:
                self._cache[window][places] += values[part]
                continue
            total = torch.empty(len(places), self.shape[2])
            self._read_places(total, window, places)
            total += values[part]
            for start, length, place in _runs(places):
                self._pwrite(total[start : start + length], window, place)

    def release(self, first: int = 0, last: int | None = None) -> None:
        """Forgets what is cached of these windows, which for scratch states loses them."""
        for window in range(first, self.shape[0] if last is None else last):
            if self._cache.pop(window, None) is not None:
                self._pool.give(self._window_bytes)

    def complete(self) -> None:
        """The file gets its name only now, whole and on the disk, so what bears the name can be continued from."""
        assert self._temporary is not None and self.lasting
        try:
            os.fsync(self._file)
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._write_error(error) from error
        self._temporary = None

    def close(self) -> None:
        """Gives the memory back; deletes the file unless it was completed. A second call does nothing."""
        if self._file < 0:
            return
        self.release()
        os.close(self._file)
        self._file = -1
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def _room_for(self, window: int) -> bool:
        if window not in self._cache:
            if not self._pool.take(self._window_bytes):
                return False
            self._cache[window] = torch.empty(self.shape[1:])
        return True

    def _by_window(self, tokens: torch.Tensor) -> Iterator[tuple[int, slice, torch.Tensor]]:
        length, start = self.shape[1], 0
        found, counts = torch.unique_consecutive(tokens // length, return_counts=True)
        for window, count in zip(found.tolist(), counts.tolist(), strict=True):
            part = slice(start, start + count)
            yield window, part, tokens[part] - window * length
            start += count

    def _read_places(self, out: torch.Tensor, window: int, places: torch.Tensor) -> None:
        if 4 * len(places) > self.shape[1]:  # one long read beats many short ones
            whole = torch.empty(self.shape[1:])
            self._pread(whole, window, 0)
            torch.index_select(whole, 0, places, out=out)
            return
        for start, length, place in _runs(places):
            self._pread(out[start : start + length], window, place)

    def _pread(self, out: torch.Tensor, window: int, place: int) -> None:
        view, at = memoryview(out.numpy()).cast("B"), self._offset(window, place)
        while view.nbytes:
            try:
                count = os.preadv(self._file, [view], at)
            except OSError as error:
                raise ReadError(f"{self.path} cannot be read: {error}") from error
            if count == 0:
                raise ReadError(f"{self.path} ends at byte {at} of {self.num_bytes}; start from layer 0")
            view, at = view[count:], at + count

    def _pwrite(self, values: torch.Tensor, window: int, place: int) -> None:
        view, at = memoryview(values.contiguous().numpy()).cast("B"), self._offset(window, place)
        while view.nbytes:
            try:
                count = os.pwrite(self._file, view, at)
            except OSError as error:
                raise self._write_error(error) from error
            view, at = view[count:], at + count

    def _offset(self, window: int, place: int) -> int:
        return window * self._window_bytes + place * self.shape[2] * _ITEM

    def _check_room(self) -> None:
        cached = 0 if self.lasting else max(self._pool.limit - self._pool.used, 0)
        needed, free = self.num_bytes - cached, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise WriteError(
                f"{self.path.parent} has {free / 1e9:.2f} GB free, the hidden states {self.path.name} need "
                f"{needed / 1e9:.2f} GB; free some space, choose another work folder, or use fewer or shorter windows"
            )

    def _write_error(self, error: OSError) -> WriteError:
        free = shutil.disk_usage(self.path.parent).free
        return WriteError(
            f"{self.path} cannot be written ({error}): it needs {self.num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB "
            "are free; free some space and continue from the last complete layer"
        )


def _runs(places: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive places: (index of the first, how many, the first place)."""
    if not len(places):
        return
    breaks = (torch.diff(places) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
        yield start, end - start, int(places[start])
