# SPDX-License-Identifier: Apache-2.0
"""Two tokens and more through a matrix, or through a layer's experts: a few launches of rows.py and grouped.py.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import Factors, RecordBank
from moepress.kernels.cuda.compensate import Half, make_t, plan_t, unset_t, zeros_of_t
from moepress.kernels.cuda.functions import is_bf16, processors_of
from moepress.kernels.cuda.grouped import Added, Next, find_tile, grouped, grouped_instance
from moepress.kernels.cuda.rows import Rows, combine, prepare, rows_instance, sort_rows

HALVES: tuple[choose.Mode, choose.Mode] = "GATE_UP", "DOWN"


def many_linear(
    x: torch.Tensor,
    y: torch.Tensor,
    out_features: int,
    bank: RecordBank,
    bias: torch.Tensor | None,
    factors: Factors | None = None,
) -> None:
    """x [M, K] (W + u v)^T (+ bias) into the first N columns of y, which has a multiple of eight of them."""
    columns = bank.layouts[0].padded_columns
    if columns != x.shape[1]:
        x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    tiles = choose.dense_tiles(bank.shape, len(x), processors_of(x.device.index))
    tile, stages = find_tile(x, bank, "DENSE", tiles, factors and factors.ranks)
    if tile.takes_bytes:
        zeros = torch.empty(zeros_of_t(factors, len(x)), dtype=torch.int32, device=x.device) if factors else None
        rows = prepare(x, bank, len(x), in_bytes=True, zeros=zeros)
        added = Added(factors, unset_t(zeros, x.dtype, len(x))) if factors else None
        grouped("DENSE", tile, stages, rows, y, bank, out_features, len(x), bias=bias, added=added)
        return
    added = None
    if factors:  # t is one more dense layer, whose clusters add up parts in float32
        many_linear(x, t := x.new_empty(len(x), factors.u_columns), factors.u_columns, factors.v, None)
        added = Added(factors, t)
    operands = Rows(x, None, None), y, bank, out_features, len(x)
    for part in choose.dense_parts(bank.shape, tile, len(x), processors_of(x.device.index)):
        grouped("DENSE", tile, stages, *operands, bias=bias, added=added, part=part)


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
    halves = Half(up_tile, gate_up, gate_up_factors), Half(tile, down, down_factors)
    (up_added, added), zeros = plan_t(x, pairs, *halves)
    bytes_up = up_tile.takes_bytes
    made = {"plain": not bytes_up, "in_bytes": bytes_up, "sums": up_tile.scales_sums}
    rows, route = sort_rows(x, ids, weights, gate_up, **made, zeros=zeros)
    in_bytes = choose.passes_bytes(up_tile, gate_up.shape, tile, down.shape)
    sums = choose.passes_sums(up_tile, tile)
    h = Rows.empty(x, pairs, down, plain=not in_bytes, in_bytes=in_bytes, sums=sums)
    if h.plain is not None and h.plain.shape[1] != intermediate:
        h.plain.zero_()  # padding meets real scales and zeros in the short last group
    then = Next(h, down) if in_bytes or sums else None
    columns = down.layouts[0].padded_columns
    operands = rows, h.plain, gate_up, intermediate, tokens
    given = up_added or make_t(rows, gate_up_factors, route, ids)
    routed = ids if given is up_added else None  # else a launch is between
    grouped("GATE_UP", up_tile, up_stages, *operands, ld=columns, route=route, added=given, then=then, ids=routed)

    if tile.takes_bytes and not in_bytes:
        h = prepare(h.plain, down, pairs, in_bytes=True, count=route.count)
    if tile.scales_sums and not sums:
        h = h._replace(sums=prepare(h.plain, down, pairs, sums=True, count=route.count).sums)
    given = added or make_t(h, down_factors, route)
    parts = x.new_empty(pairs, x.shape[1])
    operands = h, parts, down, x.shape[1], tokens
    grouped("DOWN", tile, stages, *operands, route=route, added=given)
    combine(parts, ids, len(down.where), y)


def instances(
    gate_up: choose.Bank,
    down: choose.Bank,
    factors: Sequence[tuple[choose.Bank, choose.Bank] | None],
    dtype: torch.dtype,
) -> Iterator[tuple[str, str]]:
    """Pairs of source and instance that `run_many` can need; `factors` are v and u of both halves."""
    yield "route.cu", f"combine<{is_bf16(dtype)}>"
    for kernel, bank in (("place_rows", gate_up), ("prepare_rows", down)):
        yield "route.cu", rows_instance(kernel, bank, dtype)
    for half, bank, both in zip(HALVES, (gate_up, down), factors, strict=True):
        for tokens in choose.EXAMPLES:
            tile = choose.expert_tiles(bank, tokens)[0]
            yield "grouped.cu", grouped_instance(half, bank, dtype, tile, _ranks(both))
            if both and not tile.multiplies_v:
                for own in choose.every_factor_tile(both[0]):
                    yield "grouped.cu", grouped_instance("PLAIN", both[0], dtype, own)


def dense_instances(
    bank: choose.Bank, factors: tuple[choose.Bank, choose.Bank] | None, dtype: torch.dtype, processors: int
) -> Iterator[tuple[str, str]]:
    """The same of a dense layer of several tokens, and of its v, which is one as well."""
    yield "route.cu", rows_instance("prepare_rows", bank, dtype)
    for tile in choose.every_dense_tile(bank, processors):
        yield "grouped.cu", grouped_instance("DENSE", bank, dtype, tile, _ranks(factors))
    if factors:
        yield from dense_instances(factors[0], None, dtype, processors)


def _ranks(factors: tuple[choose.Bank, choose.Bank] | None) -> choose.Ranks | None:
    return choose.ranks(factors[0].any, factors[1].any) if factors else None
