# SPDX-License-Identifier: Apache-2.0
"""Any set of tensors, laid out and written, is read back by the safetensors library bit for bit."""

from __future__ import annotations

import json
import math
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moepress.checkpoint.layout import MAX_SHARD_BYTES, lay_out
from moepress.checkpoint.writer import CheckpointWriter
from moepress.errors import PlanError
from moepress.format.spec import ITEM_BYTES

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=4).map(tuple)),
    min_size=1, max_size=12,
)  # fmt: skip


def values(name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes as a tensor, the same for the same name; NaN patterns included."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    count = math.prod(shape) * ITEM_BYTES[dtype]
    limit = 2 if dtype == "BOOL" else 256
    data = torch.randint(0, limit, (count,), dtype=torch.uint8, generator=generator)
    return data.view(DTYPES[dtype]).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_every_dtype_that_can_be_sized_is_tested() -> None:
    assert set(DTYPES) == set(ITEM_BYTES)
    assert all(dtype.itemsize == ITEM_BYTES[name] for name, dtype in DTYPES.items())


@settings(max_examples=120)
@given(TENSORS, st.integers(1200, 60_000))
def test_what_is_written_is_read_back(tensors: dict[str, tuple[str, tuple[int, ...]]], limit: int) -> None:
    try:
        layout = lay_out(tensors, limit)
    except PlanError:
        largest = max(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values())
        assert largest + 1200 > limit
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        with CheckpointWriter(target, layout, {"a": "b"}) as out:
            for name, (dtype, shape) in tensors.items():
                out.put(name, [(name, None, values(name, dtype, shape))])
            out.publish()
        assert {path.name: path.stat().st_size for path in target.iterdir()} == dict(layout.sizes)
        assert sum(path.stat().st_size for path in target.iterdir()) == layout.file_bytes
        assert max(layout.sizes.values()) <= limit
        found = {}
        for path in target.iterdir():
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(found) == set(tensors)
    assert all(same_bits(found[name], values(name, *tensors[name])) for name in tensors)


@given(TENSORS, st.integers(1200, 60_000))
def test_places_are_aligned_disjoint_and_without_gaps(
    tensors: dict[str, tuple[str, tuple[int, ...]]], limit: int
) -> None:
    try:
        layout = lay_out(tensors, limit)
    except PlanError:
        return
    assert layout.tensor_bytes == sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values())
    for file, header in layout.headers.items():
        assert len(header) % 8 == 0
        here = sorted((p.offset, p.num_bytes, n) for n, p in layout.places.items() if p.file == file)
        end = len(header)
        for offset, size, name in here:
            assert offset == end, f"{name} does not follow the one before it"
            assert offset % ITEM_BYTES[tensors[name][0]] == 0, f"{name} is not aligned"
            end = offset + size
        assert end == layout.sizes[file]


@given(TENSORS)
def test_the_same_tensors_give_the_same_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    assert lay_out(tensors, 60_000).headers == lay_out(dict(tensors), 60_000).headers


@pytest.mark.parametrize("name", ["plain", "é" * 60, "\U0001f600" * 60, "\n" * 60, '"' * 200, "\x01" * 100])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1, 1, 1, 1, 1, 1, 1), (123_456, 1)])
def test_names_and_shapes_count_towards_the_shard(name: str, shape: tuple[int, ...]) -> None:
    tensors = {f"{name}{i}": ("U8", shape) for i in range(40)}
    limit = 1700 + math.prod(shape)
    layout = lay_out(tensors, limit)
    assert len(layout.sizes) > 1
    assert max(layout.sizes.values()) <= limit


def test_one_shard_has_no_index_and_several_have_one() -> None:
    tensors = {f"layers.{i}.w": ("F16", (8, 8)) for i in range(20)}
    single = lay_out(tensors)
    assert list(single.sizes) == ["model.safetensors"]
    assert single.index() is None
    many = lay_out(tensors, 1000)
    count = len(many.sizes)
    assert list(many.sizes) == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads(many.index() or b"")
    assert index["weight_map"] == {name: place.file for name, place in many.places.items()}
    assert index["metadata"]["total_size"] == 20 * 128 == many.tensor_bytes
    order = [many.places[name].file for name in tensors]
    assert order == sorted(order), "shards must follow the order that was asked for"


def test_a_tensor_larger_than_a_shard_is_named() -> None:
    with pytest.raises(PlanError, match=r"big takes 20[0-9]+ bytes and a shard holds at most 1500"):
        lay_out({"small": ("U8", (10,)), "big": ("F16", (10, 1000))}, 1500)


def test_the_default_shard_is_five_gigabytes() -> None:
    assert MAX_SHARD_BYTES == 5_000_000_000
    tensors = {f"w{i}": ("U8", (1 << 30,)) for i in range(10)}
    layout = lay_out(tensors)
    assert len(layout.sizes) == 3
    assert max(layout.sizes.values()) <= MAX_SHARD_BYTES
