# SPDX-License-Identifier: Apache-2.0
"""Launches `grouped` and what surrounds it: two tokens and more through a matrix, or through a layer's experts.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import Factors, RecordBank, structure
from moepress.kernels.cuda.functions import address, find_function, find_kernel, is_bf16, processors_of, shared_bytes_of
from moepress.kernels.cuda.tensor_map import map_rows, map_sums

Mode = choose.Mode
HALVES: tuple[Mode, Mode] = "GATE_UP", "DOWN"
PLACE_PAIRS, PLACE_SLOTS, PLACE_WARPS = 2048, 32, 8
"""Pairs and slots up to which `place_rows` does without a sort, and warps of its blocks; as in route.cu."""

_Grouped = structure(
    "_Grouped", "y bias", "first pairs weights addend added_to next_sums",
    "next_bits next_units next_segments next_floats "
    "weights_wide tokens slots num_experts n ld records row_blocks stages splits split_records",
)  # fmt: skip
_Sort = structure("_Sort", "ids first sorted", "", "ids_wide count num_experts")
_Prepare = structure("_Prepare", "x sorted sums pairs count", "", "rows k slots units record_units sum_floats")
_Place = structure(
    "_Place", "x ids first pairs sorted sums", "", "ids_wide tokens slots num_experts k units record_units sum_floats"
)
_Combine = structure("_Combine", "parts y ids", "", "ids_wide slots num_experts n tokens")


class Route(NamedTuple):
    """The pairs of token and slot in the order of their experts, those without an expert left out."""

    first: torch.Tensor
    """int32 [E + 1]: the first pair of each expert, and how many pairs there are."""
    pairs: torch.Tensor
    """int32 [P]: token * slots + slot."""
    slots: int

    @property
    def count(self) -> torch.Tensor:
        return self.first[-1:]


class Addend(NamedTuple):
    """What compensators add to a product."""

    rows: torch.Tensor
    """[P, rows of W], in sorted order; those of experts without a compensator are not set."""
    u: RecordBank


class NextSums(NamedTuple):
    """Sums of a product's results, for the matrices that multiply these next."""

    sums: torch.Tensor
    bank: choose.Bank


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
    up_tile, up_stages = find_tile(x, gate_up, "GATE_UP", choose.expert_tiles(gate_up.shape, each))
    tile, stages = find_tile(x, down, "DOWN", choose.expert_tiles(down.shape, each))

    x_sorted, sums, route = sort_rows(x, ids, gate_up, wants_sums=up_tile.scales_after)
    columns = down.layouts[0].padded_columns
    # padding of h meets real scales and zeros in the short last group: it has to be zeros
    h = x.new_zeros(pairs, columns) if columns != intermediate else x.new_empty(pairs, columns)
    h_sums = new_sums(h, down) if tile.scales_after and up_tile.sums_results else None
    addend = compensate(x_sorted, gate_up_factors, tokens, route)
    then = None if h_sums is None else NextSums(h_sums, down.shape)
    operands = x_sorted, sums, h, gate_up, intermediate, tokens
    grouped("GATE_UP", up_tile, up_stages, *operands, route=route, addend=addend, then=then)

    if tile.scales_after and h_sums is None:
        h_sums = prepare(h, down, pairs, count=route.count)
    addend = compensate(h, down_factors, tokens, route)
    parts = x.new_empty(pairs, x.shape[1])
    operands = h, h_sums, parts, down, x.shape[1], tokens
    grouped("DOWN", tile, stages, *operands, route=route, weights=weights, addend=addend)
    combine(parts, ids, len(down.where), y)


def compensate(x: torch.Tensor, factors: Factors | None, tokens: int, route: Route) -> Addend | None:
    """u v x for sorted rows, in two launches, or three where few tiles share v's columns."""
    if factors is None:
        return None
    v, u = factors
    # whole records of u: v's padding of zero rows makes zeros of theirs
    t = multiply(x, v, u.layouts[0].padded_columns, tokens, route)
    return Addend(multiply(t, u, u.layouts[0].rows, tokens, route), u)


def multiply(x: torch.Tensor, bank: RecordBank, columns: int, tokens: int, route: Route) -> torch.Tensor:
    """Sorted rows times their experts' matrices, of which the first `columns` results are kept."""
    rows, experts = len(x), len(bank.where)
    tile, stages = find_tile(x, bank, "PLAIN", choose.factor_tiles(bank.shape, rows / experts))
    splits, each = choose.factor_splits(bank.shape, tile, experts, rows, processors_of(x.device.index))
    parts = x.new_empty(rows * splits, columns)
    operands = x, None, parts.view(rows, -1), bank, columns, tokens
    grouped("PLAIN", tile, stages, *operands, route=route, splits=(splits, each))
    if splits == 1:
        return parts
    combine(parts, None, 1, y := x.new_empty(rows, columns))
    return y


def sort_rows(
    x: torch.Tensor, ids: torch.Tensor, bank: RecordBank, *, wants_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None, Route]:
    """x's rows in the order of their experts, padded to whole records, and the sums of their segments if asked."""
    (tokens, slots), experts, device = ids.shape, len(bank.where), x.device.index
    pairs, wide = tokens * slots, int(ids.dtype == torch.int64)
    first, order = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (experts + 1, pairs))
    route = Route(first, order, slots)
    x_sorted = x.new_empty(pairs, bank.layouts[0].padded_columns)
    if pairs > PLACE_PAIRS or slots > PLACE_SLOTS:
        sort = _Sort(ids.data_ptr(), first.data_ptr(), order.data_ptr(), wide, pairs, experts)
        find_function("route.cu", "sort_pairs", device).launch(
            1, 1024, 132 * experts + 2 * pairs, (sort,), programmatic=True
        )
        return x_sorted, prepare(x, bank, pairs, x_sorted, wants_sums=wants_sums, route=route, count=route.count), route

    sums = new_sums(x_sorted, bank) if wants_sums else None
    units = x_sorted.shape[1] // 64
    place = _Place(
        x.data_ptr(), ids.data_ptr(), first.data_ptr(), order.data_ptr(), x_sorted.data_ptr(), address(sums),
        wide, tokens, slots, experts, x.shape[1], units, bank.shape.any.units, bank.shape.record_sums,
    )  # fmt: skip
    # a block has 256 octets of a token's columns, and a warp an expert's first pair
    blocks = max(tokens * -(-units // 32), -(-(experts + 1) // PLACE_WARPS))
    find_function("route.cu", rows_instance("place_rows", bank.shape, x.dtype), device).launch(
        min(8 * processors_of(device), blocks), 32 * PLACE_WARPS, 0, (place,), programmatic=True
    )
    return x_sorted, sums, route


def grouped(
    mode: Mode,
    tile: choose.Tile,
    stages: int,
    x: torch.Tensor,
    sums: torch.Tensor | None,
    y: torch.Tensor,
    bank: RecordBank,
    columns: int,
    tokens: int,
    *,
    bias: torch.Tensor | None = None,
    route: Route | None = None,
    weights: torch.Tensor | None = None,
    addend: Addend | None = None,
    then: NextSums | None = None,
    splits: tuple[int, int] = (1, 0),
) -> None:
    device, shape, layout = x.device.index, bank.shape, bank.shape.any
    function, _ = find_kernel("grouped.cu", grouped_instance(mode, shape, x.dtype, tile), device)
    first, pairs, slots = route or (None, None, 1)
    added, u = addend or (None, None)
    next_sums, after = then or (None, None)
    arguments = _Grouped(
        y.data_ptr(), address(bias), bank.argument, address(first), address(pairs), address(weights),
        address(added), u and u.argument.experts, address(next_sums),
        *((after.uniform_bits, after.any.units, after.segments, after.record_sums) if after else (0, 1, 1, 0)),
        int(weights is not None and weights.dtype == torch.float32), tokens, slots, len(bank.where), columns,
        y.shape[1], layout.records_per_row_block, shape.row_blocks, stages, *splits,
    )  # fmt: skip
    x_map, narrow_map = (map_rows(x, each, tile.column_groups * layout.units) for each in (tile.tokens, tile.narrow))
    other_map = narrow_map if sums is None else map_sums(sums, tile.tokens, tile.column_groups)
    shared = stages * tile.stage_bytes(shape) + choose.RESERVED
    function.launch(
        tile.blocks * processors_of(device), tile.threads, shared, (arguments, x_map, other_map), programmatic=True
    )


def new_sums(x: torch.Tensor, bank: RecordBank) -> torch.Tensor:
    """Room for the sums of segments of x's rows, float32 [records, rows, floats]."""
    size = bank.shape.any.records_per_row_block, len(x), bank.shape.record_sums
    return torch.empty(size, dtype=torch.float32, device=x.device)


def prepare(
    x: torch.Tensor,
    bank: RecordBank,
    rows: int,
    x_sorted: torch.Tensor | None = None,
    *,
    wants_sums: bool = True,
    route: Route | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Sorts rows into `x_sorted` and returns the sums of their segments, each where asked; the first `count` rows."""
    shape, layout = bank.shape, bank.shape.any
    sums = new_sums(x if x_sorted is None else x_sorted, bank) if wants_sums else None
    units = layout.records_per_row_block * layout.units
    _, pairs, slots = route or (None, None, 1)
    arguments = _Prepare(
        x.data_ptr(), address(x_sorted), address(sums), address(pairs), address(count),
        rows, x.shape[1], slots, units, layout.units, shape.record_sums,
    )  # fmt: skip
    blocks = min(8 * processors_of(x.device.index), -(-rows * units * 8 // 256))
    find_function("route.cu", rows_instance("prepare_rows", shape, x.dtype), x.device.index).launch(
        blocks, 256, 0, (arguments,), programmatic=True
    )
    return sums


def combine(parts: torch.Tensor, ids: torch.Tensor | None, experts: int, y: torch.Tensor) -> None:
    """parts [T k, H] -> y [T, H], the sum over a token's slots that ran, without ids all of them."""
    (tokens, n), slots, device = y.shape, len(parts) // len(y), y.device.index
    wide = int(ids is not None and ids.dtype == torch.int64)
    arguments = _Combine(parts.data_ptr(), y.data_ptr(), address(ids), wide, slots, experts, n, tokens)
    blocks = min(8 * processors_of(device), -(-tokens * n // (8 * 256)))
    find_function("route.cu", f"combine<{is_bf16(y)}>", device).launch(blocks, 256, 0, (arguments,), programmatic=True)


def find_tile(x: torch.Tensor, bank: RecordBank, mode: Mode, tiles: Sequence[choose.Tile]) -> tuple[choose.Tile, int]:
    """The first tile whose ring of two stages or more fits beside the kernel's own shared memory."""
    device = x.device.index
    for tile in tiles:
        _, static = find_kernel("grouped.cu", grouped_instance(mode, bank.shape, x.dtype, tile), device)
        if (stages := tile.stages(bank.shape, shared_bytes_of(device) // tile.blocks - static)) >= 2:
            return tile, stages
    raise KernelError(f"no tile of {bank.shape.any} fits into {shared_bytes_of(device)} bytes of shared memory")


def grouped_instance(mode: Mode, bank: choose.Bank, dtype: torch.dtype, tile: choose.Tile) -> str:
    return f"grouped<{bank.template}, {is_bf16(dtype)}, {tile.tokens}, {mode}, {tile.template}>"


def instances(
    gate_up: choose.Bank, down: choose.Bank, factors: Sequence[choose.Bank], dtype: torch.dtype
) -> Iterator[tuple[str, str]]:
    """Pairs of source and instance that `run_many` can need; `factors` are the v and u of both halves."""
    yield "route.cu", "sort_pairs"
    yield "route.cu", f"combine<{is_bf16(dtype)}>"
    for kernel in ("place_rows", "prepare_rows"):
        yield "route.cu", rows_instance(kernel, gate_up, dtype)
    for tokens in (2, 16, 64, 256):
        for half, bank in zip(HALVES, (gate_up, down), strict=True):
            yield "grouped.cu", grouped_instance(half, bank, dtype, choose.expert_tiles(bank, tokens)[0])
        for bank in factors:
            yield "grouped.cu", grouped_instance("PLAIN", bank, dtype, choose.factor_tiles(bank, tokens)[0])


def rows_instance(kernel: str, bank: choose.Bank, dtype: torch.dtype) -> str:
    """`prepare_rows` or `place_rows`."""
    return f"{kernel}<{bank.uniform_bits}, {bank.any.group_size}, {is_bf16(dtype)}>"
