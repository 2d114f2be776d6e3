# SPDX-License-Identifier: Apache-2.0
"""What the launches for few tokens are given, without a GPU: they are noted instead of made."""

from __future__ import annotations

import ctypes
import re
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepress.kernels.banks import describe, rebuild
from moepress.kernels.cuda import choose, compensate, few, grouped
from moepress.kernels.cuda.bank import BankArgument, Factors, RecordBank, t_columns
from moepress.kernels.records import RecordLayout

EXPERTS, SLOTS, HIDDEN, INNER, RANK = 8, 2, 256, 320, 32
HALVES = [(False, False), (True, False), (False, True), (True, True)]


def bank(rows: int, columns: int, missing: int = 0, *, is_v: bool = False) -> RecordBank:
    """Without a GPU; the last `missing` experts have no matrix."""
    layout = RecordLayout(rows, columns, 3, 64)
    where = tuple((0, expert) if expert < EXPERTS - missing else None for expert in range(EXPERTS))
    records = torch.zeros(EXPERTS, *layout.shape, dtype=torch.uint8)
    room = 1 + choose.MAX_PAIRS * t_columns(layout) // 8 if is_v else 0
    return RecordBank((records,), (layout,), where, torch.zeros(EXPERTS + room, 2, dtype=torch.int64))


def factors(rows: int, columns: int, rank: int, missing: int = 0) -> Factors:
    return Factors(bank(rank, columns, missing, is_v=True), bank(rows, rank, missing))


def t_of(made: Factors | None) -> int | None:
    """Address of t: after the rows of v's experts and a counter, of 16 bytes each."""
    return made and made.v.table.data_ptr() + 16 * (EXPERTS + 1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Both structures of each launch, in order."""
    found: list[tuple[Any, Any]] = []

    def launch(blocks: int, threads: int, shared: int, args: tuple[Any, Any], *, programmatic: bool) -> None:
        found.append(args)

    team = choose.Team(4, 8)
    plan = SimpleNamespace(function=SimpleNamespace(launch=launch), team=team, stages=2, shared=0)
    monkeypatch.setattr(few, "_plan", lambda *_: plan)
    monkeypatch.setattr(few, "processors_of", lambda device: 132)
    return found


def run_experts(tokens: int, both: tuple[Factors | None, Factors | None]) -> None:
    x, ids = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16), torch.zeros(tokens, SLOTS, dtype=torch.int64)
    banks = bank(2 * INNER, HIDDEN), bank(HIDDEN, INNER)
    assert few.few_experts(x, ids, ids.float(), *banks, *both, INNER, torch.empty_like(x))


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("has", HALVES)
def test_each_half_sets_the_others_t_to_0(launches: list[tuple[Any, Any]], has: tuple[bool, bool], tokens: int) -> None:
    """Also a half without compensators: nobody else would."""
    made = factors(2 * INNER, HIDDEN, 2 * RANK), factors(HIDDEN, INNER, RANK)
    both = made[0] if has[0] else None, made[1] if has[1] else None
    run_experts(tokens, both)
    given, own = [compensators for _, compensators in launches], [t_of(each) for each in both]
    assert [each.t for each in given] == own and [each.others for each in given] == own[::-1]
    pieces = [tokens * SLOTS * columns * 2 // 16 * there for columns, there in zip((2 * RANK, RANK), has, strict=True)]
    assert [each.other_pieces for each in given] == pieces[::-1], "rows of all pairs, in pieces of 16 bytes"
    assert [each.columns for each in given] == [2 * RANK * has[0], RANK * has[1]], (
        "none where there are no compensators"
    )


def test_a_bank_that_has_no_room_for_t_is_refused(launches: list[tuple[Any, Any]]) -> None:
    """The kernel would write into what lies after its table."""
    with pytest.raises(AssertionError, match="no room for t"):
        run_experts(1, (Factors(bank(2 * RANK, HIDDEN), bank(2 * INNER, 2 * RANK)), None))


@pytest.mark.parametrize("has", HALVES[1:])
def test_threads_do_not_come_between_halves(
    launches: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch, has: tuple[bool, bool]
) -> None:
    """On one stream another gate and up before this one's down would find t there already."""
    launch = few._launch

    def slow(*args: Any, **others: Any) -> None:
        time.sleep(0)  # as the driver, which lets other threads go on
        launch(*args, **others)

    monkeypatch.setattr(few, "_launch", slow)
    made = factors(2 * INNER, HIDDEN, 2 * RANK), factors(HIDDEN, INNER, RANK)
    both = made[0] if has[0] else None, made[1] if has[1] else None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_experts(1, both), range(400)))
    assert [compensators.columns for _, compensators in launches] == [2 * RANK * has[0], RANK * has[1]] * 400


@pytest.mark.parametrize("compensated", [True, False])
def test_t_is_set_to_0_where_down_cannot_be_launched(
    launches: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch, compensated: bool
) -> None:
    made, launch = factors(2 * INNER, HIDDEN, 2 * RANK), few._launch

    def count_or_fail(*args: Any, **others: Any) -> None:
        if launches:
            raise KeyboardInterrupt
        made.v.scratch.fill_(7)
        launch(*args, **others)

    monkeypatch.setattr(few, "_launch", count_or_fail)
    with pytest.raises(KeyboardInterrupt):
        run_experts(1, (made if compensated else None, None))
    assert (made.v.scratch == (0 if compensated else 7)).all() and not made.v.table[:EXPERTS].any()
    assert not any(lock.locked() for lock in few._locks.values())


@pytest.mark.parametrize(
    ("structure", "source"),
    [(few._Compensators, "gemv_active.cuh"), (grouped._Compensators, "grouped_tiles.cuh"),
     (grouped._Next, "grouped_tiles.cuh")],
)  # fmt: skip
def test_structures_have_the_fields_of_their_source(structure: type[ctypes.Structure], source: str) -> None:
    """In the same order: launches compare sizes alone."""
    text = resources.files("moepress.kernels.cuda").joinpath(source).read_text()
    (body,) = re.findall(rf"^struct {structure.__name__.strip('_')} {{$(.*?)^}};$", text, re.DOTALL | re.MULTILINE)
    declared = re.sub(r"//.*", "", body).split(";")
    names = [name.split()[-1].strip("*") for each in declared if each.strip() for name in each.split(",")]
    assert names == [name for name, *_ in structure._fields_]


def test_row_blocks_of_v_come_with_what_divides_by_them(launches: list[tuple[Any, Any]]) -> None:
    run_experts(1, (factors(2 * INNER, HIDDEN, 6 * RANK), None))
    given = launches[0][1]
    assert given.v_row_blocks == 6 * RANK // 16 > 1 and given.v_inverse == few.inverse(given.v_row_blocks)


@pytest.mark.parametrize("missing", [0, 1])
def test_factors_need_a_table_only_where_an_expert_has_none(launches: list[tuple[Any, Any]], missing: int) -> None:
    """The first records would wait for it."""
    made = factors(2 * INNER, HIDDEN, 2 * RANK, missing)
    run_experts(1, (made, None))
    for given, own in zip((launches[0][1].v, launches[0][1].u), made, strict=True):
        assert given.experts == (own.table.data_ptr() if missing else None)
        assert given.first == (None if missing else own.records[0].data_ptr())
        assert given.stride == (0 if missing else own.layouts[0].num_bytes)


@pytest.mark.parametrize("where", [((0, 0), (0, 1)), ((0, 1), (0, 0)), ((0, 0), None), ((0, 0), (1, 0))])
def test_compiled_code_makes_the_same_argument(where: tuple[tuple[int, int] | None, ...]) -> None:
    """It makes banks anew in every call, and finds out once whether experts are in order."""
    layout = RecordLayout(64, 256, 3, 64)
    records = [torch.zeros(2, *layout.shape, dtype=torch.uint8) for _ in range(2 if (1, 0) in where else 1)]
    layouts, table = [layout] * len(records), torch.zeros(3, 2, dtype=torch.int64)
    made = RecordBank(tuple(records), tuple(layouts), where, table)
    again = rebuild(records, table, describe(layouts, where))
    for name, _ in BankArgument._fields_:
        assert getattr(again.argument, name) == getattr(made.argument, name), name
    assert again.in_order == (where == ((0, 0), (0, 1))) and (again.argument.first is not None) == again.in_order


def test_a_dense_layer_resets_its_own_t(launches: list[tuple[Any, Any]]) -> None:
    """In the kernel: there is no other half."""
    x = torch.empty(1, HIDDEN, dtype=torch.bfloat16)
    made = factors(512, HIDDEN, RANK)
    assert few.few_linear(x, x.new_empty(1, 512), bank(512, HIDDEN), None, made)
    compensators = launches[0][1]
    assert compensators.others is None and not compensators.other_pieces
    assert compensators.t == t_of(made) and compensators.ended == compensators.t - 16


@pytest.mark.parametrize(("rank", "columns"), [(8, 32), (16, 32), (32, 32), (64, 64), (128, 128)])
def test_rows_of_t_have_room_for_what_lanes_load(launches: list[tuple[Any, Any]], rank: int, columns: int) -> None:
    """A lane loads 8 columns at least, four lanes a row; the kernels are told how many u has."""
    made = factors(HIDDEN, INNER, rank)
    x = torch.empty(1, INNER, dtype=torch.bfloat16)
    assert made.t_columns == columns
    run_experts(1, (None, made))
    assert launches[1][1].columns == rank
    half = compensate.Half(choose.Tile(8, 1, 2, 1), bank(HIDDEN, INNER), made)
    added = compensate._to_make(x, 16, half, None, torch.zeros(half.zeros(16, None), dtype=torch.int32))
    assert added.t.shape == (16, columns) and grouped._compensators(added, half.tile).columns == rank


def test_rows_of_t_of_wide_tiles_are_those_of_u() -> None:
    made = factors(HIDDEN, INNER, 8)
    added = grouped.Added(made, torch.empty(16, 64, dtype=torch.bfloat16), None)
    assert grouped._compensators(added, choose.Tile(80, 2, 2, 1)).columns == 64
