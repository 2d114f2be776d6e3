# SPDX-License-Identifier: Apache-2.0
"""Walk: calibration windows through a model that need not fit into memory, one decoder layer at a time.

The hidden states between layers lie in a work folder. Boundary k is what layer k reads; the last two boundaries stay
there, so a run that was killed continues from either. All arithmetic is float32 and in a fixed order: the same input
gives the same bytes on the same machine, whatever the memory limit, and also when continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from moepress.errors import CalibrationError, WriteError
from moepress.measure.corpus import windows_digest
from moepress.measure.hidden import HiddenStates, Pool
from moepress.measure.layer_pass import LayerPass, Room
from moepress.measure.skeleton import Skeleton, Weights

_ABOUT = "walk.json"
_BOUNDARY = re.compile(r"boundary-(\d{5})\.f32")
_ADVICE = "start from layer 0 or name the folder of the run that you want to continue"


class Walk:
    """A calibration pass over `ids` [windows, T]. Only one walk may use a folder at a time."""

    def __init__(
        self,
        source: Weights,
        ids: torch.Tensor,
        *,
        folder: str | Path,
        device: str | torch.device = "cpu",
        memory: int = 4 << 30,
        batch: int | None = None,
        fingerprint: str = "",
    ) -> None:
        """`memory` bytes are kept to, roughly: half for cached hidden states, half for the experts of a stage.

        On an accelerator they limit what the host holds of hidden states between layers; a stage takes half of
        what the device has free. `batch` windows run at once, by default 1 on a CPU and 8 elsewhere, where one would
        leave the device idle. `fingerprint` is whatever else a continued run must
        share with the first one, such as a digest of the source and the settings.
        Raises CalibrationError for a model that cannot be run or ids that it has no embedding for.
        """
        _check_ids(ids, source.reader.config)
        if batch is None:
            batch = 1 if torch.device(device).type == "cpu" else 8
        if memory < 0 or batch < 1:
            raise CalibrationError(f"memory is {memory} bytes and batch {batch}; they must be at least 0 and 1")
        self.folder, self.ids, self.device = Path(folder), ids, torch.device(device)
        self._skeleton = Skeleton(source, self.device)
        self._memory, self._batch, self._pool = memory, batch, Pool(memory // 2)
        self.depth = self._skeleton.depth
        """How many layers there are."""
        hidden_size = self._skeleton.model.config.hidden_size
        self._shape = (int(ids.shape[0]), int(ids.shape[1]), int(hidden_size))
        self._about = {
            "version": "1",
            "ids": windows_digest(ids),
            "shape": str(self._shape),
            "config": hashlib.sha256(json.dumps(source.reader.config, sort_keys=True).encode()).hexdigest(),
            "batch": str(batch),
            "fingerprint": fingerprint,
        }

    def boundaries(self) -> list[int]:
        """The layers that a walk with these settings can start from with what the folder holds, 0 always among them."""
        return [0] if self._difference() else sorted({0, *self._stored()})

    def layers(self, start: int = 0) -> Iterator[LayerPass]:
        """Yields each layer from `start` on; one that the consumer did not finish is finished when asked for the next.

        With `start` above 0, continues from the stored boundary. Raises CalibrationError if it is not there or of
        another run.
        """
        calls = self._skeleton.embed(self.ids[:1])[1]
        states = self._embed() if start == 0 else self._open(start)
        # later ones are of a run whose layers may have been replaced by other weights
        self._forget(range(start + 1, 10**6))
        try:
            for number in range(start, self.depth):
                target = self._path(number + 1)
                layer = LayerPass(self._skeleton, self._room(), number, calls[number], states, target)
                try:
                    yield layer
                    layer.finish()
                finally:
                    layer.close()
                    states = layer.output or states
                self._forget(range(number))
        finally:
            states.close()

    def read(self, boundary: int, first: int, last: int) -> torch.Tensor:
        """Hidden states [last - first, T, D] of windows at a stored boundary; the last is before the final norm."""
        states = self._open(boundary)
        try:
            return states.read(first, last)
        finally:
            states.close()

    def _room(self) -> Room:
        """What a layer's pass may use now."""
        stage, resident = self._memory - self._memory // 2, 0
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            # three scratch states may live at once, with room for the layer between a stage and them
            stage, resident = free // 2, free // 10
        return Room(
            self.folder, self._pool, stage, self._shape[0], self._shape[1], self._batch, self.device, resident
        )  # fmt: skip

    def _path(self, boundary: int) -> Path:
        return self.folder / f"boundary-{boundary:05}.f32"

    def _embed(self) -> HiddenStates:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._forget(range(10**6))
            _write_json(self.folder / _ABOUT, self._about)
        except OSError as error:
            raise WriteError(f"{self.folder} cannot serve as a work folder: {error}; choose another") from error
        states = HiddenStates(self._path(0), self._shape, self._pool, lasting=True)
        try:
            for first in range(0, self._shape[0], self._batch):
                states.write(first, self._skeleton.embed(self.ids[first : first + self._batch])[0])
            states.complete()
        except BaseException:
            states.close()
            raise
        return states

    def _open(self, boundary: int) -> HiddenStates:
        if key := self._difference():
            raise CalibrationError(f"{self.folder} holds hidden states of another run ({key} differs); {_ADVICE}")
        if boundary not in self._stored():
            stored = ", ".join(map(str, self._stored())) or "none"
            raise CalibrationError(f"{self.folder} holds no boundary {boundary} (stored: {stored}); {_ADVICE}")
        return HiddenStates.open(self._path(boundary), self._shape, self._pool)

    def _difference(self) -> str | None:
        """What keeps the folder's states from being ours, or None."""
        try:
            about = json.loads((self.folder / _ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return _ABOUT
        if not isinstance(about, dict):
            return _ABOUT
        return next((key for key, value in self._about.items() if about.get(key) != value), None)

    def _stored(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(found.group(1)) for name in names if (found := _BOUNDARY.fullmatch(name)))

    def _forget(self, boundaries: range) -> None:
        for number in self._stored():
            if number in boundaries:
                self._path(number).unlink(missing_ok=True)


def _check_ids(ids: torch.Tensor, config: dict[str, object]) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise CalibrationError(
            f"calibration ids are whole numbers [windows, length], not {ids.dtype} {tuple(ids.shape)}"
        )
    vocabulary = config.get("vocab_size")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise CalibrationError(
            f"token ids run from {low} to {high}, the model knows 0 to {vocabulary} - 1; use the model's own tokenizer"
        )


def _write_json(path: Path, body: dict[str, str]) -> None:
    temporary = path.with_suffix(".partial")
    try:
        temporary.write_text(json.dumps(body, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
