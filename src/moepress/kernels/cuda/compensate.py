# SPDX-License-Identifier: Apache-2.0
"""Compensators W + u v of both halves of a layer of experts: who makes t = v x, and where it goes.

Tiles of 8 and 24 tokens multiply v in the launch of W, and what that takes is planned before it. Others are given t,
which a launch before makes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import Factors, RecordBank
from moepress.kernels.cuda.functions import processors_of
from moepress.kernels.cuda.grouped import Added, find_tile, grouped
from moepress.kernels.cuda.rows import Route, Rows, combine


@dataclass(frozen=True)
class Half:
    """One half of a layer of experts, as far as its compensators are concerned."""

    tile: choose.Tile
    bank: RecordBank
    factors: Factors | None

    @property
    def makes_t(self) -> bool:
        """Whether its own launch does."""
        return self.factors is not None and self.tile.multiplies_v

    def split(self, pairs: int, processors: int) -> choose.VSplit | None:
        """Of v, in tiles of 24 tokens."""
        if self.factors is None or not self.tile.scales_sums:
            return None
        banks = self.bank.shape, self.factors.v.shape
        return choose.v_split(self.tile, *banks, len(self.bank.where), pairs, processors)

    def zeros(self, pairs: int, split: choose.VSplit | None) -> int:
        """int32 that are 0 before its launch, in fours: t itself, or counters of what is done of it."""
        if self.factors is None or not self.tile.multiplies_v:
            return 0
        if split is None:
            return zeros_of_t(self.factors, pairs)
        tiles = self.tile.v_tiles(self.factors.v.shape, len(self.bank.where), pairs)
        return -(-(1 + (tiles * self.tile.warps if split.splits > 1 else 0)) // 4) * 4


def plan_t(x: torch.Tensor, pairs: int, *halves: Half) -> tuple[list[Added | None], torch.Tensor | None]:
    """What each half adds if its own launch makes t; and int32 of that, which the caller sets to 0."""
    if not any(half.makes_t for half in halves):
        return [None] * len(halves), None
    splits = [half.split(pairs, processors_of(x.device.index)) for half in halves]
    sizes = [half.zeros(pairs, split) for half, split in zip(halves, splits, strict=True)]
    zeros = torch.empty(sum(sizes), dtype=torch.int32, device=x.device)
    return [
        _to_make(x, pairs, half, split, own) if half.makes_t else None
        for half, split, own in zip(halves, splits, zeros.split(sizes), strict=True)
    ], zeros


def _to_make(x: torch.Tensor, pairs: int, half: Half, split: choose.VSplit | None, zeros: torch.Tensor) -> Added:
    assert half.factors is not None, "a half without compensators makes no t"
    if split is None:
        return Added(half.factors, unset_t(zeros, x.dtype, pairs))
    done, arrived, parts = zeros[:1], zeros[1:], None
    if split.splits > 1:
        tiles = half.tile.v_tiles(half.factors.v.shape, len(half.bank.where), pairs)
        parts = torch.empty(tiles * split.splits * half.tile.v_floats, dtype=torch.float32, device=x.device)
    return Added(half.factors, x.new_empty(pairs, half.factors.u_columns), done, split, parts, arrived)


def zeros_of_t(factors: Factors, rows: int) -> int:
    """int32 that are 0 where tiles of 8 tokens make t: as many bytes as it has."""
    assert (rank := factors.v.layouts[0].rows) in (8, 16, 32) or rank % 64 == 0, f"rows of t would end within {rank}"
    return rows * factors.t_columns // 2


def unset_t(zeros: torch.Tensor, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """t [rows, t_columns] in their place."""
    return zeros.view(dtype).view(rows, -1)


def make_t(rows: Rows, factors: Factors | None, route: Route, ids: torch.Tensor | None = None) -> Added | None:
    """What a half adds in other tiles, whose t is made here, by a launch or two; None: nothing."""
    if factors is None:
        return None
    assert rows.plain is not None, "v is multiplied with 16-bit rows"
    return Added(factors, multiply(rows.plain, factors.v, factors.u_columns, route, ids))


def multiply(
    x: torch.Tensor, bank: RecordBank, columns: int, route: Route, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Sorted rows times their experts' matrices; the first `columns` results are kept.

    Two launches where few tiles share the columns of x. `ids` as in `grouped`.
    """
    rows, experts = len(x), len(bank.where)
    processors = processors_of(x.device.index)
    tile, stages = find_tile(x, bank, "PLAIN", choose.factor_tiles(bank.shape, experts, rows, processors))
    splits, each = choose.factor_splits(bank.shape, tile, experts, rows, processors)
    parts = x.new_empty(rows * splits, columns)
    operands = Rows(x, None, None), parts.view(rows, -1), bank, columns, rows // route.slots
    part = choose.Part(0, 0, splits, each)
    grouped("PLAIN", tile, stages, *operands, route=route, part=part, ids=ids)
    if splits == 1:
        return parts
    combine(parts, None, 1, y := x.new_empty(rows, columns))
    return y
