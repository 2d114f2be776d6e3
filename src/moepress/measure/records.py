# SPDX-License-Identifier: Apache-2.0
"""Texts in records: JSON Lines by line offsets, and folders of the `datasets` library (an optional import)."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, overload

from moepress.errors import CalibrationError


class JsonLines(Sequence[str]):
    """The `field` of each line of an open file; only where lines begin is kept in memory."""

    def __init__(self, path: Path, file: IO[bytes], field: str) -> None:
        self._path, self._file, self._field = path, file, field
        self._lines = array("q", [0])
        file.seek(0)
        for line in file:
            self._lines.append(self._lines[-1] + len(line))

    def __len__(self) -> int:
        return len(self._lines) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.seek(self._lines[index])
        line = self._file.read(self._lines[index + 1] - self._lines[index])
        if not line.strip():
            return ""
        try:
            body = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{self._path}, line {index + 1} is no JSON: {error}") from error
        return _text(body, self._field, f"{self._path}, line {index + 1}")


class _Rows(Sequence[str]):
    """The `field` of each row of a `datasets.Dataset`."""

    def __init__(self, path: Path, rows: Any, field: str) -> None:
        self._path, self._rows, self._field = path, rows, field

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _text(self._rows[index], self._field, f"{self._path}, row {index}")


def _text(body: Any, field: str, where: str) -> str:
    text = body.get(field) if isinstance(body, dict) else None
    if not isinstance(text, str):
        has = f"the fields {', '.join(sorted(map(str, body)))}" if isinstance(body, dict) else type(body).__name__
        raise CalibrationError(
            f"{where} has no text under {field!r} (it has {has}); name the field that holds the text"
        )
    return text


@contextmanager
def dataset_records(path: Path, field: str) -> Iterator[Sequence[str]]:
    """A folder of `save_to_disk`, or one with .parquet or .jsonl files, as texts. Local files only, no code from them.

    Raises CalibrationError if the folder is neither or the package is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{path} is a folder, which the package `datasets` reads: pip install datasets, or give a .txt "
            "or .jsonl file"
        ) from error
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    kinds = {"parquet": ("*.parquet",), "json": ("*.jsonl", "*.jsonl.gz", "*.jsonl.xz")}
    found = {kind: sorted(str(f) for glob in globs for f in path.rglob(glob)) for kind, globs in kinds.items()}
    kind = next((kind for kind, files in found.items() if files), None)
    if not saved and kind is None:
        raise CalibrationError(f"{path} holds neither a saved dataset nor .parquet or .jsonl files")
    with tempfile.TemporaryDirectory() as cache:
        try:
            if saved:
                rows = _split(path, datasets.load_from_disk(str(path)))
            else:
                rows = datasets.load_dataset(kind, data_files=found[str(kind)], split="train", cache_dir=cache)
        except (ValueError, TypeError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise CalibrationError(f"{path} cannot be loaded by datasets: {error}") from error
        yield _Rows(path, rows, field)


def _split(path: Path, loaded: Any) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    name = "train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None
    if name is None:
        raise CalibrationError(f"{path} has the splits {', '.join(loaded)} and no train; name the folder of one split")
    return loaded[name]
