# SPDX-License-Identifier: Apache-2.0
"""Records lose nothing and put every bit where the layout says: against a loop over lanes that shares no code."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.format.packing import pack_codes
from moepress.format.spec import BITS, GROUP_SIZES, WeightSpec
from moepress.format.weight import dequantize_base
from moepress.kernels import records as module
from moepress.kernels.records import (
    Base,
    RecordLayout,
    deinterleave,
    dequantize_records,
    interleave,
    interleaved_rows,
    pack_gate_up,
    pack_parts,
    pack_records,
    unpack_records,
)

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
)
on_devices = pytest.mark.parametrize("device", ["cpu", CUDA])
each_width = pytest.mark.parametrize("bits", BITS)
each_group_size = pytest.mark.parametrize("group_size", GROUP_SIZES)

# every U, K that is and is not a multiple of 64, groups that are cut, that lie in padding or span two records
COLUMNS = (1, 33, 64, 70, 100, 128, 131, 192, 256, 300, 320, 384, 512)
layouts = st.builds(
    RecordLayout,
    rows=st.integers(1, 50),
    columns=st.one_of(st.sampled_from(COLUMNS), st.integers(1, 400)),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
)
leads = st.lists(st.integers(0, 3), max_size=2)


def random_base(layout: RecordLayout, *lead: int, seed: int = 0, device: str = "cpu") -> Base:
    """Any code; every fp16 bit pattern for scales and zeros."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, layout.rows)
    codes = torch.randint(0, 2**layout.bits, (*shape, layout.columns), generator=generator, dtype=torch.uint8)
    meta = torch.randint(-(2**15), 2**15, (2, *shape, layout.groups), generator=generator, dtype=torch.int16)
    scale, zero = meta.view(torch.float16).to(device)
    return codes.to(device), scale, zero


def random_parts(spec: WeightSpec, n: int, k: int, *lead: int, seed: int = 0) -> dict[str, torch.Tensor]:
    layout = RecordLayout(n, k, spec.bits, spec.group_size)
    generator = torch.Generator().manual_seed(seed)
    scale, zero = torch.randn((2, *lead, n, layout.groups), generator=generator).half()
    return {"packed": pack_codes(random_base(layout, *lead, seed=seed)[0], spec.bits), "scale": scale, "zero": zero}


def same_bits(found: Base, expected: Base) -> bool:
    """torch.equal, but a NaN equals itself, and 0 is not -0."""
    pairs = zip(found, expected, strict=True)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in ((a.contiguous(), b.contiguous()) for a, b in pairs)
    )


def place(width: int, pair: int, r: int, bit: int) -> tuple[int, int]:
    """(word, bit of the word) of one bit of the code of the even column, in words of codes that are `width` bits."""
    n, odd = pair // 2, 8 * (pair % 2)
    if width != 3:
        word, slot = divmod(4 * r + n, {1: 8, 2: 4, 4: 2, 8: 1}[width])
        return word, width * slot + odd + bit
    if n < 2:
        return r, 3 * n + odd + bit
    if n == 2:
        return 2, 3 * r + odd + bit
    return (r, 6 + odd + bit) if bit < 2 else (2, 6 + r + odd)


def by_the_book(codes: list[list[int]], scale: list[list[float]], zero: list[list[float]], bits: int, g: int) -> bytes:
    """All records of one matrix, bit by bit. Lists may be ragged against the padding; what is missing is 0."""
    n, k = len(codes), len(codes[0])
    width = {5: 8, 6: 8}.get(bits, bits)
    units = 4 if k % 256 == 0 else 2 if k % 128 == 0 else 1
    out = b""
    for rows in range(0, n, 64):
        for column in range(0, k, 64 * units):
            for row in range(rows, rows + 64, 16):
                out += record_by_the_book(codes, row, column, width, units)
                out += meta_by_the_book(scale, zero, row, column, units, g)
    return out


def record_by_the_book(codes: list[list[int]], row: int, column: int, width: int, units: int) -> bytes:
    out = bytearray(128 * units * width)
    for u in range(units):
        for lane in range(32):
            words = [0] * width
            for p in range(8):
                for r in range(2):
                    for e in range(2):
                        y = row + lane // 4 + 8 * r
                        x = column + 64 * u + 16 * (p // 2) + 8 * (p % 2) + 2 * (lane % 4) + e
                        code = codes[y][x] if y < len(codes) and x < len(codes[0]) else 0
                        for bit in range(width):
                            word, where = place(width, p, r, bit)
                            words[word] |= (code >> bit & 1) << (16 * e + where)
            for w, word in enumerate(words):
                chunk, j = divmod(u * width + w, units)
                at = chunk * 128 * units + lane * 4 * units + 4 * j
                out[at : at + 4] = struct.pack("<I", word)
    return bytes(out)


def meta_by_the_book(
    scale: list[list[float]], zero: list[list[float]], row: int, column: int, units: int, g: int
) -> bytes:
    out = b""
    for y in range(row, row + 16):
        for group in range(max(1, 64 * units // g)):
            x = column // g + group
            inside = y < len(scale) and x < len(scale[0])
            out += struct.pack("<ee", scale[y][x], zero[y][x]) if inside else bytes(4)
    return out


@on_devices
@each_group_size
@each_width
@pytest.mark.parametrize(("n", "k"), [(16, 64), (5, 70), (17, 131), (18, 128), (16, 256), (3, 192), (2, 512)])
def test_every_bit_lies_where_the_layout_puts_it(bits: int, group_size: int, n: int, k: int, device: str) -> None:
    layout = RecordLayout(n, k, bits, group_size)
    codes, _, _ = random_base(layout, seed=n + bits)
    scale, zero = torch.randn((2, n, layout.groups), generator=torch.Generator().manual_seed(k)).half()
    expected = by_the_book(codes.tolist(), scale.tolist(), zero.tolist(), bits, group_size)
    packed = pack_records(codes.to(device), scale.to(device), zero.to(device), layout)
    assert packed.dtype == torch.uint8 and packed.device.type == device and packed.is_contiguous()
    assert packed.shape == layout.shape and packed.numel() == layout.num_bytes
    assert bytes(packed.flatten().tolist()) == expected


@given(layout=layouts, lead=leads, seed=st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(layout: RecordLayout, lead: list[int], seed: int) -> None:
    base = random_base(layout, *lead, seed=seed)
    packed = pack_records(*base, layout)
    assert packed.shape == (*lead, *layout.shape)
    assert same_bits(unpack_records(packed, layout), base)


@settings(max_examples=30)
@given(layout=layouts, data=st.data())
def test_any_codes_survive(layout: RecordLayout, data: st.DataObject) -> None:
    count = layout.rows * layout.columns
    drawn = data.draw(st.lists(st.integers(0, 2**layout.bits - 1), min_size=1, max_size=300))
    codes = torch.tensor((drawn * math.ceil(count / len(drawn)))[:count], dtype=torch.uint8)
    base = codes.view(layout.rows, layout.columns), *random_base(layout)[1:]
    assert same_bits(unpack_records(pack_records(*base, layout), layout), base)


@on_devices
@each_width
@pytest.mark.parametrize("k", [64, 128, 256])
def test_every_code_at_every_position_survives(bits: int, k: int, device: str) -> None:
    levels = 2**bits
    layout = RecordLayout(16, k, bits, 64)
    codes = torch.arange(16 * k, device=device).remainder(levels).to(torch.uint8)
    rolled = torch.stack([codes.roll(shift) for shift in range(levels)]).view(levels, 16, k)
    _, scale, zero = random_base(layout, levels, device=device)
    assert same_bits(unpack_records(pack_records(rolled, scale, zero, layout), layout), (rolled, scale, zero))


@on_devices
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("k", [64, 128, 256, 512])
def test_every_bit_of_a_record_counts(bits: int, k: int, device: str) -> None:
    """Without padding, any bytes at all are the records of some weight, and of one only."""
    layout = RecordLayout(64, k, bits, 64)
    anything = torch.randint(0, 256, (3, *layout.shape), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
    anything = anything.to(device)
    assert torch.equal(pack_records(*unpack_records(anything, layout), layout), anything)


@pytest.mark.parametrize("bits", [5, 6])
def test_five_and_six_bits_take_a_byte_each(bits: int) -> None:
    layout, wide = RecordLayout(16, 128, bits, 64), RecordLayout(16, 128, 8, 64)
    base = random_base(layout)
    assert torch.equal(pack_records(*base, layout), pack_records(*base, wide))


def test_the_picture_for_three_bits() -> None:
    # lane 0, even column: pairs 0 to 7 of row 0 are 1 to 7 and 0, those of row 8 are 7 down to 1 and H = 0b110
    layout = RecordLayout(16, 64, 3, 64)
    codes, meta = torch.zeros((16, 64), dtype=torch.uint8), torch.zeros((16, 1), dtype=torch.float16)
    codes[0, ::8] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    codes[8, ::8] = torch.tensor([7, 6, 5, 4, 3, 2, 1, 6])
    packed = pack_records(codes, meta, meta, layout)[0, 0, 0]
    words = [int.from_bytes(bytes(packed[at : at + 4].tolist()), "little") for at in (0, 128, 256)]
    pieces = [f"{word:016b}" for word in words]
    assert [" ".join((bits[:2], bits[2:5], bits[5:8], bits[8:10], bits[10:13], bits[13:])) for bits in pieces] == [
        "00 100 010 11 011 001",
        "10 100 110 01 101 111",
        "10 010 110 01 011 101",
    ]
    codes[8, 57] = 1  # the odd column's H: its lowest bit is the last but one of word 1
    odd = pack_records(codes, meta, meta, layout)[0, 0, 0]
    assert (odd != packed).nonzero().tolist() == [[131]] and odd[131] == 64


# the first half of a sha256 of three small weights' records; kernels are written against these bytes
GOLDEN = {
    1: "b9747755e6a5dbf53c3cbfe0e7c76b34",
    2: "567c6d8970c0367a0a08b40cec78da67",
    3: "cf16d6f494de9b9d02c24a8da02a532b",
    4: "fdcfb51cd38f9e10ec704aee3c2983bd",
    5: "0cde1a872a69d4b922e90ac61fdc0238",
    6: "ebda846215899cfa00763da8414bda27",
    8: "32c666d146e08a10b607de1226e3e6d2",
}


@each_width
def test_the_layout_has_not_moved(bits: int) -> None:
    found = hashlib.sha256()
    for columns in (128, 192, 256):
        layout = RecordLayout(24, columns, bits, 64)
        mixed = torch.arange(1, 1 + 24 * columns) * 2654435761 % 2**32 >> 13
        codes = (mixed % 2**bits).to(torch.uint8).view(24, columns)
        scale, zero = (mixed[: 48 * layout.groups] % 2048 / 64).half().view(2, 24, layout.groups)
        found.update(bytes(pack_records(codes, scale, zero, layout).flatten().tolist()))
    assert found.hexdigest()[:32] == GOLDEN[bits]


@given(layout=layouts)
def test_sizes(layout: RecordLayout) -> None:
    assert layout.padded_rows % 64 == 0 and 0 <= layout.padded_rows - layout.rows < 64
    assert layout.padded_columns % 64 == 0 and 0 <= layout.padded_columns - layout.columns < 64
    assert layout.padded_columns == 64 * layout.units * layout.records_per_row_block
    assert layout.units == 1 or layout.columns == layout.padded_columns
    assert layout.record_bytes == layout.code_bytes + 64 * layout.groups_per_record
    assert layout.record_bytes % (16 * layout.units) == 0
    groups, in_block, blocks, size = layout.shape
    assert (16 * blocks * groups, size) == (layout.padded_rows, layout.record_bytes)
    assert layout.num_bytes == groups * in_block * blocks * size == pack_records(*random_base(layout), layout).numel()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@each_group_size
def test_bits_cost_bits(bits: int, group_size: int) -> None:
    layout, spec = RecordLayout(64, 768, bits, group_size), WeightSpec(bits=bits, group_size=group_size)
    assert layout.num_bytes == spec.num_bytes(64, 768)


@pytest.mark.parametrize(("k", "units"), [(64, 1), (192, 1), (100, 1), (128, 2), (384, 2), (256, 4), (768, 4)])
def test_units_of_a_record(k: int, units: int) -> None:
    assert RecordLayout(16, k, 3, 64).units == units


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="bits 7 is not supported"):
        RecordLayout(16, 64, 7, 64)
    with pytest.raises(PlanError, match="group_size 256 is not supported"):
        RecordLayout(16, 64, 3, 256)
    with pytest.raises(ValueError, match=r"shape \(0, 64\) has no records"):
        RecordLayout(0, 64, 3, 64)


def test_other_dtypes_shapes_and_codes_are_refused() -> None:
    layout = RecordLayout(16, 128, 3, 64)
    codes, scale, zero = random_base(layout)
    with pytest.raises(AssertionError, match=r"codes must be torch\.uint8, got torch\.int64"):
        pack_records(codes.long(), scale, zero, layout)
    with pytest.raises(AssertionError, match=r"zero must be torch\.float16, got torch\.float32"):
        pack_records(codes, scale, zero.float(), layout)
    with pytest.raises(AssertionError, match=r"scale must have shape \(16, 2\), got \(16, 1\)"):
        pack_records(codes, scale[:, :1], zero, layout)
    with pytest.raises(AssertionError, match=r"codes must have shape \(16, 128\), got \(16, 127\)"):
        pack_records(codes[:, 1:], scale, zero, layout)
    with pytest.raises(ValueError, match="code 8 does not fit into 3 bits"):
        pack_records(codes.clone().index_fill_(0, torch.tensor([3]), 8), scale, zero, layout)
    packed = pack_records(codes, scale, zero, layout)
    with pytest.raises(AssertionError, match=r"records must have shape \(1, 1, 4, 896\), got \(1, 1, 4, 895\)"):
        unpack_records(packed[..., 1:], layout)
    with pytest.raises(AssertionError, match=r"records must be torch\.uint8"):
        unpack_records(packed.char(), layout)


@each_width
def test_tensors_need_be_neither_contiguous_nor_aligned(bits: int) -> None:
    layout = RecordLayout(20, 128, bits, 32)
    codes, scale, zero = random_base(layout, 2)
    packed = pack_records(codes, scale, zero, layout)
    strided = (codes.mT.contiguous().mT, scale.mT.contiguous().mT, torch.stack([zero, zero], -1)[..., 0])
    assert torch.equal(pack_records(*strided, layout), packed)
    spread = torch.stack([packed, packed], -1)[..., 0]
    assert same_bits(unpack_records(spread, layout), (codes, scale, zero))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.flatten()])[1:].view(packed.shape)
    assert same_bits(unpack_records(shifted, layout), (codes, scale, zero))
    one = RecordLayout(16, 128, bits, 32)
    assert torch.equal(unpack_records(shifted[0, :1], one)[0], codes[0, :16])


@each_width
@pytest.mark.parametrize("budget", [1, 3 * 16 * 192, 10 * 16 * 192])
def test_chunks_make_no_difference(bits: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, spec = RecordLayout(70, 192, bits, 128), WeightSpec(bits=bits, group_size=128)
    base, gate, up = random_base(layout, 3), random_parts(spec, 70, 192, 3), random_parts(spec, 70, 192, 3, seed=1)

    def everything() -> list[torch.Tensor]:
        packed = pack_records(*base, layout)
        assert same_bits(unpack_records(packed, layout), base)
        return [packed, pack_parts(gate, spec, 70, 192), pack_gate_up(gate, up, spec, 70, 192)]

    at_once = everything()
    monkeypatch.setattr(module, "_CPU_CHUNK", budget)
    assert all(torch.equal(a, b) for a, b in zip(everything(), at_once, strict=True))


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    n=st.integers(1, 40),
    k=st.one_of(st.sampled_from(COLUMNS), st.integers(1, 300)),
    lead=leads,
)
def test_parts_and_their_records_are_the_same_weight(
    bits: int, group_size: int, n: int, k: int, lead: list[int]
) -> None:
    spec, layout = WeightSpec(bits=bits, group_size=group_size), RecordLayout(n, k, bits, group_size)
    parts = random_parts(spec, n, k, *lead, seed=n)
    packed = pack_parts(parts, spec, n, k)
    weight = dequantize_records(packed, layout)
    assert packed.shape == (*lead, *layout.shape) and weight.dtype == torch.float32
    assert torch.equal(weight, dequantize_base(parts, spec, k))
    base = unpack_records(packed, layout)
    assert torch.equal(pack_codes(base[0], bits), parts["packed"])
    assert same_bits(base[1:], (parts["scale"], parts["zero"]))


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    n=st.integers(1, 40),
    k=st.one_of(st.sampled_from(COLUMNS), st.integers(1, 300)),
    lead=leads,
)
def test_gate_and_up_come_apart_again(bits: int, group_size: int, n: int, k: int, lead: list[int]) -> None:
    spec = WeightSpec(bits=bits, group_size=group_size)
    gate, up = random_parts(spec, n, k, *lead, seed=n), random_parts(spec, n, k, *lead, seed=n + 1)
    packed = pack_gate_up(gate, up, spec, n, k)
    layout = RecordLayout(interleaved_rows(n), k, bits, group_size)
    assert packed.shape == (*lead, *layout.shape) and layout.rows % 16 == 0
    both = dequantize_records(packed, layout)
    found_gate, found_up = deinterleave(both, n)
    expected_gate, expected_up = (dequantize_base(parts, spec, k) for parts in (gate, up))
    assert torch.equal(found_gate, expected_gate) and torch.equal(found_up, expected_up)
    assert torch.equal(both, interleave(expected_gate, expected_up))


@given(n=st.integers(1, 40), k=st.integers(1, 9), lead=leads, dtype=st.sampled_from([torch.uint8, torch.float16]))
def test_interleaved_rows_lie_eight_by_eight(n: int, k: int, lead: list[int], dtype: torch.dtype) -> None:
    gate, up = torch.randint(1, 256, (2, *lead, n, k), generator=torch.Generator().manual_seed(n)).to(dtype)
    both = interleave(gate, up)
    assert both.dtype == dtype and both.shape == (*lead, interleaved_rows(n), k)
    assert both.shape[-2] == 2 * (n + -n % 8)
    for row in range(both.shape[-2]):
        source, i = (gate, up)[row % 16 // 8], row // 16 * 8 + row % 8
        expected = source[..., i, :] if i < n else torch.zeros_like(gate[..., 0, :])
        assert torch.equal(both[..., row, :], expected)
    assert all(torch.equal(a, b) for a, b in zip(deinterleave(both, n), (gate, up), strict=True))


def test_gate_and_up_that_do_not_match_are_refused() -> None:
    x = torch.zeros(8, 4)
    with pytest.raises(AssertionError, match=r"up must have shape \(8, 4\), got \(7, 4\)"):
        interleave(x, x[1:])
    with pytest.raises(AssertionError, match=r"up must be torch\.float32, got torch\.float16"):
        interleave(x, x.half())
    with pytest.raises(AssertionError, match="9 rows each make 32 rows, got 16"):
        deinterleave(torch.zeros(16, 4), 9)
    spec = WeightSpec(bits=3, group_size=64)
    two, three = random_parts(spec, 8, 64, 2), random_parts(spec, 8, 64, 3)
    with pytest.raises(AssertionError, match=r"different leading dimensions: \(2,\) and \(3,\)"):
        pack_gate_up(two, three, spec, 8, 64)
    with pytest.raises(AssertionError, match=r"packed must have shape \(2, 8, 48\), got \(2, 8, 24\)"):
        pack_parts(two, spec, 8, 128)


@on_devices
@each_width
def test_devices_agree(bits: int, device: str) -> None:
    spec = WeightSpec(bits=bits, group_size=32)
    gate, up = random_parts(spec, 20, 200, 3), random_parts(spec, 20, 200, 3, seed=1)
    there = [{name: tensor.to(device) for name, tensor in parts.items()} for parts in (gate, up)]
    packed = pack_gate_up(*there, spec, 20, 200)
    assert packed.device.type == device
    assert torch.equal(packed.cpu(), pack_gate_up(gate, up, spec, 20, 200))
    layout = RecordLayout(interleaved_rows(20), 200, bits, 32)
    found, _ = deinterleave(dequantize_records(packed, layout), 20)
    assert torch.equal(found.cpu(), dequantize_base(gate, spec, 200))
