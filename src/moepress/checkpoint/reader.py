# SPDX-License-Identifier: Apache-2.0
"""CheckpointReader: a Hugging Face safetensors folder as named tensors, read one at a time and never as a whole.

Everything is checked when the folder is opened, from headers alone: config, index, file names, header sanity, that
each tensor is where the index says. Pickled weights and remote code are never touched. Tensors are memory-mapped by
the safetensors library, so reading costs no anonymous memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moepress.checkpoint.fp8 import SCALE_SUFFIX, block_size, dequantize_blocks
from moepress.errors import CheckpointError, ReadError
from moepress.format.spec import ITEM_BYTES

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it; `dtype` in safetensors' words (BF16, F8_E4M3, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


class CheckpointReader:
    """Opens `folder`; use as a context manager. Raises CheckpointError naming the file for anything unsound."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; name the folder that holds config.json")
        self.config: dict[str, Any] = read_json(self.folder / CONFIG)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        try:
            self._fp8_block = block_size(self.config)
            self.files, weight_map = weight_files(self.folder)
            self.tensors = self._read_headers(weight_map)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def load(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The tensor as stored, on the CPU; with `expert`, only that index of its first dimension."""
        info = self.tensors[name]
        try:
            if expert is None:
                return self._open[info.file].get_tensor(name)
            return self._open[info.file].get_slice(name)[expert]
        except (SafetensorError, OSError, ValueError) as error:
            raise ReadError(f"{self.folder / info.file}: {name} cannot be read: {error}") from error

    def load_float(self, name: str, expert: int | None = None) -> torch.Tensor:
        """Like `load`, but an FP8 tensor comes as bfloat16 with its block scales applied."""
        tensor = self.load(name, expert)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self.tensors:
            raise CheckpointError(f"{name} is FP8 but {scale_name} is missing; its values cannot be known without it")
        return dequantize_blocks(name, tensor, self.load(scale_name), self._fp8_block)

    def _read_headers(self, weight_map: dict[str, str] | None) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            handle = self._open_file(file)
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if name in tensors:
                    raise CheckpointError(f"tensor {name} is in two files, {tensors[name].file} and {file}; delete one")
                view = handle.get_slice(name)
                info = TensorInfo(name, view.get_dtype(), tuple(view.get_shape()), file)
                if info.dtype not in ITEM_BYTES:
                    raise CheckpointError(f"{file}: tensor {name} has dtype {info.dtype}, which moepress cannot read")
                tensors[name] = info
        for name, file in (weight_map or {}).items():
            if name not in tensors or tensors[name].file != file:
                found = tensors[name].file if name in tensors else "no file"
                raise CheckpointError(f"{INDEX} says tensor {name} is in {file}, but {found} holds it; fetch it again")
        if not tensors:
            raise CheckpointError(f"{self.folder} holds no tensors")
        return tensors

    def _open_file(self, file: str) -> Any:
        path = self.folder / file
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing although the index names it; fetch it again") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}; fetch it again") from error
        self._open[file] = handle
        return handle


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The safetensors files of a folder in order, and the index's tensor -> file map where there is an index."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no usable weight_map; fetch it again")
        return _inside(folder, sorted(set(weight_map.values()))), weight_map
    if (folder / SINGLE).exists():
        return [SINGLE], None
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".safetensors", ".gguf"})
    found = f"found {', '.join(others[:4])}" if others else "found no weights at all"
    raise CheckpointError(
        f"{folder} has neither {INDEX} nor {SINGLE} ({found}); moepress reads safetensors only, never pickles"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; this is not a Hugging Face checkpoint folder") from error
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no UTF-8, no JSON, or a number of 5000 digits
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _inside(folder: Path, files: Iterable[str]) -> list[str]:
    # a plain name only: an index must not make us read elsewhere (links are fine, hub caches consist of them)
    files = list(files)
    for file in files:
        if file in {"", ".", ".."} or PurePosixPath(file).name != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{folder / INDEX} names {file!r}, which is outside the folder; refusing to read it")
    return files
