# SPDX-License-Identifier: Apache-2.0
"""Launches `grouped` and what surrounds it: two tokens and more through a matrix, or through a layer's experts.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import RecordBank, structure
from moepress.kernels.cuda.functions import address, find_function, find_kernel, is_bf16, processors_of, shared_bytes_of
from moepress.kernels.cuda.tensor_map import map_rows, map_sums

Mode = choose.Mode
_Grouped = structure(
    "_Grouped", "y bias", "first pairs weights",
    "weights_wide tokens slots num_experts n ld records row_blocks stages",
)  # fmt: skip
_Sort = structure("_Sort", "ids first sorted", "", "ids_wide count num_experts")
_Prepare = structure("_Prepare", "x sorted sums pairs count", "", "rows k slots units record_units sum_floats")
_Combine = structure("_Combine", "parts y ids", "", "ids_wide slots num_experts n tokens")


def run_many(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: RecordBank,
    down: RecordBank,
    intermediate: int,
    y: torch.Tensor,
) -> None:
    """The sorted path, for any number of tokens."""
    tokens, slots, count = len(x), ids.shape[1], len(gate_up.where)
    pairs = tokens * slots
    first, order = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (count + 1, pairs))
    wide = int(ids.dtype == torch.int64)
    sort = _Sort(ids.data_ptr(), first.data_ptr(), order.data_ptr(), wide, pairs, count)
    find_function("route.cu", "sort_pairs", x.device.index).launch(
        1, 1024, 132 * count + 2 * pairs, (sort,), programmatic=True
    )

    routed = {"first": first, "pairs": order, "slots": slots}
    tile, stages = find_tile(x, gate_up, "GATE_UP", choose.expert_tiles(gate_up.shape, pairs / count))
    x_sorted = x.new_empty(pairs, gate_up.layouts[0].padded_columns)
    sums = prepare(x, gate_up, pairs, x_sorted, wants_sums=tile.scales_after, **routed)
    columns = down.layouts[0].padded_columns
    # padding of h meets real scales and zeros in the short last group: it has to be zeros
    h = x.new_zeros(pairs, columns) if columns != intermediate else x.new_empty(pairs, columns)
    grouped("GATE_UP", tile, stages, x_sorted, sums, h, gate_up, intermediate, tokens, **routed)

    tile, stages = find_tile(x, down, "DOWN", choose.expert_tiles(down.shape, pairs / count))
    sums = prepare(h, down, pairs, count=first[count:]) if tile.scales_after else None
    parts = x.new_empty(pairs, x.shape[1])
    grouped("DOWN", tile, stages, h, sums, parts, down, x.shape[1], tokens, weights=weights, **routed)
    combine = _Combine(parts.data_ptr(), y.data_ptr(), ids.data_ptr(), wide, slots, count, x.shape[1], tokens)
    blocks = -(-tokens * x.shape[1] // (8 * 256))
    find_function("route.cu", f"combine<{is_bf16(x)}>", x.device.index).launch(
        min(8 * processors_of(x.device.index), blocks), 256, 0, (combine,), programmatic=True
    )


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
    first: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    slots: int = 1,
) -> None:
    device, shape, layout = x.device.index, bank.shape, bank.shape.any
    function, _ = find_kernel("grouped.cu", grouped_instance(mode, shape, x.dtype, tile), device)
    arguments = _Grouped(
        y.data_ptr(), address(bias), bank.argument, address(first), address(pairs), address(weights),
        int(weights is not None and weights.dtype == torch.float32), tokens, slots, len(bank.where), columns,
        y.shape[1], layout.records_per_row_block, shape.row_blocks, stages,
    )  # fmt: skip
    x_map = map_rows(x, tile.tokens, tile.column_groups * layout.units)
    sums_map = x_map if sums is None else map_sums(sums, tile.tokens, tile.column_groups)
    shared = stages * tile.stage_bytes(shape) + choose.RESERVED
    function.launch(
        tile.blocks * processors_of(device), tile.threads, shared, (arguments, x_map, sums_map), programmatic=True
    )


def prepare(
    x: torch.Tensor,
    bank: RecordBank,
    rows: int,
    x_sorted: torch.Tensor | None = None,
    *,
    wants_sums: bool = True,
    first: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    slots: int = 1,
) -> torch.Tensor | None:
    """Sorts rows into `x_sorted` and returns the sums of their segments [records, rows, floats], each where asked."""
    shape, layout = bank.shape, bank.shape.any
    records, floats = layout.records_per_row_block, shape.record_sums
    # copies take whole tiles of rows, also beyond the last one
    sums = torch.empty((records, rows, floats), dtype=torch.float32, device=x.device) if wants_sums else None
    count = first[len(bank.where) :] if first is not None else count
    units = records * layout.units
    arguments = _Prepare(
        x.data_ptr(), address(x_sorted), address(sums), address(pairs), address(count),
        rows, x.shape[1], slots, units, layout.units, floats,
    )  # fmt: skip
    instance = f"prepare_rows<{shape.uniform_bits}, {layout.group_size}, {is_bf16(x)}>"
    blocks = min(8 * processors_of(x.device.index), -(-rows * units * 8 // 256))
    find_function("route.cu", instance, x.device.index).launch(blocks, 256, 0, (arguments,), programmatic=True)
    return sums


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
