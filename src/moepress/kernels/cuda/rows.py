# SPDX-License-Identifier: Apache-2.0
"""Launches what surrounds `grouped` (route.cu): activations in the order of their experts, and the sum over a token's.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import RecordBank, structure
from moepress.kernels.cuda.functions import address, find_function, is_bf16, processors_of

FEW_PAIRS = 2048
"""Pairs up to which `place_rows` has small blocks, and blocks of gate and up count them for themselves."""
PLACE_PAIRS = 1024
"""Most pairs of a block of `place_rows`, as in route.cu."""
_WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RowsOut = structure("_RowsOut", "rows bytes sums zeros", "", "count units record_units sum_floats zero_count")
_Combine = structure("_Combine", "parts y ids", "", "ids_wide slots num_experts n tokens")


class _Prepare(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("out", _RowsOut), ("count", ctypes.c_void_p), ("rows", ctypes.c_int),
        ("k", ctypes.c_int),
    )  # fmt: skip


class _Place(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("ids", ctypes.c_void_p), ("weights", ctypes.c_void_p), ("first", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p), ("sorted_weights", ctypes.c_void_p), ("out", _RowsOut), ("ids_wide", ctypes.c_int),
        ("weight_type", ctypes.c_int), ("tokens", ctypes.c_int), ("slots", ctypes.c_int),
        ("num_experts", ctypes.c_int), ("k", ctypes.c_int), ("chunks", ctypes.c_int),
    )  # fmt: skip


class Rows(NamedTuple):
    """Activations as a product takes them: P rows of K columns, in 16 bits, alone or with sums, as bytes, or both."""

    plain: torch.Tensor | None
    """[P, K]."""
    bytes: torch.Tensor | None
    """As many bytes in another order (bytes.cuh), in a tensor of the same shape and dtype."""
    sums: torch.Tensor | None
    """Float32. With bytes, scales and sums of their segments [records, P, floats]; without, for products whose sums are
    scaled, the sums of units of x [P, units and up to 3 more]."""

    @classmethod
    def empty(
        cls,
        x: torch.Tensor,
        rows: int,
        bank: RecordBank,
        *,
        plain: bool = False,
        in_bytes: bool = False,
        sums: bool = False,
    ) -> Rows:
        """For products with `bank`'s matrices; `x` gives dtype and device."""
        layout, shape = bank.shape.any, (rows, bank.shape.any.padded_columns)
        of_bytes = layout.records_per_row_block, rows, bank.shape.record_sums
        of_units = rows, bank.shape.units + -bank.shape.units % 4  # copies take 16 bytes
        made = x.new_empty(of_bytes if in_bytes else of_units, dtype=torch.float32) if in_bytes or sums else None
        return cls(
            x.new_empty(shape) if plain else None,
            x.new_empty(shape) if in_bytes else None,
            made,
        )

    def argument(self, bank: RecordBank, zeros: torch.Tensor | None = None) -> _RowsOut:
        """`zeros`, int32 in fours, are set to 0 by the kernel that makes the rows."""
        assert zeros is None or zeros.numel() % 4 == 0, f"{zeros.numel()} zeros are not stored by fours"
        layout = bank.shape.any
        made = next(each for each in (self.bytes, self.plain, self.sums) if each is not None)
        cleared, floats = 0 if zeros is None else zeros.numel(), 0 if self.sums is None else self.sums.shape[-1]
        sizes = len(made), bank.shape.units, layout.units, floats, cleared
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


def sort_rows(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    bank: RecordBank,
    *,
    plain: bool = False,
    in_bytes: bool = False,
    sums: bool = False,
    zeros: torch.Tensor | None = None,
) -> tuple[Rows, Route]:
    """x's rows in the order of their experts, padded to whole records, in 16 bits, as bytes and with sums as asked.

    `zeros`, int32 in fours, are set to 0 on the way.
    """
    (tokens, slots), experts, device = ids.shape, len(bank.where), x.device.index
    pairs, types = tokens * slots, (int(ids.dtype == torch.int64), _WEIGHT_TYPES[weights.dtype])
    first, order = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (experts + 1, pairs))
    route = Route(first, order, torch.empty(pairs, dtype=torch.float32, device=x.device), slots)
    rows = Rows.empty(x, pairs, bank, plain=plain, in_bytes=in_bytes, sums=sums)
    threads, chunks, shares = place_blocks(tokens, slots, bank.shape.any.padded_columns, processors_of(device))
    place = _Place(
        x.data_ptr(), ids.data_ptr(), weights.data_ptr(), *(each.data_ptr() for each in route[:3]),
        rows.argument(bank, zeros), *types, tokens, slots, experts, x.shape[1], chunks,
    )  # fmt: skip
    find_function("route.cu", rows_instance("place_rows", bank.shape, x.dtype), device).launch(
        chunks * shares, threads, 0, (place,), programmatic=True
    )
    return rows, route


def place_blocks(tokens: int, slots: int, columns: int, processors: int) -> tuple[int, int, int]:
    """Threads of a block of `place_rows`, chunks of a row with blocks of their own, and shares of the tokens.

    Every block counts all pairs; so where these are many, blocks are few and large.
    """
    if tokens * slots <= FEW_PAIRS:
        threads, chunks = 256, -(-columns // (8 * 256))
        shares = min(tokens, max(1, 8 * processors // chunks))
    else:
        threads, chunks, shares = 1024, 1, min(tokens, processors)
    return threads, chunks, max(shares, -(-tokens // (PLACE_PAIRS // slots)))


def prepare(
    x: torch.Tensor,
    bank: RecordBank,
    rows: int,
    *,
    plain: bool = False,
    in_bytes: bool = False,
    sums: bool = False,
    count: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> Rows:
    """x's rows as asked, the first `count` of them. `zeros`, int32 in fours, are set to 0."""
    made = Rows.empty(x, rows, bank, plain=plain, in_bytes=in_bytes, sums=sums)
    arguments = _Prepare(x.data_ptr(), made.argument(bank, zeros), address(count), rows, x.shape[1])
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


def rows_instance(kernel: str, bank: choose.Bank, dtype: torch.dtype) -> str:
    """`prepare_rows` or `place_rows`."""
    return f"{kernel}<{bank.any.group_size}, {is_bf16(dtype)}>"
