# SPDX-License-Identifier: Apache-2.0
"""Source: an opened checkpoint with its graph, and how one weight's values are read from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moepress.checkpoint.reader import CONFIG, INDEX, CheckpointReader
from moepress.errors import CheckpointError
from moepress.format.manifest import QUANT_METHOD
from moepress.graph.families import family_of
from moepress.graph.view import ModelGraph, WeightRef, build_graph
from moepress.plan.plan import source_digest
from moepress.progress import Progress, silent

FLOATS = {"BF16", "F16", "F32", "F8_E4M3"}
COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
NOT_COPIED = {CONFIG, INDEX, "moepress.json"}
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be compressed."""

    reader: CheckpointReader
    graph: ModelGraph
    digest: str
    """Of names, dtypes and shapes; what plans refer to."""

    @property
    def folder(self) -> Path:
        return self.reader.folder

    def weight(self, ref: WeightRef) -> torch.Tensor:
        """One matrix [N, K] in the source's float type (bfloat16 for FP8 sources), on the CPU."""
        tensor = self.reader.load_float(ref.tensor, ref.slot)
        return tensor if ref.rows is None else tensor[ref.rows[0] : ref.rows[1]]

    def copied_files(self) -> list[Path]:
        """Tokenizer, processor, configuration and licence files, which go to the target unchanged."""
        found = {path for pattern in COPIED for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name not in NOT_COPIED)

    def file_digests(self, progress: Progress = silent) -> dict[str, str]:
        """sha256 of every file that the target depends on, by name."""
        paths = [self.folder / name for name in (CONFIG, *self.reader.files)] + self.copied_files()
        total = sum(path.stat().st_size for path in paths)
        # hashlib releases the lock, so files are hashed side by side
        with progress("hashing the source", total) as advance, ThreadPoolExecutor(4) as pool:
            digests = pool.map(lambda path: _sha256(path, advance), paths)
            return dict(zip((path.name for path in paths), digests, strict=True))


@contextmanager
def open_source(folder: str | Path) -> Iterator[Source]:
    """Opens and checks a source folder. Raises CheckpointError for unsound, unknown or already compressed ones."""
    with CheckpointReader(folder) as reader:
        _refuse_quantised(reader)
        family = family_of(reader.config.get("model_type"))
        tensors = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
        graph = build_graph(family, tensors)
        if not graph.weights:
            raise CheckpointError(f"{folder} holds no weight of family {family.model_type} that could be compressed")
        for ref in graph.weights:
            if tensors[ref.tensor][0] not in FLOATS:
                raise CheckpointError(f"{ref.tensor} has dtype {tensors[ref.tensor][0]}; supported: {sorted(FLOATS)}")
        _check_depth(reader, graph)
        yield Source(reader, graph, source_digest(family.model_type, tensors))


def _refuse_quantised(reader: CheckpointReader) -> None:
    given = reader.config.get("quantization_config")
    if not isinstance(given, dict):
        return
    method = given.get("quant_method")
    if method == QUANT_METHOD:
        raise CheckpointError(f"{reader.folder} is already compressed by moepress; name the original checkpoint")
    if method != "fp8":
        raise CheckpointError(f"{reader.folder} is already quantised with {method!r}; name the original checkpoint")


def _check_depth(reader: CheckpointReader, graph: ModelGraph) -> None:
    depth = reader.config.get("num_hidden_layers")
    if not isinstance(depth, int):
        return
    layers = {ref.layer for ref in graph.weights}
    # stops at the first gap: a damaged config may say any number
    missing = next((layer for layer in range(depth) if layer not in layers), None)
    if missing is not None:
        raise CheckpointError(
            f"config.json says {depth} layers, but the files hold no weight of layer {missing}; a shard is missing"
        )


def _sha256(path: Path, advance) -> str:  # type: ignore[no-untyped-def]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()
