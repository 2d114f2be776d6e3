# SPDX-License-Identifier: Apache-2.0
"""What the launches for many tokens are given, without a GPU: they are noted instead of made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepress.kernels.cuda import choose, compensate, grouped, many, run
from moepress.kernels.cuda.bank import Factors, RecordBank
from moepress.kernels.cuda.rows import Route, Rows
from moepress.kernels.records import RecordLayout

EXPERTS, SLOTS, HIDDEN, INNER = 8, 2, 256, 320


def bank(rows: int, columns: int) -> RecordBank:
    """Without records: nobody reads them."""
    layout = RecordLayout(rows, columns, 3, 64)
    return RecordBank((torch.empty(0),), (layout,), ((0, 0),) * EXPERTS, torch.empty(0))


def factors(rows: int, columns: int, rank: int) -> Factors:
    return Factors(bank(rank, columns), bank(rows, rank))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Kernel, and whether it was told of what the launch ahead makes the route; in order."""
    found: list[tuple[str, bool]] = []

    def sort_rows(x: torch.Tensor, ids: torch.Tensor, *_: Any, zeros: Any, **made: bool) -> tuple[Rows, Route]:
        found.append(("place_rows", False))
        empty = torch.empty(0)
        return Rows.empty(x, ids.numel(), bank(2 * INNER, HIDDEN), **made), Route(empty, empty, empty, SLOTS)

    def grouped(mode: str, *_: Any, ids: torch.Tensor | None = None, **others: Any) -> None:
        found.append((mode, ids is not None))

    def prepare(x: torch.Tensor, of: RecordBank, rows: int, *, count: Any, **made: bool) -> Rows:
        found.append(("prepare_rows", False))
        return Rows.empty(x, rows, of, **made)

    monkeypatch.setattr(many, "sort_rows", sort_rows)
    monkeypatch.setattr(many, "grouped", grouped)
    monkeypatch.setattr(many, "prepare", prepare)
    monkeypatch.setattr(many, "combine", lambda *_: found.append(("combine", False)))
    monkeypatch.setattr(many, "find_tile", lambda x, bank, mode, tiles, ranks=None: (tiles[0], 2))
    monkeypatch.setattr(many, "processors_of", lambda device: 132)
    for name in ("grouped", "find_tile", "combine", "processors_of"):
        monkeypatch.setattr(compensate, name, getattr(many, name))
    return found


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("tokens", [9, 16, 40, 100, 300, 2000])
def test_weights_are_asked_for_early_unless_the_launch_ahead_makes_the_route(
    launches: list[tuple[str, bool]], tokens: int, rank: int
) -> None:
    """A product reads where its experts begin before the launch ahead has ended: that has to be older."""
    x, ids = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16), torch.zeros(tokens, SLOTS, dtype=torch.int64)
    both = (factors(2 * INNER, HIDDEN, 2 * rank), factors(HIDDEN, INNER, rank)) if rank else (None, None)
    banks = bank(2 * INNER, HIDDEN), bank(HIDDEN, INNER)
    many.run_many(x, ids, ids.float(), *banks, INNER, torch.empty_like(x), *both)
    products = [(kernel, told) for kernel, told in launches if kernel in ("PLAIN", "GATE_UP", "DOWN")]
    assert launches[0][0] == "place_rows" and launches[-1][0] == "combine"
    assert [told for _, told in products] == [True] + [False] * (len(products) - 1), "the first of them alone"
    assert launches[1] == products[0], "and it follows at once"
    names: list[str] = []
    for half, of in zip(many.HALVES, banks, strict=True):
        own = choose.expert_tiles(of.shape, tokens * SLOTS / EXPERTS)[0].multiplies_v
        names += [half] if own or not rank else ["PLAIN", half]
    assert [kernel for kernel, _ in products] == names


@pytest.mark.parametrize("tokens", [9, 1024, 1025])
@pytest.mark.parametrize("mode", ["PLAIN", "GATE_UP", "DOWN"])
def test_who_counts_ids_knows_its_tiles_before_the_route_is_made(
    monkeypatch: pytest.MonkeyPatch, mode: choose.Mode, tokens: int
) -> None:
    """Gate and up of up to 2048 pairs; others are given none, and wait."""
    told: list[Any] = []

    class Function:
        def launch(self, blocks: int, threads: int, shared: int, given: Any, **others: Any) -> None:
            told.append(given[0])

    monkeypatch.setattr(grouped, "find_kernel", lambda *_: (Function(), 0))
    monkeypatch.setattr(grouped, "processors_of", lambda device: 132)
    monkeypatch.setattr(grouped, "map_rows", lambda *_: None)
    x, ids = torch.empty(tokens * SLOTS, HIDDEN), torch.zeros(tokens, SLOTS, dtype=torch.int64)
    first, pairs = torch.zeros(EXPERTS + 1, dtype=torch.int32), torch.zeros(tokens * SLOTS, dtype=torch.int32)
    operands = mode, choose.Tile(32, 1, 4, 1), 2, Rows(x, None, None), x, bank(HIDDEN, HIDDEN), HIDDEN, tokens
    for given in (ids, ids.int(), None):
        grouped.grouped(*operands, route=Route(first, pairs, pairs.float(), SLOTS), ids=given)
        counts = mode == "GATE_UP" and given is not None and tokens <= 1024
        assert told[-1].ids == (given.data_ptr() if counts else None)
        assert told[-1].sizes.tiles_known == (counts or given is None)
        assert not counts or told[-1].ids_wide == (given.dtype == torch.int64)


@pytest.mark.parametrize(("columns", "units", "floats"), [(1408, 22, 24), (768, 12, 12), (64, 1, 4)])
def test_sums_of_units_lie_as_kernels_are_told(columns: int, units: int, floats: int) -> None:
    """Rows of them begin where copies of 16 bytes can, and two kernels write into them."""
    of, x = bank(HIDDEN, columns), torch.empty(3, columns, dtype=torch.bfloat16)
    rows = Rows.empty(x, 7, of, plain=True, sums=True)
    assert rows.sums is not None and rows.sums.shape == (7, floats) and rows.sums.dtype == torch.float32
    told, then = rows.argument(of), grouped._next(grouped.Next(rows, of))
    assert (told.count, told.units, told.sum_floats) == (7, units, floats)
    assert (then.units, then.floats) == (units, floats)
    in_bytes = Rows.empty(x, 7, of, in_bytes=True)
    assert in_bytes.sums is not None and in_bytes.sums.shape[1:] == (7, of.shape.record_sums)
    assert in_bytes.argument(of).sum_floats == of.shape.record_sums


@pytest.mark.parametrize("rank", [8, 32, 64])
@pytest.mark.parametrize("tokens", [9, 40, 60, 300])
def test_halves_that_make_t_have_room_for_it(monkeypatch: pytest.MonkeyPatch, tokens: int, rank: int) -> None:
    """Counters or t of each half that no other uses, and parts of t for every tile of v that there can be."""
    monkeypatch.setattr(compensate, "processors_of", lambda device: 132)
    side, pairs, x = 4096, tokens * SLOTS, torch.empty(tokens, 4096, dtype=torch.bfloat16)
    both = factors(2 * side, side, 2 * rank), factors(side, side, rank)
    halves = [
        compensate.Half(choose.expert_tiles(of.shape, pairs / EXPERTS)[0], of, own)
        for of, own in zip((bank(2 * side, side), bank(side, side)), both, strict=True)
    ]
    planned, zeros = compensate.plan_t(x, pairs, *halves)
    if tokens == 300:
        assert planned == [None, None] and zeros is None, "made by launches of its own"
        return
    assert zeros is not None and zeros.dtype == torch.int32
    used = torch.zeros_like(zeros)

    def use(of: torch.Tensor) -> None:
        at, size = of.data_ptr() - zeros.data_ptr(), of.numel() * of.element_size()
        assert at % 16 == 0 or of is not added.t, "loads of t take 16 bytes"
        used[at // 4 : (at + size) // 4] += 1

    for half, added in zip(halves, planned, strict=True):
        assert added is not None and half.factors is not None
        told = grouped._compensators(added, half.tile)
        if half.tile.takes_bytes:
            assert added.split is None and added.t.shape == (pairs, half.factors.t_columns)
            assert added.t.dtype == x.dtype and told.done is None
            assert (told.columns, told.v_row_blocks) == (
                half.factors.v.layouts[0].rows,
                half.factors.v.shape.row_blocks,
            )
            use(added.t)
            continue
        assert added.done is not None and added.arrived is not None
        use(added.done), use(added.arrived)
        assert added.split is not None and added.t.shape == (pairs, half.factors.u_columns)
        assert (told.columns, told.v_row_blocks) == (half.factors.u_columns, half.factors.u_columns // 16)
        assert (told.v_splits, told.v_split_records) == (added.split.splits, added.split.records)
        if added.split.splits == 1:
            assert added.parts is None and told.parts is None
            continue
        # the kernel's number of the last tile there can be, of the last expert and pair
        last = (EXPERTS - 1 + (pairs - 1) // half.tile.tokens + 1) * (half.factors.u_columns // 64)
        assert added.parts is not None
        assert len(added.arrived) >= last * half.tile.warps
        assert len(added.parts) >= last * added.split.splits * half.tile.warps * 32 * 4
    assert used.eq(1).all()
    if tokens > 40:
        assert planned[1] is not None and planned[1].split is not None and planned[1].split.splits > 1, "128 tiles of W"


@pytest.mark.parametrize("tokens", [9, 40, 300])
def test_the_first_launch_sets_to_0_what_tells_of_t(
    launches: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Of both halves: the next layer's memory holds what an earlier one has counted, or its t."""
    planned, cleared, given = [], [], []
    plan_t, sort_rows = many.plan_t, many.sort_rows

    def plan(*halves: Any) -> Any:
        planned.append(plan_t(*halves))
        return planned[0]

    def sort(*of: Any, zeros: torch.Tensor | None, **made: bool) -> Any:
        cleared.append(zeros)
        return sort_rows(*of, zeros=zeros, **made)

    monkeypatch.setattr(many, "plan_t", plan)
    monkeypatch.setattr(many, "sort_rows", sort)
    monkeypatch.setattr(many, "grouped", lambda mode, *_, added, **others: given.append(added))
    x, ids = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16), torch.zeros(tokens, SLOTS, dtype=torch.int64)
    both = factors(2 * INNER, HIDDEN, 64), factors(HIDDEN, INNER, 32)
    banks = bank(2 * INNER, HIDDEN), bank(HIDDEN, INNER)
    many.run_many(x, ids, ids.float(), *banks, INNER, torch.empty_like(x), *both)
    (added, wanted), (zeros,) = planned[0], cleared
    assert zeros is wanted and (zeros is None) == (tokens == 300)
    if zeros is not None:
        rows = Rows.empty(x, ids.numel(), banks[0], plain=True)
        assert rows.argument(banks[0], zeros).zero_count == zeros.numel(), "in fours"
        with pytest.raises(AssertionError, match="by fours"):
            rows.argument(banks[0], zeros[1:])
    assert [each.factors for each in given] == list(both)
    assert all(mine is None or mine is each for mine, each in zip(added, given, strict=True))


@pytest.mark.parametrize("tokens", [2, 8])
def test_the_t_of_a_dense_layer_is_set_to_0(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """By the launch that makes bytes of x; all of it, and nothing else."""
    given: list[Any] = []
    monkeypatch.setattr(many, "prepare", lambda x, of, rows, *, zeros, **made: given.append(zeros))
    monkeypatch.setattr(many, "grouped", lambda *_, added, **others: given.append(added))
    monkeypatch.setattr(many, "find_tile", lambda x, bank, mode, tiles, ranks=None: (tiles[0], 2))
    monkeypatch.setattr(many, "processors_of", lambda device: 132)
    x, made = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16), factors(HIDDEN, HIDDEN, 8)
    many.many_linear(x, x.new_empty(tokens, HIDDEN), HIDDEN, bank(HIDDEN, HIDDEN), None, made)
    zeros, added = given
    assert added.t.data_ptr() == zeros.data_ptr() and added.t.shape == (tokens, 32)
    assert added.t.nbytes == zeros.nbytes and zeros.numel() % 4 == 0


@pytest.mark.parametrize(("rank", "columns"), [(8, 64), (64, 64), (72, 128)])
@pytest.mark.parametrize("tokens", [9, 40, 300])
def test_the_t_of_a_dense_layer_is_added_up_in_float32(
    launches: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, tokens: int, rank: int, columns: int
) -> None:
    """By clusters, as any dense layer's results, and not by a launch that adds 16 bits; in whole records of u."""
    rows, outside = bank(HIDDEN, 4096), many.grouped
    products: list[tuple[RecordBank, int, tuple[int, ...]]] = []
    splits: list[int] = []
    results: list[torch.Tensor] = []
    sums: list[many.Added | None] = []

    def grouped(mode: str, tile: choose.Tile, stages: int, x: Rows, y: torch.Tensor, of: RecordBank, columns: int,
                tokens: int, *, part: choose.Part, added: many.Added | None, bias: None) -> None:  # fmt: skip
        outside(mode)
        products.append((of, columns, tuple(y.shape)))
        splits.append(part.splits)
        results.append(y)
        sums.append(added)

    monkeypatch.setattr(many, "grouped", grouped)
    x, made = torch.empty(tokens, 4096, dtype=torch.bfloat16), factors(HIDDEN, 4096, rank)
    many.many_linear(x, x.new_empty(tokens, HIDDEN), HIDDEN, rows, None, made)
    assert {kernel for kernel, _ in launches} == {"DENSE"} and splits[0] > 1
    assert products == [(made.v, columns, (tokens, columns)), (rows, HIDDEN, (tokens, HIDDEN))]
    assert sums[0] is None and sums[1] is not None and sums[1].t is results[0]


@pytest.mark.parametrize("rank", [0, 8, 32, 128])
@pytest.mark.parametrize("shape", [(256, 4096), (8500, 1024), (4096, 14336)])
def test_what_a_dense_layer_launches_is_compiled_beforehand(
    launches: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rank: int
) -> None:
    """Its own kernels and those of its v, for any number of tokens."""
    found = set()

    def grouped(mode: choose.Mode, tile: choose.Tile, stages: int, x: Rows, y: torch.Tensor, of: RecordBank, *_: Any,
                added: many.Added | None, **others: Any) -> None:  # fmt: skip
        ranks = added and added.factors.ranks
        found.add(("grouped.cu", many.grouped_instance(mode, of.shape, torch.bfloat16, tile, ranks)))

    def prepare(x: torch.Tensor, of: RecordBank, rows: int, *, zeros: Any, **made: bool) -> Rows:
        found.add(("route.cu", many.rows_instance("prepare_rows", of.shape, torch.bfloat16)))
        return Rows.empty(x, rows, of, **made)

    monkeypatch.setattr(many, "grouped", grouped)
    monkeypatch.setattr(many, "prepare", prepare)
    weight, made = bank(*shape), factors(*shape, rank) if rank else None
    layouts = [weight.layouts[0], *((made.v.layouts[0], made.u.layouts[0]) if made else ())]
    compiled = run.kernels_of([layouts], [], torch.bfloat16, 132, choose.HOPPER)
    for tokens in (*range(2, 300, 7), 512, 600, 1024, 2000, 4096):
        x = torch.empty(tokens, shape[1], dtype=torch.bfloat16, device="meta")
        many.many_linear(x, x.new_empty(tokens, -(-shape[0] // 8) * 8), shape[0], weight, None, made)
    assert found <= set(compiled) and len(found) > 4
    assert not any("PLAIN" in instance or "combine" in instance for _, instance in compiled), "for experts alone"


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("n", [1, 200, 203])
def test_results_have_whole_octets_and_leave_without_padding(
    monkeypatch: pytest.MonkeyPatch, n: int, tokens: int
) -> None:
    """Kernels store eight neighbours at once; what a layer returns is dense, as its custom operation promises."""

    def many_linear(x: torch.Tensor, y: torch.Tensor, out_features: int, *_: Any) -> None:
        assert y.shape[1] % 8 == 0 and out_features <= y.shape[1] < out_features + 8
        y.copy_(torch.arange(y.numel()).view(y.shape))

    monkeypatch.setattr(run, "few_linear", lambda *_: False)
    monkeypatch.setattr(run, "many_linear", many_linear)
    y = run.linear(torch.empty(tokens, 64), bank(n, 64), None, n)
    wide = -(-n // 8) * 8
    assert y.shape == (tokens, n) and y.stride() == torch.empty(tokens, n).stride()
    assert torch.equal(y, torch.arange(tokens * wide, dtype=y.dtype).view(tokens, wide)[:, :n])
