# SPDX-License-Identifier: Apache-2.0
"""Records: a compressed weight in the order in which a GPU's tensor cores take it. Made at load, never on disk.

A record is what one warp fetches at once: 16 rows by 64 U columns, U = 4, 2 or 1 units side by side, their codes first
and then the scales and zeros that these codes need. A unit, 16 x 64, is four A operands of `mma.m16n8k16` or, with
bytes, two of `mma.m16n8k32`, so that a lane l = 4 g + t meets its own 32 codes and no others. Pair p = 0..7 of the lane
is two codes (e = 0, 1) next to each other in columns 8 p + 2 t + e, once in row g and once in row g + 8. Let a..h be
pairs 0..7 of row g and A..H those of row g + 8. The low half of a 32-bit word holds e = 0 and the high half, 16 bits up
in the same order, e = 1; and of each half, the low byte has the even pairs and the high byte the odd ones:

    4 bits   bit    15-12 11-8 7-4 3-0               3 bits   bit    15-14  13-11 10-8  7-6   5-3 2-0
             word 0   d    b    c   a                         word 0  h10    d     b    g10    c   a
             word 1   h    f    g   e                         word 1  H10    D     B    G10    C   A
             word 2   D    B    C   A                         word 2  H2 h2  F     f    G2 g2  E   e
             word 3   H    F    G   E                         (h10 are the lower two bits of code h, h2 its highest)

1 and 2 bits are packed as 4 bits are, with 8 and 4 pairs a half, and 8 bits with two; 5 and 6 bits take a byte each
here (word width B = 8). One shift and one mask of a word thus yield a code of both columns of a pair, in 16 bits each,
or the four codes of two pairs, in a byte each: operands for 16-bit numbers and for integers alike.

    record   | B chunks of 32 lanes x U words              | 16 rows x m groups of (scale, zero) in fp16 |
             | word i = u B + w of a lane: chunk i // U,   | m = max(1, 64 U / group_size); 4 bytes      |
             | place i % U: loads of 4 U bytes a lane      | at 128 U B + 4 (row m + group)              |

A matrix is records [ceil(N / 64)][ceil(K / 64 U)][4], contiguous and little-endian: the four row blocks that a
warpgroup multiplies at once lie together, and its next columns follow, so one copy fetches any run of them. Rows are
padded to 64 and columns to 64 (only U = 1 ever pads) with codes 0; padded rows, and groups that lie wholly in
padding, have scale 0 and zero 0. The padded columns of a short last group do have its scale and zero: a kernel must
multiply them by zeros. Where a group is wider than a record (128 and 64 columns), both of its records have it.

Storing weights in fragment order is MARLIN's idea (Frantar et al., arXiv 2408.11743), there for 4 bits. The 3-bit
words, 32 codes in 3 of which only g, h, G and H are in pieces, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from moepress.format.packing import unpack_codes
from moepress.format.spec import WeightSpec, packed_bytes
from moepress.format.weight import Parts, affine

TILE_ROWS, UNIT_COLUMNS = 16, 64
"""Rows and columns of a unit: the A operands of four `mma.m16n8k16` side by side."""

BLOCKS = 4
"""Row blocks that lie together: the 64 rows of a `wgmma`."""

_CPU_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 24
"""Codes packed or unpacked at once: the temporaries take several bytes a code."""

Base = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""uint8 codes [..., N, K], fp16 scale [..., N, G] and fp16 zero [..., N, G]."""


@dataclass(frozen=True)
class RecordLayout:
    """Where everything of an (N, K) weight lies in its records; pure arithmetic.

    Raises ValueError for sides below 1 and, as PlanError, for bits and group sizes that the format does not know.
    """

    rows: int
    columns: int
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        WeightSpec(bits=self.bits, group_size=self.group_size)  # refuses what the format does not know
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a weight of shape ({self.rows}, {self.columns}) has no records")

    @property
    def word_bits(self) -> int:
        """B: bits that a code takes in a record, and 32-bit words that a lane has of a unit."""
        return self.bits if self.bits <= 4 else 8

    @property
    def units(self) -> int:
        """U: units of 64 columns in a record."""
        return next(units for units in (4, 2, 1) if units == 1 or self.columns % (units * UNIT_COLUMNS) == 0)

    @property
    def record_columns(self) -> int:
        """Columns of a record, 64 U."""
        return UNIT_COLUMNS * self.units

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows with padding, a multiple of 4."""
        return BLOCKS * math.ceil(self.rows / (BLOCKS * TILE_ROWS))

    @property
    def padded_rows(self) -> int:
        """N rounded up to a multiple of 64."""
        return TILE_ROWS * self.row_blocks

    @property
    def records_per_row_block(self) -> int:
        """Records side by side that make 16 full rows."""
        return math.ceil(self.columns / self.record_columns)

    @property
    def padded_columns(self) -> int:
        """K rounded up to whole records."""
        return self.record_columns * self.records_per_row_block

    @property
    def groups(self) -> int:
        """G: groups of a row, the last of them possibly short."""
        return math.ceil(self.columns / self.group_size)

    @property
    def groups_per_record(self) -> int:
        """m: (scale, zero) pairs that a record has for each of its rows."""
        return max(1, self.record_columns // self.group_size)

    @property
    def records_per_group(self) -> int:
        """Records that a group reaches across: 2 for groups of 128 in records of 64 columns, else 1."""
        return max(1, self.group_size // self.record_columns)

    @property
    def code_bytes(self) -> int:
        """Bytes of one record's codes, and so the place of its first scale."""
        return 128 * self.units * self.word_bits

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: codes, scales and zeros."""
        return self.code_bytes + 4 * TILE_ROWS * self.groups_per_record

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the uint8 tensor of all records: [row blocks / 4, records a block, 4, bytes a record]."""
        return self.row_blocks // BLOCKS, self.records_per_row_block, BLOCKS, self.record_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all records of one weight, padding included."""
        return math.prod(self.shape)


def pack_records(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """uint8 codes [..., N, K], fp16 scale and zero [..., N, G] -> uint8 records [..., *layout.shape].

    AssertionError for other dtypes and shapes, ValueError for a code that does not fit into the layout's bits.
    """
    lead, flat = check_base(codes, scale, zero, layout)
    if layout.bits < 8 and codes.numel() and (largest := int(codes.max())) >= 2**layout.bits:
        raise ValueError(f"code {largest} does not fit into {layout.bits} bits")

    def chunk(experts: slice, blocks: slice) -> Base:
        rows = slice(TILE_ROWS * blocks.start, TILE_ROWS * blocks.stop)
        codes, scale, zero = (x[experts, rows] for x in flat)
        return codes, scale, zero

    return _pack_chunks(chunk, lead, layout, codes.device)


def pack_parts(parts: Parts, spec: WeightSpec, out_features: int, in_features: int) -> torch.Tensor:
    """A weight's stored parts -> uint8 records [..., *RecordLayout(N, K, bits, group_size).shape].

    Takes `packed`, `scale` and `zero` and leaves the compensator alone. AssertionError for tensors that are not those
    of this spec and shape.
    """
    layout = RecordLayout(out_features, in_features, spec.bits, spec.group_size)
    lead, flat = check_parts(parts, spec, out_features, in_features)

    def chunk(experts: slice, blocks: slice) -> Base:
        return _unpack_rows(flat, experts, slice(TILE_ROWS * blocks.start, TILE_ROWS * blocks.stop), layout)

    return _pack_chunks(chunk, lead, layout, parts["packed"].device)


def pack_gate_up(gate: Parts, up: Parts, spec: WeightSpec, out_features: int, in_features: int) -> torch.Tensor:
    """The stored parts of gate and up, both (N, K) -> the uint8 records of one weight of `interleaved_rows(N)` rows.

    Its layout is RecordLayout(interleaved_rows(N), K, bits, group_size), its row order that of `interleave`. Errors as
    in `pack_parts`.
    """
    layout = RecordLayout(interleaved_rows(out_features), in_features, spec.bits, spec.group_size)
    lead, flat_gate = check_parts(gate, spec, out_features, in_features)
    up_lead, flat_up = check_parts(up, spec, out_features, in_features)
    assert lead == up_lead, f"gate and up have different leading dimensions: {tuple(lead)} and {tuple(up_lead)}"

    def chunk(experts: slice, blocks: slice) -> Base:
        rows = slice(TILE_ROWS // 2 * blocks.start, TILE_ROWS // 2 * blocks.stop)
        both = (_unpack_rows(flat, experts, rows, layout) for flat in (flat_gate, flat_up))
        codes, scale, zero = (interleave(*matrices) for matrices in zip(*both, strict=True))
        return codes, scale, zero

    return _pack_chunks(chunk, lead, layout, gate["packed"].device)


def unpack_records(records: torch.Tensor, layout: RecordLayout) -> Base:
    """uint8 records [..., *layout.shape] -> (codes, scale, zero); the inverse of `pack_records`, padding removed.

    AssertionError for another dtype or shape.
    """
    lead = records.shape[:-4]
    _check("records", records, torch.uint8, (*lead, *layout.shape))
    flat = records.reshape(math.prod(lead), *layout.shape)
    codes = records.new_empty((flat.shape[0], layout.rows, layout.columns))
    scale = torch.empty((flat.shape[0], layout.rows, layout.groups), dtype=torch.float16, device=records.device)
    zero = torch.empty_like(scale)
    for experts, blocks in _chunks(flat.shape[0], layout, records.device):
        rows = slice(TILE_ROWS * blocks.start, TILE_ROWS * blocks.stop)
        chunk = _blocks(flat, experts, blocks).flatten(1, 2)
        for whole, part in (
            (codes, _codes_of(chunk[..., : layout.code_bytes], layout)),
            *zip((scale, zero), _meta_of(chunk[..., layout.code_bytes :], layout), strict=True),
        ):
            target = whole[experts, rows]
            target.copy_(part[:, : target.shape[1], : target.shape[2]])
    codes, scale, zero = (x.view(*lead, *x.shape[1:]) for x in (codes, scale, zero))
    return codes, scale, zero


def dequantize_records(records: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """uint8 records [..., *layout.shape] -> float32 (codes - zero) * scale [..., N, K]. Errors of `unpack_records`."""
    return affine(*unpack_records(records, layout), layout.group_size)


def interleaved_rows(rows: int) -> int:
    """Rows of the one weight that gate and up of `rows` rows each make together: each is padded to a multiple of 8."""
    half = TILE_ROWS // 2
    return 2 * half * math.ceil(rows / half)


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[..., n, k] twice -> [..., interleaved_rows(n), k]: 8 rows of gate and 8 of up by turns, n padded with zeros.

    Works for codes, scales and zeros alike. A lane then holds gate and up of the same output, in rows g and g + 8.
    AssertionError where the two differ in shape or dtype.
    """
    _check("up", up, gate.dtype, gate.shape)
    half = TILE_ROWS // 2
    both = (pad(x, (0, 0, 0, -x.shape[-2] % half)).unflatten(-2, (-1, half)) for x in (gate, up))
    return torch.stack(tuple(both), -3).flatten(-4, -2)


def deinterleave(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., interleaved_rows(n), k] -> gate and up, [..., n, k] each; the inverse of `interleave`.

    AssertionError where x has another number of rows.
    """
    assert x.shape[-2] == interleaved_rows(n), f"{n} rows each make {interleaved_rows(n)} rows, got {x.shape[-2]}"
    tiles = x.unflatten(-2, (-1, 2, TILE_ROWS // 2))
    gate, up = (half.flatten(-3, -2)[..., :n, :] for half in tiles.unbind(-3))
    return gate, up


def check_base(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: RecordLayout
) -> tuple[torch.Size, Base]:
    """The leading dimensions, and the tensors with these made one. AssertionError where they are not the layout's."""
    lead = codes.shape[:-2]
    _check("codes", codes, torch.uint8, (*lead, layout.rows, layout.columns))
    _check("scale", scale, torch.float16, (*lead, layout.rows, layout.groups))
    _check("zero", zero, torch.float16, (*lead, layout.rows, layout.groups))
    return lead, (_flatten_lead(codes), _flatten_lead(scale), _flatten_lead(zero))


def check_parts(parts: Parts, spec: WeightSpec, rows: int, columns: int) -> tuple[torch.Size, Base]:
    """The same of stored parts, codes packed. AssertionError where they are not those of the format."""
    packed, scale, zero = (parts[name] for name in ("packed", "scale", "zero"))
    lead = packed.shape[:-2]
    groups = math.ceil(columns / spec.group_size)
    _check("packed", packed, torch.uint8, (*lead, rows, packed_bytes(columns, spec.bits)))
    _check("scale", scale, torch.float16, (*lead, rows, groups))
    _check("zero", zero, torch.float16, (*lead, rows, groups))
    return lead, (_flatten_lead(packed), _flatten_lead(scale), _flatten_lead(zero))


class _Field(NamedTuple):
    """`width` bits of the codes of one pair, from bit `first` of both codes on, at bits `shift` and 16 + `shift`."""

    pair: int
    lower: int  # 0: row g, 1: row g + 8
    word: int
    shift: int
    first: int
    width: int

    @property
    def mask(self) -> int:
        return 0x00010001 * ((1 << self.width) - 1)


@cache
def _fields(word_bits: int) -> tuple[_Field, ...]:
    """The picture above. Packing and unpacking both read it."""
    if word_bits == 3:
        whole = [_Field(p, r, r, 3 * (p // 2) + 8 * (p % 2), 0, 3) for p in range(4) for r in range(2)]
        whole += [_Field(p, r, 2, 3 * r + 8 * (p % 2), 0, 3) for p in (4, 5) for r in range(2)]
        lower = [_Field(p, r, r, 6 + 8 * (p % 2), 0, 2) for p in (6, 7) for r in range(2)]
        return (*whole, *lower, *(_Field(p, r, 2, 6 + r + 8 * (p % 2), 2, 1) for p in (6, 7) for r in range(2)))
    each = 8 // word_bits  # codes of a byte
    return tuple(
        _Field(p, r, (4 * r + p // 2) // each, word_bits * ((4 * r + p // 2) % each) + 8 * (p % 2), 0, word_bits)
        for p in range(8)
        for r in range(2)
    )


def _chunks(experts: int, layout: RecordLayout, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of experts and of row blocks that cover all of them, some rows of one expert or all rows of some."""
    codes = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    tiles = BLOCKS * max(1, codes // (BLOCKS * TILE_ROWS * layout.padded_columns))
    step = max(1, tiles // layout.row_blocks)
    for expert in range(0, experts, step):
        for block in range(0, layout.row_blocks, tiles):
            yield slice(expert, expert + step), slice(block, block + tiles)


def _pack_chunks(
    chunk: Callable[[slice, slice], Base], lead: torch.Size, layout: RecordLayout, device: torch.device
) -> torch.Tensor:
    """Records from a function that makes codes, scale and zero of some experts and row blocks."""
    records = torch.empty((math.prod(lead), *layout.shape), dtype=torch.uint8, device=device)
    for experts, blocks in _chunks(records.shape[0], layout, device):
        codes, scale, zero = chunk(experts, blocks)
        target = _blocks(records, experts, blocks)
        target[..., : layout.code_bytes] = _code_bytes(codes, layout).unflatten(1, (-1, BLOCKS))
        target[..., layout.code_bytes :] = _meta_bytes(scale, zero, layout).unflatten(1, (-1, BLOCKS))
    return records.view(*lead, *layout.shape)


def _blocks(records: torch.Tensor, experts: slice, blocks: slice) -> torch.Tensor:
    """A view of some row blocks' records in their order, [E, blocks / 4, 4, records, bytes]."""
    return records[experts, blocks.start // BLOCKS : math.ceil(blocks.stop / BLOCKS)].transpose(2, 3)


def _code_bytes(codes: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """uint8 codes [E, n, K] -> uint8 [E, blocks, records, code_bytes]."""
    count, rows, columns = codes.shape
    padded = pad(codes, (0, layout.padded_columns - columns, 0, -rows % (BLOCKS * TILE_ROWS)))
    # expert, block, r, g, record, unit, pair, t, e -> pair, r, expert, block, record, unit, g, t, e
    tiles = padded.reshape(count, -1, 2, 8, layout.records_per_row_block, layout.units, 8, 4, 2)
    tiles = tiles.permute(6, 2, 0, 1, 4, 5, 3, 7, 8)
    pairs = tiles[..., 1].to(torch.int32) << 16
    pairs |= tiles[..., 0]
    words = torch.zeros((layout.word_bits, *pairs.shape[2:]), dtype=torch.int32, device=codes.device)
    for field in _fields(layout.word_bits):
        words[field.word] |= ((pairs[field.pair, field.lower] >> field.first) & field.mask) << field.shift
    # word, expert, block, record, unit, g, t -> expert, block, record, chunk, g, t, place
    words = words.movedim(0, 4).flatten(3, 4).unflatten(3, (layout.word_bits, layout.units)).movedim(4, -1)
    return words.flatten(3).view(torch.uint8)


def _codes_of(stored: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """uint8 [E, blocks, records, code_bytes] -> uint8 codes [E, 16 blocks, padded_columns]; undoes `_code_bytes`."""
    words = _viewed(stored, torch.int32).unflatten(-1, (layout.word_bits, 8, 4, layout.units)).movedim(-1, 4)
    words = words.flatten(3, 4).unflatten(3, (layout.units, layout.word_bits)).movedim(4, 0)
    pairs = torch.zeros((8, 2, *words.shape[1:]), dtype=torch.int32, device=stored.device)
    for field in _fields(layout.word_bits):
        # the mask also removes the sign bits that an arithmetic shift of a full word brings in
        pairs[field.pair, field.lower] |= ((words[field.word] >> field.shift) & field.mask) << field.first
    tiles = torch.stack(((pairs & 255).to(torch.uint8), (pairs >> 16).to(torch.uint8)), -1)
    tiles = tiles.permute(2, 3, 1, 6, 4, 5, 0, 7, 8)
    return tiles.reshape(stored.shape[0], TILE_ROWS * stored.shape[1], layout.padded_columns)


def _meta_bytes(scale: torch.Tensor, zero: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """fp16 scale and zero [E, n, G] -> uint8 [E, blocks, records, 64 m]."""
    meta = torch.stack((scale, zero), -1)
    wanted = layout.records_per_row_block * layout.groups_per_record
    if layout.records_per_group > 1:
        meta = meta.repeat_interleave(layout.records_per_group, 2)[:, :, :wanted]
    meta = pad(meta, (0, 0, 0, wanted - meta.shape[2], 0, -meta.shape[1] % (BLOCKS * TILE_ROWS)))
    # expert, block, row, record, group, scale or zero -> expert, block, record, row, group, scale or zero
    meta = meta.unflatten(2, (layout.records_per_row_block, -1)).unflatten(1, (-1, TILE_ROWS)).movedim(3, 2)
    return meta.flatten(3).view(torch.uint8)


def _meta_of(stored: torch.Tensor, layout: RecordLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [E, blocks, records, 64 m] -> fp16 scale and zero [E, 16 blocks, at least G]; undoes `_meta_bytes`."""
    meta = _viewed(stored, torch.float16).unflatten(-1, (TILE_ROWS, layout.groups_per_record, 2)).movedim(2, 3)
    meta = meta.flatten(3, 4).flatten(1, 2)[:, :, :: layout.records_per_group]
    return meta[..., 0], meta[..., 1]


def _viewed(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # always a copy: a slice that happens to be contiguous may begin at an address that the dtype cannot
    return stored.clone(memory_format=torch.contiguous_format).view(dtype)


def _unpack_rows(flat: Base, experts: slice, rows: slice, layout: RecordLayout) -> Base:
    packed, scale, zero = (x[experts, rows] for x in flat)
    return unpack_codes(packed, layout.bits, layout.columns), scale, zero


def _flatten_lead(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _check(name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert x.dtype == dtype, f"{name} must be {dtype}, got {x.dtype}"
    assert x.shape == shape, f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}"
