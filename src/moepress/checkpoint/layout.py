# SPDX-License-Identifier: Apache-2.0
"""Layout: where every byte of the target will lie, decided before the first weight is read. Pure.

A safetensors file is 8 bytes of header length, a JSON header and the data. Since a plan fixes every tensor's dtype and
shape, headers can be written first and tensors (or single experts' slices of a stacked one) then go to their offsets
in any order. That is what makes runs resumable, their bytes reproducible and their size known in advance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from moepress.checkpoint.reader import SINGLE
from moepress.errors import PlanError
from moepress.format.spec import ITEM_BYTES

MAX_SHARD_BYTES = 5_000_000_000
_ALIGN = 8


@dataclass(frozen=True)
class Place:
    """Absolute position of one tensor in its shard; `slots` is its leading dimension, for writing it piecewise."""

    file: str
    offset: int
    num_bytes: int
    slots: int


@dataclass(frozen=True)
class Layout:
    """All shards: file -> header bytes and size, tensor -> place."""

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, Place]

    @property
    def tensor_bytes(self) -> int:
        return sum(place.num_bytes for place in self.places.values())

    @property
    def file_bytes(self) -> int:
        return sum(self.sizes.values())

    def index(self) -> bytes | None:
        """The text of model.safetensors.index.json, or None for a single file."""
        if len(self.sizes) == 1:
            return None
        weight_map = {name: place.file for name, place in sorted(self.places.items())}
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        return (json.dumps(index, indent=2) + "\n").encode()


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]], max_shard_bytes: int = MAX_SHARD_BYTES) -> Layout:
    """Tensor name -> (dtype, shape), in the order wanted, to shards of at most `max_shard_bytes` of file.

    Raises PlanError where one tensor alone is larger than a shard.
    """
    shards = _split(tensors, max_shard_bytes)
    headers, sizes, places = {}, {}, {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        # wide dtypes first, so that every tensor starts at a multiple of its element size
        ordered = sorted(names, key=lambda name: -ITEM_BYTES[tensors[name][0]])
        offsets, end = {}, 0
        for name in ordered:
            offsets[name] = end
            end += _num_bytes(tensors[name])
        headers[file] = _header({name: tensors[name] for name in ordered}, offsets)
        sizes[file] = len(headers[file]) + end
        for name, offset in offsets.items():
            dtype, shape = tensors[name]
            places[name] = Place(file, len(headers[file]) + offset, _num_bytes((dtype, shape)), (shape or (1,))[0])
    return Layout(headers, sizes, places)


def _split(tensors: Mapping[str, tuple[str, tuple[int, ...]]], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        # 160 bytes cover this tensor's entry in the header besides its name, and the header's own beginning
        size = _num_bytes(tensor) + len(json.dumps(name)) + len(str(tensor[1])) + 160
        if size > limit:
            raise PlanError(f"{name} takes {size} bytes and a shard holds at most {limit}; raise the shard size")
        if used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], offsets: Mapping[str, int]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in tensors.items():
        span = [offsets[name], offsets[name] + _num_bytes((dtype, shape))]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _num_bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return ITEM_BYTES[dtype] * math.prod(shape)
