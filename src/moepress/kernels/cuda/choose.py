# SPDX-License-Identifier: Apache-2.0
"""Which instance of which kernel runs a problem, and with how much shared memory. Pure arithmetic.

The rules come from measurements on an H200 (docs/LOG.md): warps that share a row block, and how many tokens make a
tile. A tile of 8 tokens multiplies plain codes; wider ones multiply scaled weights, and 128 has two row tiles a
warpgroup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moepress.kernels.records import BLOCKS, RecordLayout

Mode = Literal["DENSE", "GATE_UP", "DOWN"]
"""What a kernel's product is for: a matrix, or one half of a layer of experts."""
WARPS = 32
"""Warps of a block of `gemv`."""
RESERVED = 1024
"""Shared bytes that the system keeps of each block, and those lost to aligning the ring of `grouped`."""


@dataclass(frozen=True)
class Bank:
    """What a kernel has to know of a bank: its widths once each, and the sides that all its matrices share."""

    layouts: tuple[RecordLayout, ...]

    @property
    def any(self) -> RecordLayout:
        return self.layouts[0]

    @property
    def uniform_bits(self) -> int:
        """The template's B: the word width of all matrices, or 0 where they differ."""
        widths = {layout.word_bits for layout in self.layouts}
        return widths.pop() if len(widths) == 1 else 0

    @property
    def most_bits(self) -> int:
        """The widest word; mixed banks know only 4 and 8, which bounds how many kernels there are."""
        most = max(layout.word_bits for layout in self.layouts)
        return most if self.uniform_bits else max(4, most)

    @property
    def record_bytes(self) -> int:
        """Of the widest record."""
        layout = self.any
        return 128 * layout.units * self.most_bits + 64 * layout.groups_per_record

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows that are not all padding."""
        return -(-self.any.rows // 16)

    @property
    def segments(self) -> int:
        """Sums of x a unit."""
        return 2 if self.any.group_size == 32 else 1

    @property
    def sum_floats(self) -> int:
        """Floats of a segment's sums."""
        return 2 if self.uniform_bits else 8

    @property
    def record_sums(self) -> int:
        """Floats of a token's sums of one record; copies take multiples of 16 bytes."""
        return max(4, self.any.units * self.segments * self.sum_floats)

    @property
    def template(self) -> str:
        """The template arguments that all kernels begin with: B, MAX_B, U, G."""
        layout = self.any
        return f"{self.uniform_bits}, {self.most_bits}, {layout.units}, {layout.group_size}"


def gemv_warps(row_blocks: int, processors: int) -> int:
    """Warps that share a row block: few where row blocks are many, so that none of the 32 waits."""
    for warps, needed in ((4, 3.0), (8, 1.5)):
        if row_blocks >= needed * processors:
            return warps
    return 16


def gemv_shared(bank: Bank, stages: int, rows_of_x: int, tokens: int) -> int:
    """Dynamic shared bytes of `gemv`: rings, their barriers, x and its sums."""
    layout = bank.any
    units = layout.records_per_row_block * layout.units
    words = units * 32 + (4 if tokens > 1 else 0)
    ring = WARPS * stages * (bank.record_bytes + 8)
    return ring + 4 * rows_of_x * (words + units * bank.segments * bank.sum_floats)


def gemv_stages(bank: Bank, rows_of_x: int, tokens: int, available: int) -> int:
    """Records that each warp has under way, 2 to 4; 0 where x and two of them do not fit."""
    return next((n for n in (4, 3, 2) if gemv_shared(bank, n, rows_of_x, tokens) + RESERVED <= available), 0)


@dataclass(frozen=True)
class Tile:
    """How `grouped` cuts a problem: tokens a tile, row tiles of 64 a warpgroup, warpgroups along rows and columns."""

    tokens: int
    row_tiles: int
    row_groups: int
    column_groups: int
    blocks: int = 1
    """Blocks that share a multiprocessor: while one stores its tile, another multiplies."""

    @property
    def scales_after(self) -> bool:
        """Whether products of plain codes are scaled, which takes the sums of x."""
        return self.tokens <= 16 and self.row_tiles == 1

    @property
    def threads(self) -> int:
        many_registers = self.row_tiles * self.tokens >= 128
        return 128 * self.row_groups * self.column_groups + (128 if many_registers else 32)

    @property
    def template(self) -> str:
        return f"{self.row_tiles}, {self.row_groups}, {self.column_groups}, {self.blocks}"

    def stage_bytes(self, bank: Bank) -> int:
        """Shared bytes of one stage of the ring, as `Config` in grouped.cu has it."""
        layout, columns = bank.any, self.column_groups
        blocks = BLOCKS * self.row_tiles * self.row_groups
        used = columns * (128 * layout.units * self.tokens + blocks * bank.record_bytes)
        if self.scales_after:
            used = _up(used, 128) + 4 * columns * self.tokens * bank.record_sums
        return _up(used, 1024)

    def stages(self, bank: Bank, available: int) -> int:
        """Stages that fit where a block's share of shared memory is `available` bytes; below 2 the tile cannot run."""
        return min(8, (available - RESERVED) // self.stage_bytes(bank))


def expert_tiles(bank: Bank, tokens_each: float) -> Sequence[Tile]:
    """Tiles for experts of `tokens_each` tokens on average, best first; the first that fits runs."""
    long = bank.any.padded_columns >= 24 * 64  # enough columns for two warpgroups to share
    if tokens_each <= 6:
        best = Tile(8, 1, 2, 2) if long else Tile(8, 1, 2, 1, blocks=2)
    elif tokens_each <= 28:
        best = Tile(32, 1, 2, 2) if long else Tile(32, 1, 2, 1, blocks=2)
    else:
        best = Tile(96, 2, 2, 1) if tokens_each <= 80 else Tile(128, 2, 2, 1)
    return best, Tile(best.tokens if best.tokens <= 32 else 64, 1, 2, 1), Tile(8, 1, 1, 1)


def dense_tiles(bank: Bank, tokens: int, processors: int) -> Sequence[Tile]:
    """The same for one matrix: wide tiles only where they are enough to keep most of the GPU busy."""
    if tokens <= 8:
        best = Tile(8, 1, 2, 2) if bank.row_blocks >= 6 * processors else Tile(8, 1, 1, 4)
    elif tokens > 64 and -(-bank.row_blocks // 16) * -(-tokens // 128) >= 0.8 * processors:
        best = Tile(128, 2, 2, 1)
    else:
        best = Tile(32, 1, 2, 2) if bank.row_blocks >= 6 * processors else Tile(32, 1, 1, 4)
    return best, Tile(best.tokens if best.tokens <= 32 else 64, 1, 1, 2), Tile(8, 1, 1, 1)


def _up(x: int, to: int) -> int:
    return -(-x // to) * to
