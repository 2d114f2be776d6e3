# SPDX-License-Identifier: Apache-2.0
"""Launches `grouped` and what surrounds it: two tokens and more through a matrix, or through a layer's experts.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import BankArgument, Factors, RecordBank, structure
from moepress.kernels.cuda.functions import address, find_function, find_kernel, is_bf16, processors_of, shared_bytes_of
from moepress.kernels.cuda.tensor_map import map_rows, map_sums

Mode = choose.Mode
HALVES: tuple[Mode, Mode] = "GATE_UP", "DOWN"
PLACE_PAIRS, PLACE_SLOTS, PLACE_WARPS = 8192, 32, 8
"""Pairs and slots up to which `place_rows` does without a sort, and warps of its blocks; as in route.cu."""

_Next = structure("_Next", "bytes sums", "", "units record_units segments floats")
_Sizes = structure("_Sizes", "", "", "tokens slots num_experts n ld records row_blocks stages splits split_records")
_Sort = structure("_Sort", "ids weights first sorted sorted_weights", "", "ids_wide weight_type count num_experts")
_WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RowsOut = structure("_RowsOut", "rows bytes sums zeros", "", "count units record_units sum_floats zero_count")
_Combine = structure("_Combine", "parts y ids", "", "ids_wide slots num_experts n tokens")


class _Compensators(ctypes.Structure):
    _fields_ = (
        ("u", ctypes.c_void_p), ("u_records", ctypes.c_int), ("columns", ctypes.c_int), ("v", ctypes.c_void_p),
        ("t", ctypes.c_void_p), ("done", ctypes.c_void_p), ("v_row_blocks", ctypes.c_int),
    )  # fmt: skip


class _Grouped(ctypes.Structure):
    _fields_ = (
        ("y", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("bank", BankArgument), ("first", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("add", _Compensators), ("next", _Next),
        ("sizes", _Sizes),
    )  # fmt: skip


class _Prepare(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("out", _RowsOut), ("pairs", ctypes.c_void_p), ("count", ctypes.c_void_p),
        ("rows", ctypes.c_int), ("k", ctypes.c_int), ("slots", ctypes.c_int),
    )  # fmt: skip


class _Place(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("ids", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("first", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p), ("sorted_weights", ctypes.c_void_p), ("out", _RowsOut), ("ids_wide", ctypes.c_int),
        ("weight_type", ctypes.c_int), ("tokens", ctypes.c_int), ("slots", ctypes.c_int),
        ("num_experts", ctypes.c_int), ("k", ctypes.c_int),
    )  # fmt: skip


class Rows(NamedTuple):
    """Activations as a product takes them: P rows of K columns, in 16 bits, as bytes, or both."""

    plain: torch.Tensor | None
    """[P, K]."""
    bytes: torch.Tensor | None
    """As many bytes in another order (bytes.cuh), in a tensor of the same shape and dtype."""
    sums: torch.Tensor | None
    """With bytes: scales and sums of their segments, float32 [records, P, floats]."""

    @classmethod
    def empty(cls, x: torch.Tensor, rows: int, bank: RecordBank, *, plain: bool, in_bytes: bool) -> Rows:
        """For products with `bank`'s matrices; `x` gives dtype and device."""
        layout, shape = bank.shape.any, (rows, bank.shape.any.padded_columns)
        size = layout.records_per_row_block, rows, bank.shape.record_sums
        return cls(
            x.new_empty(shape) if plain else None,
            x.new_empty(shape) if in_bytes else None,
            torch.empty(size, dtype=torch.float32, device=x.device) if in_bytes else None,
        )

    def argument(self, bank: RecordBank, zeros: torch.Tensor | None = None) -> _RowsOut:
        """`zeros`, int32, are set to 0 by the kernel that makes the rows."""
        layout = bank.shape.any
        count = next(len(each) for each in self if each is not None) if self.bytes is None else len(self.bytes)
        units = layout.records_per_row_block * layout.units
        sizes = count, units, layout.units, bank.shape.record_sums, 0 if zeros is None else zeros.numel()
        return _RowsOut(*map(address, (*self, zeros)), *sizes)


class Route(NamedTuple):
    """The pairs of token and slot in the order of their experts, those without an expert left out."""

    first: torch.Tensor
    """int32 [E + 1]: the first pair of each expert, and how many pairs there are."""
    pairs: torch.Tensor
    """int32 [P]: token * slots + slot."""
    weights: torch.Tensor
    """float32 [P], in the same order."""
    slots: int

    @property
    def count(self) -> torch.Tensor:
        return self.first[-1:]


class Added(NamedTuple):
    """What a product adds for its compensators: u t."""

    factors: Factors
    t: torch.Tensor
    """v x [P, columns of u's records]; where tiles have 8 tokens still to be made, [P, rows of v] by `t_place`."""
    done: torch.Tensor | None
    """int32, a zero that counts what is done of t; None: t is there."""


class Next(NamedTuple):
    """Where a product's results go as bytes, and the matrices that multiply these next."""

    rows: Rows
    bank: RecordBank


def run_many(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: RecordBank,
    down: RecordBank,
    intermediate: int,
    y: torch.Tensor,
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
) -> None:
    """The sorted path, for any number of tokens."""
    tokens, pairs, each = len(x), ids.numel(), ids.numel() / len(gate_up.where)
    (up_tile, up_stages), (tile, stages) = (
        find_tile(x, bank, half, choose.expert_tiles(bank.shape, each), factors and factors.ranks)
        for half, bank, factors in zip(HALVES, (gate_up, down), (gate_up_factors, down_factors), strict=True)
    )
    counters = torch.empty(2, dtype=torch.int32, device=x.device) if gate_up_factors or down_factors else None
    bytes_up = up_tile.takes_bytes
    rows, route = sort_rows(x, ids, weights, gate_up, plain=not bytes_up, in_bytes=bytes_up, zeros=counters)
    made = choose.passes_bytes(up_tile, gate_up.shape, tile, down.shape)
    h = Rows.empty(x, pairs, down, plain=not made, in_bytes=made)
    if h.plain is not None and h.plain.shape[1] != intermediate:
        h.plain.zero_()  # padding meets real scales and zeros in the short last group
    added = compensate(rows, up_tile, gate_up_factors, route, counters)
    then = Next(h, down) if made else None
    columns = down.layouts[0].padded_columns
    operands = rows, h.plain, gate_up, intermediate, tokens
    grouped("GATE_UP", up_tile, up_stages, *operands, ld=columns, route=route, added=added, then=then)

    if tile.takes_bytes and not made:
        h = prepare(h.plain, down, pairs, plain=False, in_bytes=True, count=route.count)
    added = compensate(h, tile, down_factors, route, None if counters is None else counters[1:])
    parts = x.new_empty(pairs, x.shape[1])
    operands = h, parts, down, x.shape[1], tokens
    grouped("DOWN", tile, stages, *operands, route=route, added=added)
    combine(parts, ids, len(down.where), y)


def compensate(
    rows: Rows,
    tile: choose.Tile,
    factors: Factors | None,
    route: Route | None = None,
    done: torch.Tensor | None = None,
) -> Added | None:
    """What a product of `rows` in such tiles has to add; in wide ones t = v x is made here."""
    if factors is None:
        return None
    if tile.takes_bytes:
        assert done is not None and rows.bytes is not None, "tiles of 8 tokens count what is done of t"
        return Added(factors, rows.bytes.new_empty(len(rows.bytes), factors.v.layouts[0].rows), done)
    assert rows.plain is not None, "compensators of wide tiles multiply 16-bit rows"
    # whole records of u: v's padding of zero rows makes zeros of theirs
    return Added(factors, multiply(rows.plain, factors.v, factors.u.layouts[0].padded_columns, route), None)


def multiply(x: torch.Tensor, bank: RecordBank, columns: int, route: Route | None = None) -> torch.Tensor:
    """Sorted rows times their experts' matrices, without a route the one matrix; the first `columns` results are kept.

    Two launches where few tiles share the columns of x.
    """
    rows, experts = len(x), len(bank.where)
    tile, stages = find_tile(x, bank, "PLAIN", choose.factor_tiles(bank.shape, rows / experts))
    splits, each = choose.factor_splits(bank.shape, tile, experts, rows, processors_of(x.device.index))
    parts = x.new_empty(rows * splits, columns)
    operands = Rows(x, None, None), parts.view(rows, -1), bank, columns, rows // (route.slots if route else 1)
    grouped("PLAIN", tile, stages, *operands, route=route, splits=(splits, each))
    if splits == 1:
        return parts
    combine(parts, None, 1, y := x.new_empty(rows, columns))
    return y


def sort_rows(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    bank: RecordBank,
    *,
    plain: bool,
    in_bytes: bool,
    zeros: torch.Tensor | None = None,
) -> tuple[Rows, Route]:
    """x's rows in the order of their experts, padded to whole records, in 16 bits and as bytes as asked.

    `zeros`, int32, are set to 0 on the way.
    """
    (tokens, slots), experts, device = ids.shape, len(bank.where), x.device.index
    pairs, types = tokens * slots, (int(ids.dtype == torch.int64), _WEIGHT_TYPES[weights.dtype])
    first, order = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (experts + 1, pairs))
    route = Route(first, order, torch.empty(pairs, dtype=torch.float32, device=x.device), slots)
    given = ids.data_ptr(), weights.data_ptr()
    made = tuple(each.data_ptr() for each in route[:3])
    if pairs > PLACE_PAIRS or slots > PLACE_SLOTS:
        sort = _Sort(*given, *made, *types, pairs, experts)
        find_function("route.cu", "sort_pairs", device).launch(
            1, 1024, 132 * experts + 2 * pairs, (sort,), programmatic=True
        )
        kinds = {"plain": plain, "in_bytes": in_bytes, "zeros": zeros}
        return prepare(x, bank, pairs, **kinds, route=route, count=route.count), route

    rows = Rows.empty(x, pairs, bank, plain=plain, in_bytes=in_bytes)
    place = _Place(x.data_ptr(), *given, *made, rows.argument(bank, zeros), *types, tokens, slots, experts, x.shape[1])
    # a block has 256 octets of a token's columns, and a warp an expert's first pair
    units = bank.shape.any.padded_columns // 64
    blocks = max(tokens * -(-units // 32), -(-(experts + 1) // PLACE_WARPS))
    find_function("route.cu", rows_instance("place_rows", bank.shape, x.dtype), device).launch(
        min(8 * processors_of(device), blocks), 32 * PLACE_WARPS, 0, (place,), programmatic=True
    )
    return rows, route


def grouped(
    mode: Mode,
    tile: choose.Tile,
    stages: int,
    rows: Rows,
    y: torch.Tensor | None,
    bank: RecordBank,
    columns: int,
    tokens: int,
    *,
    ld: int | None = None,
    bias: torch.Tensor | None = None,
    route: Route | None = None,
    added: Added | None = None,
    then: Next | None = None,
    splits: tuple[int, int] = (1, 0),
) -> None:
    """One product into y [.., ld], of which `columns` are real; without y into the bytes of `then` alone."""
    x = rows.bytes if tile.takes_bytes else rows.plain
    assert x is not None, f"{mode} takes {'bytes' if tile.takes_bytes else '16 bits'}, which nobody has made"
    device, shape, layout = x.device.index, bank.shape, bank.shape.any
    ranks = added and added.factors.ranks
    function, _ = find_kernel("grouped.cu", grouped_instance(mode, shape, x.dtype, tile, ranks), device)
    first, pairs, weights, slots = route or (None, None, None, 1)
    arguments = _Grouped(
        address(y), address(bias), bank.argument, address(first), address(pairs), address(weights),
        _compensators(added), _next(then),
        _Sizes(
            tokens, slots, len(bank.where), columns, ld if ld is not None else y.shape[1],
            layout.records_per_row_block, shape.row_blocks, stages, *splits,
        ),
    )  # fmt: skip
    x_map, other_map = (map_rows(x, each, 4 * tile.column_groups) for each in (tile.tokens, tile.narrow))
    if tile.takes_bytes:
        other_map = map_sums(rows.sums, tile.tokens, tile.column_groups * shape.step)
    t_map = map_rows(added.t, tile.tokens, 1) if added and not tile.takes_bytes else x_map  # x_map: nobody reads it
    shared = stages * tile.stage_bytes(shape, ranks) + choose.RESERVED
    function.launch(
        tile.blocks * processors_of(device), tile.threads, shared, (arguments, x_map, other_map, t_map),
        programmatic=True,
    )  # fmt: skip


def _compensators(added: Added | None) -> _Compensators:
    if added is None:
        return _Compensators()
    (v, u), t, done = added
    given = v.table.data_ptr(), t.data_ptr(), address(done)
    return _Compensators(u.table.data_ptr(), u.layouts[0].records_per_row_block, t.shape[1], *given, v.shape.row_blocks)


def _next(then: Next | None) -> ctypes.Structure:
    if then is None:
        return _Next()
    (_, in_bytes, sums), shape, layout = then.rows, then.bank.shape, then.bank.shape.any
    sizes = layout.padded_columns // 64, layout.units, shape.segments, shape.record_sums
    return _Next(address(in_bytes), address(sums), *sizes)


def prepare(
    x: torch.Tensor,
    bank: RecordBank,
    rows: int,
    *,
    plain: bool,
    in_bytes: bool,
    route: Route | None = None,
    count: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> Rows:
    """x's rows as asked, in a route's order if there is one; the first `count` rows. `zeros`, int32, are set to 0."""
    made = Rows.empty(x, rows, bank, plain=plain, in_bytes=in_bytes)
    _, pairs, _, slots = route or (None, None, None, 1)
    arguments = _Prepare(
        x.data_ptr(), made.argument(bank, zeros), address(pairs), address(count), rows, x.shape[1], slots
    )
    blocks = min(8 * processors_of(x.device.index), -(-rows * bank.shape.any.padded_columns // (8 * 256)))
    find_function("route.cu", rows_instance("prepare_rows", bank.shape, x.dtype), x.device.index).launch(
        blocks, 256, 0, (arguments,), programmatic=True
    )
    return made


def combine(parts: torch.Tensor, ids: torch.Tensor | None, experts: int, y: torch.Tensor) -> None:
    """parts [T k, H] -> y [T, H], the sum over a token's slots that ran, without ids all of them."""
    (tokens, n), slots, device = y.shape, len(parts) // len(y), y.device.index
    wide = int(ids is not None and ids.dtype == torch.int64)
    arguments = _Combine(parts.data_ptr(), y.data_ptr(), address(ids), wide, slots, experts, n, tokens)
    blocks = min(8 * processors_of(device), -(-tokens * n // (8 * 256)))
    find_function("route.cu", f"combine<{is_bf16(y)}>", device).launch(blocks, 256, 0, (arguments,), programmatic=True)


def find_tile(
    x: torch.Tensor,
    bank: RecordBank,
    mode: Mode,
    tiles: Sequence[choose.Tile],
    ranks: choose.Ranks | None = None,
) -> tuple[choose.Tile, int]:
    """The first tile whose ring of two stages or more fits beside the kernel's own shared memory."""
    device = x.device.index
    for tile in tiles:
        _, static = find_kernel("grouped.cu", grouped_instance(mode, bank.shape, x.dtype, tile, ranks), device)
        if (stages := tile.stages(bank.shape, shared_bytes_of(device) // tile.blocks - static, ranks)) >= 2:
            return tile, stages
    raise KernelError(f"no tile of {bank.shape.any} fits into {shared_bytes_of(device)} bytes of shared memory")


def grouped_instance(
    mode: Mode, bank: choose.Bank, dtype: torch.dtype, tile: choose.Tile, ranks: choose.Ranks | None = None
) -> str:
    factors = f"{ranks.bits}, {ranks.units}" if ranks else "0, 0"
    return f"grouped<{bank.template}, {is_bf16(dtype)}, {tile.tokens}, {mode}, {tile.template}, {factors}>"


def instances(
    gate_up: choose.Bank,
    down: choose.Bank,
    factors: Sequence[tuple[choose.Bank, choose.Bank] | None],
    dtype: torch.dtype,
) -> Iterator[tuple[str, str]]:
    """Pairs of source and instance that `run_many` can need; `factors` are v and u of both halves."""
    yield "route.cu", "sort_pairs"
    yield "route.cu", f"combine<{is_bf16(dtype)}>"
    for kernel, bank in (("place_rows", gate_up), ("prepare_rows", gate_up), ("prepare_rows", down)):
        yield "route.cu", rows_instance(kernel, bank, dtype)
    for half, bank, both in zip(HALVES, (gate_up, down), factors, strict=True):
        for tokens in choose.EXAMPLES:
            yield from _compensated(half, bank, both, dtype, choose.expert_tiles(bank, tokens)[0], tokens)


def dense_instances(
    bank: choose.Bank, factors: tuple[choose.Bank, choose.Bank] | None, dtype: torch.dtype, processors: int
) -> Iterator[tuple[str, str]]:
    """The same of a dense layer of several tokens."""
    yield "route.cu", rows_instance("prepare_rows", bank, dtype)
    yield "route.cu", f"combine<{is_bf16(dtype)}>"
    for tile in choose.every_dense_tile(bank, processors):
        yield from _compensated("DENSE", bank, factors, dtype, tile, tile.tokens)
        yield from _compensated("DENSE", bank, factors, dtype, tile, 1000)


def _compensated(
    mode: Mode,
    bank: choose.Bank,
    factors: tuple[choose.Bank, choose.Bank] | None,
    dtype: torch.dtype,
    tile: choose.Tile,
    tokens: int,
) -> Iterator[tuple[str, str]]:
    ranks = choose.ranks(factors[0].any, factors[1].any) if factors else None
    yield "grouped.cu", grouped_instance(mode, bank, dtype, tile, ranks)
    if factors and not tile.takes_bytes:
        yield "grouped.cu", grouped_instance("PLAIN", factors[0], dtype, choose.factor_tiles(factors[0], tokens)[0])


def rows_instance(kernel: str, bank: choose.Bank, dtype: torch.dtype) -> str:
    """`prepare_rows` or `place_rows`."""
    return f"{kernel}<{bank.any.group_size}, {is_bf16(dtype)}>"
