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

    def v_warps(self, pairs: int) -> int:
        """Warps that have some of t, of all tiles of v there can be."""
        tiles = self.tile.v_tiles(self.factors.v.shape, len(self.bank.where), pairs) if self.factors else 0
        return tiles * self.tile.warps


def plan_t(x: torch.Tensor, pairs: int, *halves: Half) -> tuple[list[Added | None], torch.Tensor | None]:
    """What each half adds if its own launch makes t; and counters of that, which the caller sets to 0."""
    if not any(half.makes_t for half in halves):
        return [None] * len(halves), None
    splits = [half.split(pairs, processors_of(x.device.index)) for half in halves]
    counts = [
        half.v_warps(pairs) if split and split.splits > 1 else 0 for half, split in zip(halves, splits, strict=True)
    ]
    counters = torch.empty(len(halves) + sum(counts), dtype=torch.int32, device=x.device)
    arrived = counters[len(halves) :].split(counts)
    return [
        _to_make(x, pairs, half, split, counters[i:], arrived[i]) if half.makes_t else None
        for i, (half, split) in enumerate(zip(halves, splits, strict=True))
    ], counters


def _to_make(
    x: torch.Tensor,
    pairs: int,
    half: Half,
    split: choose.VSplit | None,
    done: torch.Tensor,
    arrived: torch.Tensor,
) -> Added:
    """`arrived` is empty where the columns of v are not split."""
    assert half.factors is not None, "a half without compensators makes no t"
    if split is None:
        return Added(half.factors, x.new_empty(pairs, half.factors.t_columns), done)
    parts = None
    if split.splits > 1:
        count = len(arrived) // half.tile.warps * split.splits * half.tile.v_floats
        parts = torch.empty(count, dtype=torch.float32, device=x.device)
    return Added(half.factors, x.new_empty(pairs, half.factors.u_columns), done, split, parts, arrived)


def make_t(rows: Rows, factors: Factors | None, route: Route, *, after_route: bool = False) -> Added | None:
    """What a half adds in other tiles, whose t is made here, by a launch or two; None: nothing."""
    if factors is None:
        return None
    assert rows.plain is not None, "v is multiplied with 16-bit rows"
    return Added(factors, multiply(rows.plain, factors.v, factors.u_columns, route, after_route), None)


def multiply(x: torch.Tensor, bank: RecordBank, columns: int, route: Route, after_route: bool = False) -> torch.Tensor:
    """Sorted rows times their experts' matrices; the first `columns` results are kept.

    Two launches where few tiles share the columns of x. `after_route` as in `grouped`.
    """
    rows, experts = len(x), len(bank.where)
    processors = processors_of(x.device.index)
    tile, stages = find_tile(x, bank, "PLAIN", choose.factor_tiles(bank.shape, experts, rows, processors))
    splits, each = choose.factor_splits(bank.shape, tile, experts, rows, processors)
    parts = x.new_empty(rows * splits, columns)
    operands = Rows(x, None, None), parts.view(rows, -1), bank, columns, rows // route.slots
    part = choose.Part(0, 0, splits, each)
    grouped("PLAIN", tile, stages, *operands, route=route, part=part, after_route=after_route)
    if splits == 1:
        return parts
    combine(parts, None, 1, y := x.new_empty(rows, columns))
    return y
