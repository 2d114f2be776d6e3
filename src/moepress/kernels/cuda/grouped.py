# SPDX-License-Identifier: Apache-2.0
"""Launches `grouped`: one product of rows with the matrices of their experts, or with a dense layer's.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import BankArgument, Factors, RecordBank, structure
from moepress.kernels.cuda.functions import address, find_kernel, is_bf16, processors_of, shared_bytes_of
from moepress.kernels.cuda.rows import FEW_PAIRS, Route, Rows
from moepress.kernels.cuda.tensor_map import map_rows, map_sums

_Next = structure("_Next", "bytes sums", "", "units record_units segments floats")
_Sizes = structure(
    "_Sizes",
    "",
    "",
    "tokens slots num_experts n ld records row_blocks stages splits split_records first_tile tiles tiles_known",
)


class _Compensators(ctypes.Structure):
    _fields_ = (
        ("u", BankArgument), ("u_records", ctypes.c_int), ("columns", ctypes.c_int), ("v", BankArgument),
        ("t", ctypes.c_void_p), ("v_row_blocks", ctypes.c_int), ("done", ctypes.c_void_p), ("v_splits", ctypes.c_int),
        ("v_split_records", ctypes.c_int), ("parts", ctypes.c_void_p), ("arrived", ctypes.c_void_p),
    )  # fmt: skip


class _Grouped(ctypes.Structure):
    _fields_ = (
        ("y", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("bank", BankArgument), ("first", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("add", _Compensators), ("next", _Next),
        ("sizes", _Sizes), ("ids", ctypes.c_void_p), ("ids_wide", ctypes.c_int),
    )  # fmt: skip


class Added(NamedTuple):
    """What a product adds for its compensators: u t."""

    factors: Factors
    t: torch.Tensor
    """v x, there or to be made: [P, u_columns]; of tiles of 8 tokens [P, t_columns] by `t_place`, zeros until made."""
    done: torch.Tensor | None = None
    """Where tiles of 24 tokens make t, int32, a zero that counts what is done of it."""
    split: choose.VSplit | None = None
    """Of v, likewise."""
    parts: torch.Tensor | None = None
    """Room for t's parts where splits are several, float32."""
    arrived: torch.Tensor | None = None
    """int32, zeros that count them."""


class Next(NamedTuple):
    """Where the bytes or sums go that the next product takes of the results, and that product's matrices."""

    rows: Rows
    bank: RecordBank


def grouped(
    mode: choose.Mode,
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
    part: choose.Part | None = None,
    ids: torch.Tensor | None = None,
) -> None:
    """One product into y [.., ld], of which `columns` are real; without y into the bytes of `then` alone.

    `part` says which tiles and how their columns are split, by default all and not at all. `ids` are given where the
    launch before this one makes the route of them: gate and up of few pairs count them for themselves, other products
    wait for the route before they ask for weights.
    """
    x = rows.bytes if tile.takes_bytes else rows.plain
    assert x is not None, f"{mode} takes {'bytes' if tile.takes_bytes else '16 bits'}, which nobody has made"
    device, shape, layout = x.device.index, bank.shape, bank.shape.any
    ranks = added.factors.ranks if added else None
    function, _ = find_kernel("grouped.cu", grouped_instance(mode, shape, x.dtype, tile, ranks), device)
    ld = ld if ld is not None else y.shape[1]
    assert ld % 8 == 0, f"rows of {ld} results do not leave as eight neighbours"
    first, pairs, weights, slots = route or (None, None, None, 1)
    split = (part.splits, part.records, part.first, part.tiles) if part else (1, layout.records_per_row_block, 0, 0)
    counts = mode == "GATE_UP" and ids is not None and ids.numel() <= FEW_PAIRS
    arguments = _Grouped(
        address(y), address(bias), bank.argument, address(first), address(pairs), address(weights),
        _compensators(added, tile), _next(then),
        _Sizes(
            tokens, slots, len(bank.where), columns, ld,
            layout.records_per_row_block, shape.row_blocks, stages, *split, ids is None or counts,
        ),
        address(ids) if counts else None, int(ids is not None and ids.dtype == torch.int64),
    )  # fmt: skip
    units = 4 * tile.column_groups
    x_map = map_rows(x, tile.tokens, units)
    if tile.scales_sums or tile.takes_bytes:
        assert rows.sums is not None, f"{mode} takes sums of x, which nobody has made"
        if tile.takes_bytes:
            other_map = map_sums(rows.sums, tile.tokens, tile.column_groups * shape.step, shape.record_sums)
        else:
            other_map = map_sums(rows.sums[None], tile.tokens, 1, 4)
    else:
        other_map = map_rows(x, tile.narrow, units)
    t_map = map_rows(added.t, tile.tokens, 1) if added and not tile.takes_bytes else x_map  # x_map: nobody reads it
    shared = stages * tile.stage_bytes(shape, ranks if tile.multiplies_v else None) + choose.RESERVED
    blocks, cluster = tile.blocks * processors_of(device), 1
    if mode == "DENSE" and part and part.splits > 1:
        cluster, blocks = part.splits, part.splits * part.tiles
    function.launch(
        blocks, tile.threads, shared, (arguments, x_map, other_map, t_map), cluster=cluster, programmatic=True
    )


def _compensators(added: Added | None, tile: choose.Tile) -> _Compensators:
    if added is None:
        return _Compensators()
    (v, u), t, done, split, parts, arrived = added
    columns, row_blocks = v.layouts[0].rows, v.shape.row_blocks
    if not tile.takes_bytes:  # t is taken in units of 64, with zeros from v's padding
        columns, row_blocks = t.shape[1], t.shape[1] // 16
    given = v.argument, t.data_ptr(), row_blocks, address(done)
    parted = (split.splits, split.records, address(parts), address(arrived)) if split else ()
    return _Compensators(u.argument, u.layouts[0].records_per_row_block, columns, *given, *parted)


def _next(then: Next | None) -> ctypes.Structure:
    if then is None:
        return _Next()
    (_, in_bytes, sums), shape, layout = then.rows, then.bank.shape, then.bank.shape.any
    assert sums is not None, "what comes next takes sums, alone or with bytes"
    sizes = layout.padded_columns // 64, layout.units, shape.segments, sums.shape[-1]
    return _Next(address(in_bytes), address(sums), *sizes)


def find_tile(
    x: torch.Tensor,
    bank: RecordBank,
    mode: choose.Mode,
    tiles: Sequence[choose.Tile],
    ranks: choose.Ranks | None = None,
) -> tuple[choose.Tile, int]:
    """The first tile whose ring of two stages or more fits beside the kernel's own shared memory."""
    device = x.device.index
    for tile in tiles:
        _, static = find_kernel("grouped.cu", grouped_instance(mode, bank.shape, x.dtype, tile, ranks), device)
        of_v = ranks if tile.multiplies_v else None
        if (stages := tile.stages(bank.shape, shared_bytes_of(device), static, of_v)) >= 2:
            return tile, stages
    raise KernelError(f"no tile of {bank.shape.any} fits into {shared_bytes_of(device)} bytes of shared memory")


def grouped_instance(
    mode: choose.Mode, bank: choose.Bank, dtype: torch.dtype, tile: choose.Tile, ranks: choose.Ranks | None = None
) -> str:
    factors = f"{ranks.bits}, {ranks.units}" if ranks else "0, 0"
    return f"grouped<{bank.template}, {is_bf16(dtype)}, {tile.tokens}, {mode}, {tile.template}, {factors}>"
