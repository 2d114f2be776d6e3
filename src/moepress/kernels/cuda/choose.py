# SPDX-License-Identifier: Apache-2.0
"""Which instance of which kernel runs a problem, and with how much shared memory. Pure arithmetic.

The rules come from measurements on an H200 and an H100 (docs/LOG.md): warps that share a row block, and how many tokens
make a tile. Tiles of 8 tokens multiply bytes, those of 24 codes with a base, whose sums are scaled; others multiply
scaled weights, and experts' tiles of 80 and more have two row tiles a warpgroup.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moepress.kernels.records import BLOCKS, RecordLayout

Mode = Literal["DENSE", "GATE_UP", "DOWN", "PLAIN"]
"""What a kernel's product is for: a matrix, one half of a layer of experts, or a factor of its compensators."""
WARPS = 32
"""Warps of a block of `gemv`."""
GEMV_STATIC = 41984
"""Shared bytes of which no instance of `gemv` declares more, as in gemv_active.cuh; the largest has 39,936."""
MAX_TOKENS, MAX_PAIRS = 8, 64
"""Most tokens of a launch of `gemv`, and most pairs of token and expert where tokens are several."""
MAX_SEGMENTS = 16
"""Segments of 64 results that a block of `gemv` makes bytes of, at most."""
PENDING = 4
"""Row blocks of gate and up of which a group of `gemv`'s warps adds u t together, at most."""
EXPERT_STAGES = 2
"""Records that a warp of `gemv` has under way in an experts' launch."""
EXAMPLES = 2, 8, 16, 24, 64, 160, 257
"""Numbers of tokens, on average of an expert, that ask for every best tile there is."""
MOST_TOKENS = 1 << 15
"""Tokens for which a dense layer's tiles are known beforehand."""
_NARROW = {80: 64, 128: 96, 144: 128}
"""Tokens up to which wide tiles run with smaller products, as `NARROW` in grouped_tiles.cuh has it."""
MAX_V_SPLITS = 16
"""Parts of v's columns in tiles of 24 tokens, at most."""
RESERVED = 1024
"""Shared bytes that the system keeps of each block; as many are lost to aligning the ring of `grouped`."""
HOPPER, OWN = 227 << 10, 12 << 10
"""Shared bytes that a block can have, and more than `grouped` declares for a dense layer or a factor besides sums."""


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
    def step(self) -> int:
        """Records that are multiplied between two looks at the ring: 256 columns."""
        return 4 // self.any.units

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows that are not all padding."""
        return -(-self.any.rows // 16)

    @property
    def units(self) -> int:
        """Of 64 columns, of a row; padding of the last record included."""
        return self.any.records_per_row_block * self.any.units

    @property
    def segments(self) -> int:
        """Scales and sums of x a unit."""
        return 2 if self.any.group_size == 32 else 1

    @property
    def record_sums(self) -> int:
        """Floats of a token's scales and sums of one record; copies take multiples of 16 bytes."""
        return max(4, 2 * self.any.units * self.segments)

    @property
    def template(self) -> str:
        """The template arguments that all kernels begin with: B, MAX_B, U, G."""
        layout = self.any
        return f"{self.uniform_bits}, {self.most_bits}, {layout.units}, {layout.group_size}"


@dataclass(frozen=True)
class Ranks:
    """What `gemv` has to know of compensators: the width of factors and how their records are cut."""

    bits: int
    units: int
    """Of a record of u."""
    u_records: int
    v_units: int

    @property
    def v_record_bytes(self) -> int:
        return self.v_units * (128 * self.bits + 64)


def ranks(v: RecordLayout, u: RecordLayout) -> Ranks:
    """Of the layouts of v and u."""
    return Ranks(u.word_bits, u.units, u.records_per_row_block, v.units)


def share_of(shared: int, blocks: int) -> int:
    """Shared bytes of each of `blocks` that a multiprocessor holds at a time, where one alone can have `shared`.

    All blocks of `grouped` have to be at work at once where some wait for t that others make.
    """
    return (shared + RESERVED) // blocks - RESERVED


@dataclass(frozen=True)
class Team:
    """How the warps of a block of `gemv` share work: groups with a row block each, warps that share its columns."""

    warps: int
    groups: int


def gemv_teams(
    mode: Mode, bank: Bank, tokens: int, slots: int, processors: int, *, ranked: bool = False
) -> Sequence[Team]:
    """Teams, best first: few warps share a row block where row blocks are many, so that none of the 32 waits.

    Where a row block has a multiprocessor to itself, one token's compensators of down (`ranked`) have a second group,
    for v (Qwen3-30B-A3B with rank 32 14.0 us, now 13.5; DeepSeek-MoE-16B 18.7, now 16.7, on an H200).
    """
    blocks = bank.row_blocks * (slots * tokens if mode == "GATE_UP" else 1)
    if blocks <= processors:
        best = 16 if ranked and mode == "DOWN" and tokens == 1 else 32
    else:
        best = next((warps for warps, needed in ((4, 3.0), (8, 1.5)) if blocks >= needed * processors), 16)
    teams = [Team(best, WARPS // best)]
    if tokens > 1:  # inputs take much of the shared memory
        teams += [Team(warps, 1) for warps in (24, 16)]
    return teams


@dataclass(frozen=True)
class Room:
    """Dynamic shared bytes of `gemv`."""

    inputs: int
    """x and its sums."""
    stage: int
    """One record of each warp's ring, and its barrier."""
    most: int
    """Stages at most."""

    def total(self, stages: int) -> int:
        return self.inputs + stages * self.stage

    def stages(self, available: int) -> int:
        """Records that each warp has under way, 2 to `most`; 0 where x and two of them do not fit."""
        return next((n for n in range(self.most, 1, -1) if self.total(n) + RESERVED <= available), 0)


def gemv_room(
    mode: Mode, bank: Bank, ranks: Ranks | None, tokens: int, slots: int, team: Team, processors: int
) -> Room:
    """Rings of two records, or up to four where a matrix has so many for each warp.

    What a multiprocessor has asked for is a queue, and whatever is asked for later comes after it. Of experts, whose
    launches follow each other, two records are enough to be at the speed of memory and keep it short (Mixtral-8x7B's
    T=1 with 2 bits 41 us with four, 35.4 with two, on an H200); a single matrix of 8192x8192 takes 2 % longer so.
    """
    rows = tokens * slots if mode == "DOWN" else tokens
    words = bank.units * 32 + gemv_row_sums(bank, tokens)
    record = max(bank.record_bytes, ranks.v_record_bytes if ranks else 0)
    each = -(-bank.row_blocks * bank.any.records_per_row_block // (WARPS * processors))
    most = min(4, max(2, each)) if mode == "DENSE" else EXPERT_STAGES
    return Room(_up(4 * rows * words, 16), team.warps * team.groups * (record + 8), most)


def gemv_candidates(
    mode: Mode, bank: Bank, ranks: Ranks | None, tokens: int, slots: int, processors: int, shared: int
) -> Sequence[Team]:
    """Teams of which one runs, best first: those that may fit into `shared` bytes, up to the first that does so surely.

    Which does so depends on what its kernel declares, which only the compiled one tells.
    """
    found = []
    for team in gemv_teams(mode, bank, tokens, slots, processors, ranked=ranks is not None):
        room = gemv_room(mode, bank, ranks, tokens, slots, team, processors)
        if room.stages(shared):
            found.append(team)
        if room.stages(shared - GEMV_STATIC):
            break
    return found


def gemv_row_sums(bank: Bank, tokens: int) -> int:
    """Floats of scales and sums that `gemv` has of a row of x; of several rows with padding."""
    return bank.units * bank.segments * 2 + (2 if tokens > 1 else 0)


def gemv_passes_bytes(team: Team, gate_up: Bank, down: Bank, tokens: int, slots: int, processors: int) -> bool:
    """Whether `gemv` of gate and up, with such a team, makes the bytes that down takes.

    A block has 64 results, a segment, in the eight row blocks of its eight groups; so whole segments, and only in
    segments of their own groups' size. With other teams whole segments would take more turns, and with few rows less
    is saved than whole segments cost (Qwen3-30B-A3B's two tokens 20.1 us for 19.0 on an H200).
    """
    segments = -(-tokens * slots * gate_up.row_blocks // (8 * processors))
    fits = gate_up.row_blocks == 8 * down.units and gate_up.segments == down.segments
    enough = tokens > 1 and tokens * slots * down.units >= 256
    return enough and team.groups == 8 and fits and segments <= MAX_SEGMENTS


@dataclass(frozen=True)
class Tile:
    """How `grouped` cuts a problem: tokens a tile, row tiles of 64 a warpgroup, warpgroups along rows and columns."""

    tokens: int
    row_tiles: int
    row_groups: int
    column_groups: int
    blocks: int = 1
    """Blocks that share a multiprocessor: while one stores its tile, another multiplies."""
    scales_sums: bool = False
    """Whether codes are multiplied as they are and their sums scaled, unit by unit, instead of the weights."""

    @property
    def narrow(self) -> int:
        """Tokens up to which a tile runs with smaller products, where widths are not mixed."""
        return _NARROW.get(self.tokens, self.tokens) if self.row_tiles > 1 else self.tokens

    @property
    def row_blocks(self) -> int:
        """Row blocks of a tile."""
        return BLOCKS * self.row_tiles * self.row_groups

    @property
    def takes_bytes(self) -> bool:
        """Whether x is multiplied as bytes (bytes.cuh)."""
        return self.tokens == 8 and self.row_tiles == 1

    @property
    def makes_bytes(self) -> bool:
        """Whether a tile of gate and up can make bytes of its results: it has whole units of 64 of them."""
        return self.takes_bytes and self.row_blocks % 8 == 0

    @property
    def multiplies_v(self) -> bool:
        """Whether t = v x of compensators is made in W's launch, as `V_BITS` in grouped_tiles.cuh has it; else before.

        In tiles of 32 tokens and more that took 2 to 5 % longer than a launch before (docs/LOG.md).
        """
        return self.takes_bytes or self.scales_sums

    @property
    def warps(self) -> int:
        """That multiply."""
        return 4 * self.row_groups * self.column_groups

    def v_tiles(self, v: Bank, experts: int, pairs: int) -> int:
        """Tiles of v of compensators at most, as `multiply_v` in grouped_compensate.cuh numbers them."""
        return (experts + pairs // self.tokens) * -(-v.row_blocks // BLOCKS)

    @property
    def v_floats(self) -> int:
        """Of the results of a tile of v: 16 rows by 8 tokens for each warp."""
        return 16 * 8 * self.warps

    @property
    def threads(self) -> int:
        many_registers = self.row_tiles * self.tokens >= 128 or self.scales_sums
        return 128 * self.row_groups * self.column_groups + (128 if many_registers else 32)

    @property
    def template(self) -> str:
        shape = f"{self.row_tiles}, {self.row_groups}, {self.column_groups}, {self.blocks}"
        return f"{shape}, {str(self.scales_sums).lower()}"

    def stage_bytes(self, bank: Bank, ranks: Ranks | None = None) -> int:
        """Shared bytes of one stage of the ring, as `Config` in grouped_tiles.cuh has it; with `ranks` of v too."""
        columns, records = self.column_groups, self.column_groups * bank.step
        of_v = (self.row_blocks if self.takes_bytes else BLOCKS) * ranks.v_record_bytes if ranks else 0
        used = columns * 4 * 128 * self.tokens + records * max(self.row_blocks * bank.record_bytes, of_v)
        if ranks and not self.takes_bytes:  # at the end of a tile of v, what each warpgroup has of it
            used = max(used, self.row_groups * 4 * 64 * self.tokens)
        if self.scales_sums:
            used = _up(used, 128) + 16 * self.tokens
        if self.takes_bytes:
            used = _up(used, 128) + 4 * records * self.tokens * bank.record_sums
        return _up(used, 1024)

    @property
    def declared(self) -> int:
        """Shared bytes that `grouped` declares besides the ring for half of a layer of experts, at most."""
        # tiles and pairs before each of 512 experts; what the ring has of its own; the columns of two tiles
        own = 4104 + 1024 + 16 * self.tokens
        corners = BLOCKS * self.row_groups * min(self.tokens, 32) * 32
        of_next = 32 if self.takes_bytes else 8 if self.scales_sums else 0  # of two tiles, for the product that follows
        sums = (self.column_groups - 1) * 64
        return _up(own + corners + (of_next + sums) * self.row_blocks * self.tokens, 1024)

    def fits_experts(self, bank: Bank) -> bool:
        """Whether two stages fit on Hopper, for half of a layer of experts."""
        return 2 * self.stage_bytes(bank) + self.declared + RESERVED <= share_of(HOPPER, self.blocks)

    def has_room(self, bank: Bank) -> bool:
        """Whether two stages fit on Hopper, for a dense layer or a factor."""
        sums = 4 * (self.column_groups - 1) * 64 * self.row_tiles * self.row_groups * self.tokens
        return 2 * self.stage_bytes(bank) + sums <= HOPPER - OWN - RESERVED

    def stages(self, bank: Bank, shared: int, static: int, ranks: Ranks | None = None) -> int:
        """Stages that fit where a block alone can have `shared` bytes and its kernel declares `static`.

        Below 2 the tile cannot run. Where experts' tiles of 8 tokens make t (`ranks`), u and t come after what the ring
        has asked for: with four stages Qwen3-30B-A3B's T=64 takes 98.4 us, with five 99.6 (H200).
        """
        available = share_of(shared, self.blocks) - static - RESERVED
        most = 4 if ranks and self.takes_bytes and self.blocks > 1 else 8
        return min(most, available // self.stage_bytes(bank, ranks))


def passes_sums(up_tile: Tile, tile: Tile) -> bool:
    """Whether gate and up make the sums of their results that down takes: a tile of theirs has whole units of these."""
    return tile.scales_sums and up_tile.scales_sums and up_tile.row_blocks % 8 == 0


def passes_bytes(up_tile: Tile, gate_up: Bank, tile: Tile, down: Bank) -> bool:
    """Whether gate and up make the bytes that down takes: only in segments of their own groups' size."""
    return tile.takes_bytes and up_tile.makes_bytes and gate_up.segments == down.segments


def expert_tiles(bank: Bank, tokens_each: float) -> Sequence[Tile]:
    """Tiles for experts of `tokens_each` tokens on average, best first; the first that fits runs.

    Sums are scaled where codes have a base below which there is room for them, and one scale for each unit.
    """
    long = bank.any.padded_columns >= 24 * 64  # short ones have tiles that end together with others' beginnings
    if tokens_each <= 6:
        best = Tile(8, 1, 2, 1, blocks=2)
    elif tokens_each <= 28:
        codes = bank.most_bits <= 4 and bank.segments == 1
        # more than fill one tile cost two: at 20 tokens on average Mixtral took 330 us instead of 254
        if codes and tokens_each <= (18 if long else 12):
            best = Tile(24, 1, 4, 1, scales_sums=True)
        else:
            best = Tile(32, 1, 4, 1) if long else Tile(32, 1, 2, 1, blocks=2)
    else:
        best = Tile(_wide(bank, tokens_each), 2, 2, 1)
    # what does not fit is not the first, which alone is compiled beforehand
    tiles = best, Tile(8 if best.tokens == 8 else 32 if best.tokens <= 32 else 64, 1, 2, 1), Tile(8, 1, 1, 1)
    return [tile for tile in tiles if tile.fits_experts(bank)]


def _wide(bank: Bank, tokens_each: float) -> int:
    """Tokens of the wide tile that takes least time for experts whose tokens spread about the average as chance has it.

    Those of mixed widths have products of one size only, so they come in a third.
    """
    counts = _spread(tokens_each)
    sizes = [(80, 64), (128, 96)] if bank.uniform_bits else [(each, each) for each in (80, 96, 128)]
    if bank.uniform_bits and Tile(144, 2, 2, 1).fits_experts(bank):
        sizes.append((144, 128))  # not with 4 bits: without room for two stages a tile of 64 would run
    return min(sizes, key=lambda size: sum(_expert_time(tokens, *size) for tokens in counts))[0]


def _spread(tokens_each: float) -> list[int]:
    """Tokens of five experts where the average is this, as chance has it."""
    return [max(1, round(tokens_each + by * tokens_each**0.5)) for by in (-1.3, -0.65, 0, 0.65, 1.3)]


def _expert_time(tokens: int, wide: int, narrow: int) -> float:
    """Of one row tile, where as few as can be of an expert's tiles are wide."""
    tiles = -(-tokens // wide)
    wider = 0 if tokens <= narrow * tiles else -(-(tokens - narrow * tiles) // (wide - narrow))
    return wider * _tile_time(wide) + (tiles - wider) * _tile_time(narrow)


def _tile_time(tokens: int) -> float:
    """Of a wide tile, in that of a column: on an H100 128 columns took 46 us where 96 took 40, and 152 took 57.

    On an H200 it has become tokens + 70, by which all choices but one of 20 are the same (docs/LOG.md).
    """
    return tokens + 120 + 1.5 * max(0, tokens - 128)


def every_factor_tile(bank: Bank) -> Sequence[Tile]:
    """Of v of compensators, which has few rows and long ones: 64 rows, and several warpgroups for the columns."""
    tiles = Tile(16, 1, 1, 4), Tile(32, 1, 1, 4), Tile(32, 1, 1, 2), Tile(64, 1, 1, 2), Tile(80, 1, 1, 2)
    return [tile for tile in tiles if tile.has_room(bank)]


@functools.lru_cache(1 << 14)
def factor_tiles(bank: Bank, experts: int, rows: int, processors: int) -> Sequence[Tile]:
    """The same for v of compensators, in 16 bits; `rows` of x are spread over the experts as chance has it."""

    def time(tile: Tile) -> float:
        tiles = sum(-(-count // tile.tokens) for count in _spread(rows / experts)) * experts / 5
        splits, _ = factor_splits(bank, tile, experts, rows, processors)
        columns, besides = _TIMES[tile]
        return -(-tiles * splits // processors) * (columns * bank.units * 64 / 4096 / splits + besides)

    return min(every_factor_tile(bank), key=time), Tile(32, 1, 1, 1), Tile(8, 2, 1, 1)


def factor_splits(bank: Bank, tile: Tile, experts: int, pairs: int, processors: int) -> tuple[int, int]:
    """Parts of a factor's columns that are multiplied apart and added later, where tiles are too few; records of each.

    Half of a GPU is enough to leave it at one part, since adding takes a launch; a part has two records or more for
    each warpgroup along the columns.
    """
    layout = bank.any
    tiles = max(min(experts, pairs), pairs // tile.tokens) * -(-bank.row_blocks // tile.row_blocks)
    rounds = -(-layout.records_per_row_block // tile.column_groups)
    wanted = max(1, min(processors // tiles, rounds // 2, 16))
    each = tile.column_groups * -(-rounds // wanted) if wanted > 2 else layout.records_per_row_block
    return -(-layout.records_per_row_block // each), each


@dataclass(frozen=True)
class VSplit:
    """How tiles of 24 tokens share the columns of v: in so many parts of so many records, the last perhaps less."""

    splits: int
    records: int


@functools.lru_cache(1 << 14)
def v_split(tile: Tile, bank: Bank, v: Bank, experts: int, pairs: int, processors: int) -> VSplit:
    """The one with which the launch takes least time: tiles of v come first, and W's, which end with t, wait for all.

    A tile of v has 64 rows and reads all of x; of what a stage of W takes one of v takes some 0.4, and besides a tile
    takes 1.5 and a part 3. Blocks take tiles in turn. t is asked for when a tile's last stages are still on their way.
    """
    tiles = sum(-(-count // tile.tokens) for count in _spread(pairs / experts)) * min(experts, pairs) // 5
    stages = -(-v.any.records_per_row_block // v.step)
    of_w, row_tiles = tiles * -(-bank.row_blocks // tile.row_blocks), -(-v.row_blocks // BLOCKS)
    ring = max(2, (HOPPER - tile.declared - RESERVED) // tile.stage_bytes(bank))

    def time(each: int) -> float:
        """In what a stage of W takes, with so many stages a part."""
        splits = -(-stages // each)
        of_v, one = tiles * row_tiles * splits, 0.4 * each + (3 if splits > 1 else 1.5)
        there = -(-of_v // processors) * one
        taken = [[-(-(count - block) // processors) for count in (of_v, of_v + of_w)] for block in range(processors)]
        return max(
            (both - first - 1) * stages + max(first * one + stages, there + min(ring, stages))
            for first, both in taken
            if both > first
        )

    parts = {max(min(2, stages), -(-stages // splits)) for splits in range(1, MAX_V_SPLITS + 1)}
    each = min(sorted(parts, reverse=True), key=time)
    return VSplit(-(-stages // each), each * v.step)


@functools.lru_cache(1 << 14)
def dense_tiles(bank: Bank, tokens: int, processors: int) -> Sequence[Tile]:
    """The same for one matrix: what takes least time, with the columns shared by a cluster where that is best."""
    if tokens <= 8:
        best = Tile(8, 1, 2, 2) if bank.row_blocks >= 6 * processors else Tile(8, 1, 1, 4)
    else:
        known = [tile for tile in _TIMES if tile.has_room(bank)]
        best = min(known, key=lambda tile: _dense_time(tile, bank, tokens, processors)[0], default=Tile(64, 1, 1, 2))
    return best, Tile(best.tokens if best.tokens <= 32 else 64, 1, 1, 2), Tile(8, 1, 1, 1)


def every_dense_tile(bank: Bank, processors: int) -> set[Tile]:
    """All that are best for some number of tokens, at least 2 and up to MOST_TOKENS."""
    counts = {2} | {tokens for size in (16, 152) for tokens in range(size, MOST_TOKENS + size, size)}
    return {dense_tiles.__wrapped__(bank, tokens, processors)[0] for tokens in counts}  # not cached


@dataclass(frozen=True)
class Part:
    """Tiles of a dense layer that one launch runs, and blocks of a cluster that share the columns of each.

    Of a factor all tiles, as `tiles` 0, and parts of their columns with a result each.
    """

    first: int
    tiles: int
    splits: int
    records: int
    """Of a split; none is empty."""


@functools.lru_cache(1 << 14)
def dense_parts(bank: Bank, tile: Tile, tokens: int, processors: int) -> Sequence[Part]:
    """Launches of a dense layer: whole rounds of all multiprocessors, and what is left, by clusters if that is best."""
    _, splits = _dense_time(tile, bank, tokens, processors)
    tiles, records = _dense_tiles(tile, bank, tokens), bank.any.records_per_row_block
    whole = tiles if splits == 1 else tiles // processors * processors
    parts = Part(0, whole, 1, records), Part(whole, tiles - whole, splits, -(-records // splits))
    return tuple(part for part in parts if part.tiles)


def _dense_tiles(tile: Tile, bank: Bank, tokens: int) -> int:
    return -(-bank.row_blocks // tile.row_blocks) * -(-tokens // tile.tokens)


_TIMES = {
    Tile(16, 1, 1, 4): (4.9, 2.1), Tile(16, 1, 2, 2): (10.1, 2.6),
    Tile(32, 1, 1, 2): (6.5, 1.5), Tile(32, 1, 1, 4): (6.9, 1.2), Tile(32, 1, 2, 2): (11.1, 2.4),
    Tile(64, 1, 1, 2): (10.3, 0.6), Tile(64, 1, 2, 1): (15.8, 0.8), Tile(80, 1, 1, 2): (10.6, 0.9),
    Tile(96, 1, 2, 1): (19.6, 0.6), Tile(128, 1, 2, 1): (23.6, 0.3), Tile(160, 1, 2, 1): (27.6, 0.4),
    Tile(128, 2, 2, 1): (44.7, 1.6), Tile(152, 2, 2, 1): (49.9, 2.9),
}  # fmt: skip
"""Tiles of dense layers of more than eight tokens; microseconds that 4096 columns of one take on an H200, and what it
takes besides, but for the launch."""
_CLUSTERS = {2: 66, 3: 39, 4: 28}
"""Clusters of so many blocks that 132 multiprocessors hold at a time; of four an H200 held 30, so that 32 of them took
twice as long. How many it holds depends on where a card's multiprocessors lie; of more than four it is few."""


def _dense_time(tile: Tile, bank: Bank, tokens: int, processors: int) -> tuple[float, int]:
    """Microseconds of a matrix but for the launch, and the splits of the last tiles with which it takes these."""
    records, tiles = bank.any.records_per_row_block, _dense_tiles(tile, bank, tokens)
    full = _expert_time(tokens, tile.tokens, tile.narrow) / (-(-tokens // tile.tokens) * _tile_time(tile.tokens))
    columns, besides = _TIMES.get(tile, (math.inf, 0.0))
    of_record = full * columns * bank.any.units * 64 / 4096
    whole, left = divmod(tiles, processors)
    sums = 4 * 16 * tile.row_blocks * tile.tokens

    def time(splits: int) -> float:
        exchange = 1.5 + 0.3 * splits + sums / (1 << 16) + (2 if whole else 0)
        return of_record * (whole * records + -(-records // splits)) + besides * (whole + 1) + exchange

    # a cluster's blocks have one tile, and add up where their ring was
    fits = tile in _TIMES and sums <= 2 * tile.stage_bytes(bank)
    shares = {-(-records // -(-records // most)) for most in _CLUSTERS} - {1}  # none of which is empty
    options = [s for s in shares if fits and 0 < left <= _CLUSTERS[s] * processors // 132]
    rounds = -(-tiles // processors)
    return min([((of_record * records + besides) * rounds, 1), *((time(splits), splits) for splits in options)])


def _up(x: int, to: int) -> int:
    return -(-x // to) * to
