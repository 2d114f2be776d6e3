# SPDX-License-Identifier: Apache-2.0
"""Which tile runs what: whatever the layer, something fits, and boxes are within the limits of the copy engine."""

from __future__ import annotations

import re
from importlib import resources
from itertools import accumulate
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moepress.format.spec import BITS, GROUP_SIZES
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.rows import PLACE_PAIRS, place_blocks
from moepress.kernels.records import RecordLayout

AVAILABLE = 227 * 1024
"""Shared bytes of a block on Hopper."""
PLAINER = 17_408 - 12 * 1024
"""What dense layers and factors do not need of what halves of experts declare."""


@st.composite
def banks(draw: st.DrawFn) -> choose.Bank:
    rows, columns = draw(st.integers(1, 40_000)), 8 * draw(st.integers(1, 4_000))
    group_size = draw(st.sampled_from(GROUP_SIZES))
    widths = draw(st.lists(st.sampled_from(BITS), min_size=1, max_size=4, unique=True))
    return choose.Bank(tuple(RecordLayout(rows, columns, bits, group_size) for bits in widths))


tokens = st.one_of(st.integers(2, 200), st.integers(200, 100_000))
processors = st.sampled_from([78, 114, 132, 144])


def static(tile: choose.Tile) -> int:
    """Bytes that `grouped` declares: sums of warpgroups that share columns, and 17,408 at most besides."""
    return 4 * (tile.column_groups - 1) * 16 * tile.row_blocks * tile.tokens + 17_408


def some_tile_fits(bank: choose.Bank, tiles: tuple[choose.Tile, ...], own: int = 0) -> None:
    """`own` of what is declared besides, if that is known."""
    assert any(tile.stages(bank, AVAILABLE, static(tile) - own) >= 2 for tile in tiles)
    for tile in tiles:
        assert tile.stage_bytes(bank) % 1024 == 0
        assert tile.threads <= 1024 and tile.threads * tile.blocks <= 2048
        assert tile.tokens <= 256 and tile.column_groups * bank.any.units <= 256, "sides of a box"
        assert 4 * bank.record_sums % 16 == 0 and bank.record_sums <= 256, "rows of sums are copied 16 bytes at a time"


@given(bank=banks(), each=st.floats(0.01, 100_000))
def test_a_tile_fits_any_experts(bank: choose.Bank, each: float) -> None:
    tiles = choose.expert_tiles(bank, each)
    # the first, or one runs that nobody has compiled
    some_tile_fits(bank, tuple(tiles[:1]), static(tiles[0]) - tiles[0].declared)


@given(bank=banks(), each=st.floats(0.01, 30), declared=st.integers(0, 32_768))
@example(bank=choose.Bank((RecordLayout(1536, 2048, 3, 64),)), each=2.0, declared=17_920)  # 512 bytes too many
def test_all_blocks_are_at_work_at_once(bank: choose.Bank, each: float, declared: int) -> None:
    """Or blocks that wait for t could keep out those that make it."""
    for tile in choose.expert_tiles(bank, each):
        stages = tile.stages(bank, AVAILABLE, declared)
        block = declared + stages * tile.stage_bytes(bank) + choose.RESERVED  # the ring is aligned by the kernel
        assert stages < 2 or tile.blocks * (block + choose.RESERVED) <= 228 * 1024, (
            "a multiprocessor's, with the system's"
        )


# what NVRTC 13.0 says of gate and up, and of down, with 3 bits
DECLARED = {
    choose.Tile(8, 1, 2, 2): (14_336, 12_288), choose.Tile(8, 1, 2, 1, blocks=2): (10_240, 8_192),
    choose.Tile(24, 1, 4, 1, scales_sums=True): (21_504, 18_432), choose.Tile(32, 1, 4, 1): (22_528, 22_528),
    choose.Tile(32, 1, 2, 1, blocks=2): (14_336, 14_336), choose.Tile(64, 1, 2, 1): (14_336, 15_360),
    choose.Tile(80, 2, 2, 1): (14_336, 15_360), choose.Tile(128, 2, 2, 1): (14_336, 16_384),
    choose.Tile(144, 2, 2, 1): (14_336, 16_384),
}  # fmt: skip


@pytest.mark.parametrize(("tile", "found"), DECLARED.items())
def test_no_kernel_declares_more_than_is_said(tile: choose.Tile, found: tuple[int, int]) -> None:
    assert max(found) <= tile.declared <= max(found) + 1024


@given(
    rank=st.sampled_from([8, 16, 32, 64, 128, 256]), side=st.integers(1, 4000), bits=st.sampled_from([3, 4, 8]),
    experts=st.integers(1, 512), rows=st.integers(1, 1 << 16), cores=processors,
)  # fmt: skip
def test_a_tile_fits_any_factors(rank: int, side: int, bits: int, experts: int, rows: int, cores: int) -> None:
    bank = choose.Bank((RecordLayout(rank, 8 * side, bits, 64),))
    tiles = choose.factor_tiles(bank, experts, rows, cores)
    some_tile_fits(bank, tuple(tiles[:1]), PLAINER)
    assert tiles[0] in choose.every_factor_tile(bank), "that is what is compiled beforehand"
    assert not any(tile.takes_bytes for tile in tiles), "nobody makes bytes of their inputs"


@given(bank=banks(), each=st.floats(0.01, 1000), experts=st.integers(1, 512), pairs=tokens, cores=processors)
def test_splits_cover_all_columns(bank: choose.Bank, each: float, experts: int, pairs: int, cores: int) -> None:
    tile, records = choose.expert_tiles(bank, each)[0], bank.any.records_per_row_block
    splits, size = choose.factor_splits(bank, tile, experts, pairs, cores)
    assert (splits - 1) * size < records <= splits * size and splits <= 16
    assert splits == 1 or size % tile.column_groups == 0


@given(
    bank=banks(), each=st.floats(0.01, 40), experts=st.integers(1, 512), cores=processors, bits=st.sampled_from(BITS),
    rank=st.sampled_from([8, 32, 64, 128]),
)  # fmt: skip
def test_the_columns_of_v_are_shared_by_whole_stages(
    bank: choose.Bank, each: float, experts: int, cores: int, bits: int, rank: int
) -> None:
    tile, columns = choose.expert_tiles(bank, each)[0], bank.any.padded_columns
    v, u = (RecordLayout(*shape, bits, 64) for shape in ((rank, columns), (bank.any.rows, rank)))
    split = choose.v_split(tile, bank, choose.Bank((v,)), experts, max(1, int(each * experts)), cores)
    records = v.records_per_row_block
    assert split.records % choose.Bank((v,)).step == 0
    assert (split.splits - 1) * split.records < records <= split.splits * split.records, "none is empty"
    assert 1 <= split.splits <= choose.MAX_V_SPLITS
    ranks, stage = choose.ranks(v, u), tile.stage_bytes(bank, choose.ranks(v, u))
    assert stage % 1024 == 0 and stage >= tile.stage_bytes(bank)
    if tile.scales_sums:
        assert stage >= 4 * 128 * tile.tokens + 4 * bank.step * ranks.v_record_bytes, "x and 64 rows of v"
        assert stage >= tile.row_groups * 64 * tile.tokens * 4, "what each warpgroup has of a tile of v"


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "experts", "pairs", "split"),
    [
        (28672, 4096, 64, 8, 128, (1, 16)),  # seven rounds of W, and the last has room for v
        (4096, 14336, 32, 8, 128, (14, 4)),  # 128 tiles of W: each block has a part of v first
        (4096, 2048, 32, 8, 66, (4, 2)),
        (256, 1600, 32, 4, 66, (4, 8)),  # blocks enough for all, but W asks for t before it is there
        (1536, 2048, 64, 128, 1024, (1, 8)),  # as many experts as blocks
    ],
)  # fmt: skip
def test_how_the_columns_of_v_are_shared(
    rows: int, columns: int, rank: int, experts: int, pairs: int, split: tuple[int, int]
) -> None:
    w, v = (choose.Bank((RecordLayout(each, columns, 3, 64),)) for each in (rows, rank))
    tile = choose.Tile(24, 1, 4, 1, scales_sums=True)
    assert choose.v_split(tile, w, v, experts, pairs, 132) == choose.VSplit(*split)


@given(bank=banks(), count=tokens, cores=processors)
def test_a_tile_fits_any_matrix(bank: choose.Bank, count: int, cores: int) -> None:
    tiles, records = choose.dense_tiles(bank, count, cores), bank.any.records_per_row_block
    some_tile_fits(bank, tuple(tiles[:1]), PLAINER)
    for tile in tiles:
        parts = choose.dense_parts(bank, tile, count, cores)
        tiles = -(-bank.row_blocks // tile.row_blocks) * -(-count // tile.tokens)
        assert [part.first for part in parts] == [0, *accumulate(part.tiles for part in parts)][:-1]
        assert sum(part.tiles for part in parts) == tiles and all(part.tiles for part in parts)
        for part in parts:
            assert (part.splits - 1) * part.records < records <= part.splits * part.records, "an empty one never ends"
            if part.splits > 1:
                assert part.splits * part.tiles <= cores and part.splits <= 4, "a block of a cluster has one tile"
                ring = tile.stages(bank, AVAILABLE, static(tile) - PLAINER) * tile.stage_bytes(bank)
                assert ring >= 4 * 16 * tile.row_blocks * tile.tokens, "sums lie where the ring was"


@given(
    bank=banks(), count=st.integers(1, 8), slots=st.integers(1, 32), cores=processors,
    mode=st.sampled_from(["DENSE", "GATE_UP", "DOWN"]), rank=st.sampled_from([0, 8, 32, 128]),
)  # fmt: skip
def test_few_tokens(bank: choose.Bank, count: int, slots: int, cores: int, mode: choose.Mode, rank: int) -> None:
    u, v = RecordLayout(bank.any.rows, max(rank, 8), 4, 64), RecordLayout(max(rank, 8), bank.any.columns, 4, 64)
    ranks = choose.ranks(v, u) if rank else None
    teams = choose.gemv_teams(mode, bank, count, slots, cores, ranked=bool(rank))
    assert all(0 < team.warps * team.groups <= choose.WARPS for team in teams)
    assert teams[0].warps * teams[0].groups == choose.WARPS
    for team in teams:
        room = choose.gemv_room(mode, bank, ranks, count, slots, team, cores)
        stages = room.stages(AVAILABLE)
        assert stages in (0, 2, 3, 4) and stages <= room.most
        assert room.most == 2 or (mode == "DENSE" and room.most <= 4)
        assert room.inputs % 16 == 0, "they are copied by 16 bytes"
        assert not stages or room.total(stages) + choose.RESERVED <= AVAILABLE
        fits = room.total(max(stages + 1, 2)) + choose.RESERVED <= AVAILABLE
        assert stages == room.most or not fits, "one more would have fitted"


@given(
    bank=banks(), count=st.integers(1, 8), slots=st.integers(1, 8), cores=processors, rank=st.sampled_from([0, 32]),
    mode=st.sampled_from(["DENSE", "GATE_UP", "DOWN"]), declared=st.integers(0, choose.GEMV_STATIC),
)  # fmt: skip
@example(  # DeepSeek-V3's down for three tokens, which needs more than a first guess leaves it and less than there is
    bank=choose.Bank((RecordLayout(7168, 2048, 3, 64),)), count=3, slots=8, cores=132, rank=0, mode="DOWN",
    declared=30_720,
)  # fmt: skip
def test_the_team_that_runs_is_compiled_beforehand(
    bank: choose.Bank, count: int, slots: int, cores: int, rank: int, mode: choose.Mode, declared: int
) -> None:
    """Whatever its kernel declares for itself, and no team that cannot run in any case."""
    u, v = RecordLayout(bank.any.rows, 32, 4, 64), RecordLayout(32, bank.any.columns, 4, 64)
    given = mode, bank, choose.ranks(v, u) if rank else None, count, slots
    teams, candidates = (
        choose.gemv_teams(mode, bank, count, slots, cores, ranked=bool(rank)),
        choose.gemv_candidates(*given, cores, AVAILABLE),
    )
    rooms = {team: choose.gemv_room(*given, team, cores) for team in teams}
    runs = next((team for team in teams if rooms[team].stages(AVAILABLE - declared)), None)
    assert runs is None or runs in candidates
    assert all(rooms[team].stages(AVAILABLE) for team in candidates)
    assert [team for team in teams if team in candidates] == candidates, "best first"


def test_known_layers() -> None:
    """What was measured: a change of the rules has to measure again."""
    small = choose.Bank((RecordLayout(2048, 768, 3, 64),))
    gate_up, down = (choose.Bank((RecordLayout(*shape, 3, 64),)) for shape in ((28672, 4096), (4096, 14336)))
    assert {choose.expert_tiles(each, 2.0)[0] for each in (gate_up, down)} == {choose.Tile(8, 1, 2, 1, blocks=2)}
    codes, scaled = choose.Tile(24, 1, 4, 1, scales_sums=True), choose.Tile(32, 1, 4, 1)
    assert [choose.expert_tiles(gate_up, each)[0] for each in (6.5, 16.0, 18.0, 19.0)] == [codes, codes, codes, scaled]
    mixed = choose.Bank(tuple(RecordLayout(28672, 4096, bits, 64) for bits in (1, 2, 3, 4)))
    assert choose.expert_tiles(mixed, 16.0)[0] == codes, "widths up to 4 have the same base"
    assert choose.expert_tiles(small, 8.0)[0] == codes, "short rows: up to 12"
    assert choose.expert_tiles(small, 13.0)[0] == choose.Tile(32, 1, 2, 1, blocks=2)
    other = [(RecordLayout(28672, 4096, 3, 32),), (RecordLayout(28672, 4096, 8, 64),)]
    other.append((RecordLayout(28672, 4096, 2, 64), RecordLayout(28672, 4096, 5, 64)))
    assert {choose.expert_tiles(choose.Bank(each), 16.0)[0] for each in other} == {scaled}, "two scales a unit; no base"
    assert choose.passes_sums(codes, codes) and not choose.passes_sums(scaled, codes)
    assert choose.expert_tiles(gate_up, 64.0)[0] == choose.Tile(80, 2, 2, 1)
    assert choose.expert_tiles(gate_up, 200.0)[0] == choose.Tile(128, 2, 2, 1)
    assert {choose.expert_tiles(gate_up, each)[0] for each in (256.0, 1024.0)} == {choose.Tile(144, 2, 2, 1)}
    tall, tile = choose.Bank((RecordLayout(8500, 4096, 3, 64),)), choose.Tile(128, 2, 2, 1)
    assert choose.dense_tiles(tall, 520, 132)[0] == tile, "what GPU tests run in two launches"
    assert [(part.first, part.tiles, part.splits) for part in choose.dense_parts(tall, tile, 520, 132)] == [
        (0, 132, 1), (132, 38, 3),
    ]  # fmt: skip
    few = choose.Bank((RecordLayout(3840, 2048, 3, 64),))
    assert choose._dense_time(choose.Tile(128, 1, 2, 1), few, 256, 132)[1] == 2, "60 clusters; 66 fit"
    four = choose.Bank((RecordLayout(28672, 4096, 4, 64),))
    assert choose.expert_tiles(four, 257.0)[0] == choose.Tile(128, 2, 2, 1), "two stages of 144 do not fit"
    eight, of_v = (
        choose.expert_tiles(small, 0.5)[0],
        choose.ranks(*(RecordLayout(*n, 3, 64) for n in ((32, 768), (2048, 32)))),
    )
    assert eight == choose.Tile(8, 1, 2, 1, blocks=2)
    assert [eight.stages(small, AVAILABLE, 9216, of) for of in (None, of_v)] == [5, 4], "u and t come after less"
    alone = choose.Tile(8, 1, 2, 2)
    assert alone.stages(small, AVAILABLE, 9216, of_v) == alone.stages(small, AVAILABLE, 9216) == 5, (
        "measured of experts"
    )
    assert gate_up.template == "3, 3, 4, 64"
    team = choose.gemv_teams("GATE_UP", gate_up, 1, 2, 132)[0]
    assert team == choose.Team(4, 8)
    assert choose.gemv_room("GATE_UP", gate_up, None, 1, 2, team, 132).stages(AVAILABLE) == 2, "three would fit"
    # both operands of Mixtral's down for one token: 57 KB of intermediate beside two records a warp
    team = choose.gemv_teams("DOWN", down, 1, 2, 132)[0]
    assert team == choose.Team(8, 4) and choose.gemv_room("DOWN", down, None, 1, 2, team, 132).stages(AVAILABLE) == 2
    for shape, most in (((4096, 4096), 2), ((12288, 4096), 3), ((8192, 8192), 4), ((4096, 14336), 4)):
        dense = choose.Bank((RecordLayout(*shape, 3, 64),))
        team = choose.gemv_teams("DENSE", dense, 1, 1, 132)[0]
        assert choose.gemv_room("DENSE", dense, None, 1, 1, team, 132).most == most, "as many as a warp has, if few"
    assert [choose.Tile(tokens, 2, 2, 1).narrow for tokens in (80, 128, 144, 152)] == [64, 96, 128, 152]
    assert choose.gemv_teams("DOWN", small, 1, 8, 132)[0] == choose.Team(32, 1)
    ranked = [choose.gemv_teams("DOWN", small, tokens, 8, 132, ranked=True)[0] for tokens in (1, 2)]
    assert ranked == [choose.Team(16, 2), choose.Team(32, 1)], "v of one token has a group of its own"
    assert choose.gemv_teams("DOWN", small, 8, 8, 132) == [choose.Team(32, 1), choose.Team(24, 1), choose.Team(16, 1)]
    mixed = choose.Bank(tuple(RecordLayout(2048, 768, bits, 64) for bits in (1, 2, 3)))
    assert mixed.template == "0, 4, 4, 64" and mixed.record_bytes == 4 * (128 * 4 + 64)
    tall, square = (choose.Bank((RecordLayout(*shape, 3, 64),)) for shape in ((14336, 4096), (8192, 8192)))
    wide = [choose.dense_tiles(bank, 1024, 132)[0].tokens for bank in (tall, square)]
    assert wide == [152, 128], "three rounds of 392 tiles for four of 448; two of 256 either way"
    assert {tile.tokens for tile in choose.every_dense_tile(tall, 132)} == {8, 16, 32, 64, 96, 128, 152, 160}
    tiles = {tokens: choose.dense_tiles(square, tokens, 132)[0] for tokens in (16, 64, 256, 1024)}
    assert list(tiles.values()) == [
        choose.Tile(*t) for t in ((16, 1, 1, 4), (64, 1, 2, 1), (128, 1, 2, 1), (128, 2, 2, 1))
    ]
    counts = [
        [(part.tiles, part.splits) for part in choose.dense_parts(square, tile, tokens, 132)]
        for tokens, tile in (*tiles.items(), (640, tiles[1024]))
    ]
    assert counts == [[(128, 1)], [(64, 2)], [(128, 1)], [(256, 1)], [(132, 1), (28, 4)]]
    each = (16.0, 40.0, 64.0, 140.0, 1000.0)
    assert [choose.expert_tiles(mixed, tokens)[0].tokens for tokens in each] == [32, 80, 80, 80, 128]
    short = choose.Bank((RecordLayout(2048, 1408, 3, 64),))
    assert (short.any.units, short.step) == (2, 2)
    assert all(tile.stage_bytes(short) == tile.stage_bytes(small) for tile in choose.expert_tiles(small, 100.0)[:2])


@settings(max_examples=25)
@given(bank=banks(), cores=processors, random=st.randoms(use_true_random=False))
def test_examples_ask_for_every_tile(bank: choose.Bank, cores: int, random: Random) -> None:
    """Warming up compiles these: another would be compiled at somebody's token, or missing in a graph's capture."""
    counts = random.sample(range(2, choose.MOST_TOKENS), 100)
    every = {choose.expert_tiles(bank, each / 4)[0] for each in (*range(1, 600), *counts)}
    assert every <= {choose.expert_tiles(bank, each)[0] for each in choose.EXAMPLES}
    some = {choose.dense_tiles(bank, count, cores)[0] for count in (*range(2, 300), *counts)}
    assert some <= choose.every_dense_tile(bank, cores)


@pytest.mark.parametrize(("up", "down", "passes"), [(64, 64, True), (64, 128, True), (64, 32, False), (32, 64, False)])
def test_bytes_are_passed_on_in_segments_of_one_size(up: int, down: int, passes: bool) -> None:
    gate_up, other = choose.Bank((RecordLayout(1280, 512, 3, up),)), choose.Bank((RecordLayout(512, 640, 3, down),))
    tiles = [choose.expert_tiles(bank, 2.0)[0] for bank in (gate_up, other)]
    assert choose.passes_bytes(tiles[0], gate_up, tiles[1], other) == passes
    assert not choose.passes_bytes(choose.Tile(8, 1, 1, 1), gate_up, tiles[1], other), "half a unit"


@pytest.mark.parametrize("name", ["MAX_TOKENS", "MAX_PAIRS", "MAX_SEGMENTS", "PENDING", "EXPERT_STAGES", "GEMV_STATIC"])
def test_the_kernel_has_room_for_what_is_chosen(name: str) -> None:
    """Of shared memory, in arrays of a size that the source says once more."""
    source = resources.files("moepress.kernels.cuda").joinpath("gemv_active.cuh").read_text()
    assert re.findall(rf"^constexpr int {name} = (\d+);", source, re.MULTILINE) == [str(getattr(choose, name))]


def test_few_tokens_pass_bytes_on_where_segments_are_whole() -> None:
    def passes(
        hidden: int, inner: int, tokens: int, slots: int, *, up: int = 64, down: int = 64, cores: int = 132
    ) -> bool:
        gate_up, other = (
            choose.Bank((RecordLayout(*shape, 3, group),))
            for *shape, group in ((2 * inner, hidden, up), (hidden, inner, down))
        )
        team = choose.gemv_teams("GATE_UP", gate_up, tokens, slots, cores)[0]
        return choose.gemv_passes_bytes(team, gate_up, other, tokens, slots, cores)

    assert passes(2048, 768, 8, 8) and passes(2048, 1408, 8, 6) and passes(4096, 14336, 2, 2), "as measured"
    assert not passes(2048, 768, 1, 8) and not passes(2048, 768, 2, 8), "too little to save"
    assert not passes(2048, 720, 8, 8), "half a segment"
    assert not passes(2048, 768, 8, 8, down=32) and passes(2048, 768, 8, 8, down=128)
    assert not passes(2048, 1408, 8, 6, cores=8), "more segments than a block has room for"
    assert not passes(2048, 768, 8, 8, cores=4096), "fewer than eight groups"


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_brings_its_middle_code(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5- and 6-bit codes lie in words of 8: scaled around 128, they would round 15 times as badly."""
    from moepress.kernels.cuda.run import RecordBank

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    layout = RecordLayout(64, 64, bits, 64)
    records, word = torch.zeros(2, *layout.shape, dtype=torch.uint8), bits if bits <= 4 else 8
    middle = 0 if bits == 1 else 2 ** (bits - 1)
    bank = RecordBank.build([records], [layout], [(0, 0), (0, 1)])
    argument = bank.argument
    assert (argument.experts, argument.first, argument.stride) == (None, records.data_ptr(), layout.num_bytes)
    assert (argument.word_bits, argument.centre) == (word, middle)
    turned = RecordBank.build([records], [layout], [(0, 1), (0, 0)])
    assert turned.argument.experts == turned.table.data_ptr() and turned.argument.first is None
    assert turned.table.tolist() == [[records[slot].data_ptr(), word + (middle << 32)] for slot in (1, 0)]


@pytest.mark.parametrize(("rank", "columns"), [(8, 32), (32, 32), (64, 64), (192, 192)])
def test_a_bank_of_v_has_room_for_t(rank: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros below the experts' rows: a counter, and 2 bytes for each column of as many pairs as `gemv` takes."""
    from moepress.kernels.cuda.run import RecordBank

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    layout = RecordLayout(rank, 128, 3, 64)
    records = torch.ones(2, *layout.shape, dtype=torch.uint8)
    bank = RecordBank.build([records], [layout], [(0, 1), (0, 0), None], is_v=True)
    assert bank.scratch.shape == (1 + choose.MAX_PAIRS * columns * 2 // 16, 2) and not bank.scratch.any()
    assert bank.table[:2, 0].all() and bank.scratch.data_ptr() == bank.table.data_ptr() + 3 * 16
    assert not len(RecordBank.build([records], [layout], [(0, 1), (0, 0), None]).scratch)


@given(count=st.integers(1, 1 << 16), slots=st.integers(1, 32), units=st.integers(1, 300), cores=processors)
def test_a_block_places_what_it_has_room_for(count: int, slots: int, units: int, cores: int) -> None:
    count = max(1, count // slots)
    threads, chunks, shares = place_blocks(count, slots, 64 * units, cores)
    most = max(count * (i + 1) // shares - count * i // shares for i in range(shares))
    assert most * slots <= PLACE_PAIRS and threads % 32 == 0 and chunks <= units


def test_sources_have_the_sizes_that_launches_have() -> None:
    sources = resources.files("moepress.kernels.cuda")
    names = "route.cu", "grouped_tiles.cuh", "grouped.cu"
    route, tiles, grouped = (sources.joinpath(name).read_text() for name in names)
    assert re.findall(r"^constexpr int PLACE_PAIRS = (\d+);", route, re.MULTILINE) == [str(PLACE_PAIRS)]
    assert re.findall(r"^constexpr int .*MAX_SPLITS = (\d+);", tiles, re.MULTILINE) == [str(max(choose._CLUSTERS))]
    narrow = re.findall(r"^constexpr int NARROW = (.*);", tiles, re.MULTILINE)
    assert {int(a): int(b) for a, b in re.findall(r"NT == (\d+) \? (\d+)", *narrow)} == choose._NARROW
    pairs = [re.findall(rf'setmaxnreg.{how}.*"n"\(AFTER \? (\d+) : (\d+)\)', grouped) for how in ("dec", "inc")]
    examples = choose.Tile(24, 1, 4, 1, scales_sums=True), choose.Tile(128, 2, 2, 1)
    for tile, fewer, more in zip(examples, *(map(int, *found) for found in pairs), strict=True):
        launched = (1 << 16) // tile.threads // 8 * 8  # registers of a thread, as the launch bounds have it
        assert 128 * fewer + (tile.threads - 128) * more <= tile.threads * launched, (
            "a block's registers are all it has"
        )
