# SPDX-License-Identifier: Apache-2.0
"""Packing loses nothing, wastes nothing, and puts every bit where the module's picture shows it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.format.packing import pack_codes, unpack_codes
from moepress.format.spec import packed_bytes

WIDTHS = range(1, 9)
widths = st.sampled_from(WIDTHS)


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


def written_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """The definition once more, one bit at a time: bit j of code i is bit i * bits + j of the stream."""
    out = [0] * math.ceil(len(codes) * bits / 8)
    for i, code in enumerate(codes):
        for j in range(bits):
            place = i * bits + j
            out[place // 8] |= (code >> j & 1) << place % 8
    return out


@given(bits=widths, lead=st.lists(st.integers(1, 3), max_size=3), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(bits: int, lead: list[int], count: int, seed: int) -> None:
    codes = random_codes(bits, *lead, count, seed=seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, math.ceil(count * bits / 8))
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@given(bits=widths, data=st.data())
def test_every_bit_lies_where_the_definition_puts_it(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == written_bit_by_bit(codes, bits)


def test_the_picture_for_three_bits() -> None:
    # codes a to h = 1 to 7 and 0: byte 0 is c c b b b a a a, byte 1 is f e e e d d d c, byte 2 is h h h g g g f f
    packed = pack_codes(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3)
    assert [f"{byte:08b}" for byte in packed.tolist()] == ["11010001", "01011000", "00011111"]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_position_survives(bits: int) -> None:
    levels = 2**bits
    codes = torch.arange(8 * levels).remainder(levels).to(torch.uint8)
    rolled = torch.stack([codes.roll(shift) for shift in range(8)])
    assert torch.equal(unpack_codes(pack_codes(rolled, bits), bits, 8 * levels), rolled)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 100, 129])
def test_bits_cost_bits(bits: int, count: int) -> None:
    packed = pack_codes(random_codes(bits, 2, count), bits)
    assert packed.shape[-1] == packed_bytes(count, bits) == -(-count * bits // 8)


def test_three_bits_cost_three_bits() -> None:
    assert pack_codes(random_codes(3, 128, 4096), 3).numel() * 8 == 3 * 128 * 4096


@pytest.mark.parametrize("bits", WIDTHS)
def test_spare_bits_of_a_ragged_row_are_zero(bits: int) -> None:
    full = torch.full((3, 13), 2**bits - 1, dtype=torch.uint8)
    last = pack_codes(full, bits)[:, -1]
    used = (13 * bits - 1) % 8 + 1
    assert last.tolist() == [2**used - 1] * 3


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_do_not_reach_into_each_other(bits: int) -> None:
    rows = random_codes(bits, 4, 11)
    assert torch.equal(pack_codes(rows, bits), torch.stack([pack_codes(row, bits) for row in rows]))


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_need_not_be_contiguous(bits: int) -> None:
    codes = random_codes(bits, 10, 24).T
    packed = pack_codes(codes, bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_codes(codes.contiguous(), bits))
    spread = torch.stack([packed, packed], -1)[..., 0]
    assert torch.equal(unpack_codes(spread, bits, 10), codes)


def test_other_dtypes_and_lengths_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"uint8, got torch\.int64"):
        pack_codes(torch.zeros(8, dtype=torch.long), 3)
    with pytest.raises(AssertionError, match="9 codes of 3 bits take 4 bytes, got 3"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 3, 9)
