# SPDX-License-Identifier: Apache-2.0
"""The sorted path of experts by itself: odd shapes, two group sizes, compensators, and its short cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from moepress.kernels.records import (
    RecordLayout,
    deinterleave,
    dequantize_records,
    interleaved_rows,
    pack_records,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@dataclass(frozen=True)
class Case:
    """A layer of random experts. Widths and ranks are taken in turn; rank None: an expert without compensator."""

    experts: int
    chosen: int
    hidden: int
    inner: int
    bits: tuple[int, ...] = (3,)
    down_bits: tuple[int, ...] = (3,)
    group_size: int = 64
    down_group_size: int = 64
    ranks: tuple[int | None, ...] = ()
    factor_bits: int = 4
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "ragged": Case(6, 2, 136, 40),
    "a unit and a bit": Case(5, 3, 192, 72, dtype=torch.float16),
    "groups of 32 in down alone": Case(8, 2, 256, 320, down_group_size=32),
    "groups of 128 in gate and up alone": Case(8, 2, 512, 192, group_size=128),
    "widths that differ": Case(8, 2, 256, 448, bits=(2,), down_bits=(8,)),
    "down alone mixed": Case(9, 2, 128, 136, down_bits=(1, 2, 3, 4), down_group_size=32),
    "all mixed, also bytes": Case(7, 2, 128, 200, bits=(1, 2, 3, 4, 5), down_bits=(8, 3, 1), dtype=torch.float16),
    "long rows": Case(4, 2, 1600, 1664, bits=(4,), down_bits=(2,)),
    "long, a bit in down": Case(5, 2, 1536, 1600, down_bits=(1,), ranks=(32, None), factor_bits=3),
    "long, larger groups": Case(4, 2, 1664, 1544, group_size=128),
    "long in down alone": Case(4, 2, 256, 1544),
    "long, mixed in gate and up": Case(4, 2, 1536, 1672, bits=(2, 3)),
    "long, mixed in half": Case(
        4, 2, 1536, 1600, bits=(1, 4), down_bits=(4, 2, 1), down_group_size=128, dtype=torch.float16
    ),
    "long, groups of 128": Case(
        4, 2, 1600, 1600, down_bits=(4,), group_size=128, down_group_size=128, ranks=(64, None), factor_bits=8
    ),
    "many experts": Case(300, 8, 64, 64),
    "compensated": Case(6, 2, 256, 192, ranks=(32,)),
    "compensated, ranks that differ": Case(8, 2, 512, 320, ranks=(None, 64, 8, 16), factor_bits=3),
    "compensated, most without": Case(6, 2, 136, 40, ranks=(None, None, 16), factor_bits=8, dtype=torch.float16),
    "compensated, eight columns": Case(6, 2, 256, 192, ranks=(8, None)),
    "compensated, mixed, long": Case(4, 2, 1600, 1664, bits=(2, 3), down_bits=(3, 4), ranks=(128, None)),
}
TOKENS = (9, 17, 33, 180, 700, 1100)
"""Tiles of 8, 24 or 32, 80, 128 and 144 tokens in cases of few experts; blocks that place rows, small and large."""
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def halves(case: Case) -> tuple[tuple[int, int, tuple[int, ...], int], ...]:
    """Rows, columns, widths and group size of gate and up, and of down."""
    return (
        (interleaved_rows(case.inner), case.hidden, case.bits, case.group_size),
        (case.hidden, case.inner, case.down_bits, case.down_group_size),
    )


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels of this file side by side."""
    from moepress.kernels.cuda import choose, compiler, many
    from moepress.kernels.cuda.launch import architecture

    requests = set()
    for case in CASES.values():
        banks, factors = [], []
        for half, (n, k, widths, group_size) in enumerate(halves(case)):
            banks.append(choose.Bank(tuple(RecordLayout(n, k, bits, group_size) for bits in sorted(set(widths)))))
            most = (2 - half) * max((rank or 0 for rank in case.ranks), default=0)
            sides = ((most, k), (n, most)) if most else ()
            factors.append(tuple(choose.Bank((RecordLayout(*side, case.factor_bits, 64),)) for side in sides) or None)
        for source, instance in many.instances(*banks, factors, case.dtype):
            requests.add(compiler.Request(source, instance, architecture()))
    compiler.warm(sorted(requests, key=str))


class Layer(NamedTuple):
    """Banks, and their matrices [E, rows, columns] in float64 with compensators added."""

    banks: tuple[Any, Any]
    factors: tuple[Any, Any]
    gate_up: torch.Tensor
    down: torch.Tensor


def random_bank(
    rows: int,
    columns: int,
    widths: Sequence[int | None],
    group_size: int,
    live_rows: Sequence[int | None],
    seed: int,
    *,
    of_factors: bool = False,
) -> tuple[Any, torch.Tensor]:
    """A bank of an expert for each width, none for None, and its matrices, with zeros below the `live_rows`; in factors
    the middle code is the zero."""
    from moepress.kernels.cuda.run import RecordBank

    generator = torch.Generator("cuda").manual_seed(seed)
    layouts = [RecordLayout(rows, columns, bits, group_size) for bits in sorted({b for b in widths if b})]
    records, where = [], [None] * len(widths)
    matrices = torch.zeros(len(widths), rows, columns, dtype=torch.float64, device="cuda")
    for which, layout in enumerate(layouts):
        full, mine = 2**layout.bits, [e for e, bits in enumerate(widths) if bits == layout.bits]
        codes = torch.randint(0, full, (len(mine), rows, columns), generator=generator, device="cuda").to(torch.uint8)
        scale, zero = torch.rand(2, len(mine), rows, layout.groups, generator=generator, device="cuda")
        scale = 3.5 / columns**0.5 / full * (0.5 + scale)
        zero = torch.full_like(zero, full / 2) if of_factors else full * (0.3 + 0.4 * zero)
        for slot, e in enumerate(mine):
            where[e] = which, slot
            scale[slot, rows if live_rows[e] is None else live_rows[e] :] = 0
        records.append(pack_records(codes, scale.half(), zero.half(), layout))
        matrices[mine] = dequantize_records(records[-1], layout).double()
    return RecordBank.build(records, layouts, where, is_v=of_factors), matrices


def random_factors(rows: int, columns: int, case: Case, sides: int, seed: int) -> tuple[Any, torch.Tensor]:
    """Compensators of a half of a layer, of two sides or one, and the matrices that they add."""
    from moepress.kernels.cuda.run import Factors

    ranks = [case.ranks[e % len(case.ranks)] for e in range(case.experts)]
    most, widths = sides * max(rank or 0 for rank in ranks), [case.factor_bits if rank else None for rank in ranks]
    live = [sides * (rank or 0) for rank in ranks]
    v, v_matrices = random_bank(most, columns, widths, 64, live, seed, of_factors=True)
    u, u_matrices = random_bank(rows, most, widths, 64, [None] * case.experts, seed + 1, of_factors=True)
    return Factors(v, u), u_matrices @ v_matrices


def make(case: Case) -> Layer:
    banks, factors, matrices = [], [], []
    for half, (n, k, widths, group_size) in enumerate(halves(case)):
        every = [widths[e % len(widths)] for e in range(case.experts)]
        bank, matrix = random_bank(n, k, every, group_size, [None] * case.experts, 10 * half)
        both, added = random_factors(n, k, case, 2 - half, 10 * half + 1) if case.ranks else (None, 0.0)
        banks.append(bank)
        factors.append(both)
        matrices.append(matrix + added)
    return Layer(tuple(banks), tuple(factors), *matrices)


def inputs(case: Case, tokens: int, *, nobody: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, case.experts, generator=generator).topk(case.chosen).indices
    ids = torch.where(torch.rand(ids.shape, generator=generator) < nobody, -1, ids)
    x = torch.randn(tokens, case.hidden, generator=generator)
    return x.to("cuda", case.dtype), ids.cuda(), 0.1 + torch.rand(ids.shape, generator=generator).cuda()


def run(case: Case, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The kernels, in memory full of NaN: of large blocks and of those that small tensors share."""
    from moepress.kernels.cuda import many

    y = torch.full_like(x, float("nan"))
    nan = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 26, *[1 << 17] * 64)]
    del nan
    many.run_many(x, ids, weights, *layer.banks, case.inner, y, *layer.factors)
    return y


def plain(
    case: Case, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The same with torch's products of dequantised matrices in `dtype`."""
    x, y = x.to(dtype), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        if e < 0:
            continue
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = deinterleave(layer.gate_up[e].to(dtype), case.inner)
        h = torch.nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
        part = weights[token, slot, None].to(dtype) * (h @ layer.down[e].to(dtype).T)
        y.index_add_(0, token, part.double())
    return y.to(dtype)


@by_case
def test_against_float64(case: Case) -> None:
    """At most twice the error of torch in the same dtype, and the same bits again."""
    layer = make(case)
    for tokens in TOKENS:
        for nobody in (0.0, 0.6):
            x, ids, weights = inputs(case, tokens, nobody=nobody)
            y, truth = run(case, layer, x, ids, weights), plain(case, layer, x, ids, weights, torch.float64)
            error, yardstick = (
                (found.double() - truth).abs() for found in (y, plain(case, layer, x, ids, weights, case.dtype))
            )
            what = f"{tokens} tokens, {nobody} to nobody"
            assert y.isfinite().all(), what
            rms, bound = error.square().mean().sqrt(), 2 * yardstick.square().mean().sqrt()
            assert rms <= bound, f"{what}: rms {rms:.3g}, at most {bound:.3g}"
            assert error.max() <= 2 * yardstick.max() + 1e-6 * truth.abs().max(), what
            assert torch.equal(run(case, layer, x, ids, weights), y), f"{what}: not bitwise repeatable"
            assert torch.equal(run(case, layer, x, ids.int(), weights), y), f"{what}: ids as int32"


@pytest.mark.parametrize("case", [case for name, case in CASES.items() if name.startswith("long")])
def test_inputs_with_a_mean(case: Case) -> None:
    """What bases make of x is taken off again: the larger its mean, the more there is to take off."""
    layer = make(case)
    x, ids, weights = inputs(case, 33)
    x = x + 2
    y, truth = run(case, layer, x, ids, weights), plain(case, layer, x, ids, weights, torch.float64)
    error, yardstick = (
        (found.double() - truth).norm() for found in (y, plain(case, layer, x, ids, weights, case.dtype))
    )
    assert error <= 2 * yardstick


@pytest.mark.parametrize("tokens", [9, 33])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.ranks])
def test_a_t_of_zeros_is_there(case: Case, tokens: int) -> None:
    """In memory 0 stands for what nobody has made yet. Nor does a token without a number keep others waiting."""
    layer = make(case)
    x, ids, weights = inputs(case, tokens)
    x[::2], x[1] = 0, float("nan")
    y, of_others = run(case, layer, x, ids, weights), x[3::2]
    assert torch.equal(y[::2], torch.zeros_like(y[::2])) and y[1].isnan().all()
    x[1] = 0
    assert of_others.any() and torch.equal(run(case, layer, x, ids, weights)[3::2], y[3::2])


def test_graphs_of_experts_without_compensators() -> None:
    """A block whose first tile is none, because it would be of v of such an expert, waits for the launch ahead too."""
    from moepress.kernels.cuda import choose, many
    from moepress.kernels.cuda.functions import processors_of

    case, tokens = Case(40, 4, 1024, 768, ranks=(None, 16)), 48
    layer, (x, ids, weights) = make(case), inputs(case, 48)
    for bank in layer.banks:
        tile = choose.expert_tiles(bank.shape, 4 * tokens / case.experts)[0]
        of_w = len(ids.unique()) * -(-bank.shape.row_blocks // tile.row_blocks)
        assert tile.takes_bytes and of_w > tile.blocks * processors_of(0), "blocks are to have more than one tile"
    run(case, layer, x, ids, weights)
    graph, y = torch.cuda.CUDAGraph(), torch.empty_like(x)
    with torch.cuda.graph(graph):
        many.run_many(x, ids, weights, *layer.banks, case.inner, y, *layer.factors)
    for turn in range(8):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(turn)) * 4**turn)
        ids.copy_(ids[torch.randperm(tokens, generator=torch.Generator().manual_seed(turn))])
        graph.replay()
        replayed = y.clone()
        assert replayed.isfinite().all() and torch.equal(replayed, run(case, layer, x, ids, weights)), turn


@pytest.mark.parametrize("tokens", [9, 256, 257])
@pytest.mark.parametrize("experts", [33, 512])
def test_who_counts_ids_leaves_out_the_same(experts: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launch that places rows: whatever is no expert's id. 256 tokens are the most that gate and up count."""
    from moepress.kernels.cuda import grouped

    case = Case(experts, 8, 64, 64)
    layer, (x, ids, weights) = make(case), inputs(case, tokens)
    some = torch.rand(ids.shape, generator=torch.Generator("cuda").manual_seed(tokens), device="cuda") < 0.4
    others = torch.tensor([-1, experts, 2**31, -(2**40), 2**32], device="cuda")
    ids = torch.where(some, others[torch.arange(ids.numel(), device="cuda").view(ids.shape) % 5], ids)
    for chosen in (ids, ids.clamp(-5, experts + 5).int(), torch.full_like(ids, -1), torch.full_like(ids, experts - 1)):
        y = run(case, layer, x, chosen, weights)
        with monkeypatch.context() as patch:
            patch.setattr(grouped, "FEW_PAIRS", 0)
            assert torch.equal(run(case, layer, x, chosen, weights), y)
    assert run(case, layer, x, ids, weights).any()


@by_case
@pytest.mark.parametrize("tokens", [9, 33, 180])
def test_short_cuts_change_no_bit(case: Case, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and sums of the intermediate made where it is; tiles known before the route is made."""
    from moepress.kernels.cuda import choose, grouped, many

    layer, given = make(case), inputs(case, tokens, nobody=0.1)
    y = run(case, layer, *given)
    monkeypatch.setattr(grouped, "FEW_PAIRS", 0)
    assert torch.equal(run(case, layer, *given), y)
    monkeypatch.undo()
    if tokens == 33 and case in (CASES["long rows"], CASES["long, a bit in down"], CASES["long, mixed in half"]):
        tiles = [choose.expert_tiles(bank.shape, 66 / case.experts)[0] for bank in layer.banks]
        assert choose.passes_sums(*tiles), "sums are to be tested too"
    monkeypatch.setattr(choose.Tile, "makes_bytes", False)
    monkeypatch.setattr(many.choose, "passes_sums", lambda up_tile, tile: False)
    assert torch.equal(run(case, layer, *given), y)


@pytest.mark.parametrize(
    ("tokens", "slots"), [(1, 1), (31, 1), (257, 1), (1024, 2), (300, 31), (9000, 7), (1 << 16, 1)]
)
@pytest.mark.parametrize("experts", [1, 8, 127, 512])
def test_places_are_those_of_a_stable_sort(tokens: int, slots: int, experts: int) -> None:
    from moepress.kernels.cuda.bank import RecordBank
    from moepress.kernels.cuda.rows import sort_rows

    bank, _ = random_bank(64, 72, [3], 32, [None], 0)
    bank = RecordBank(bank.records, bank.layouts, (None,) * experts, bank.table)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, slots), generator=generator).cuda()
    x = torch.randn(tokens, 72, generator=generator).to("cuda", torch.bfloat16)
    weights = torch.rand(tokens, slots, generator=generator).cuda()
    rows, route = sort_rows(x, ids, weights, bank, plain=True, in_bytes=True)
    flat = ids.flatten()
    runs = (flat >= 0) & (flat < experts)
    order = torch.where(runs, flat, experts).sort(stable=True).indices[: runs.sum()]
    assert torch.equal(route.pairs[: len(order)].long(), order)
    assert torch.equal(route.weights[: len(order)], weights.flatten()[order])
    counts = torch.bincount(flat[runs], minlength=experts)
    assert route.first.tolist() == [0, *counts.cumsum(0).tolist()]
    assert rows.plain is not None and rows.bytes is not None and rows.sums is not None
    x = x[order // slots]
    assert torch.equal(rows.plain[: len(order), :72], x) and not rows.plain[: len(order), 72:].any()
    columns = torch.nn.functional.pad(x.double(), (0, 56))
    found, scales, sums = from_bytes(rows.bytes[: len(order)], rows.sums[:, : len(order)], 32)
    assert ((found - columns).abs().unflatten(1, (-1, 32)) <= scales.unsqueeze(-1) / 2).all()
    torch.testing.assert_close(sums, found.unflatten(1, (-1, 32)).sum(-1), atol=0, rtol=0)
    largest = columns.abs().unflatten(1, (-1, 32)).amax(-1)
    assert (scales <= largest.clamp(min=2.0**-113) * 2.0**-13).all(), "15 bits"


@pytest.mark.parametrize("columns", [72, 200, 2056, 4104])
def test_sums_of_placed_rows(columns: int) -> None:
    """Of rows in one chunk and in several: what each unit of x sums up to."""
    from moepress.kernels.cuda.rows import place_blocks, sort_rows

    bank, _ = random_bank(64, columns, [3] * 3, 64, [None] * 3, 0)
    generator = torch.Generator().manual_seed(columns)
    ids = torch.randint(-1, 4, (37, 2), generator=generator).cuda()
    x = torch.randn(37, columns, generator=generator).to("cuda", torch.bfloat16)
    rows, route = sort_rows(x, ids, torch.ones(37, 2, device="cuda"), bank, plain=True, sums=True)
    assert place_blocks(37, 2, bank.shape.any.padded_columns, 132)[1] == -(-columns // 2048)
    pairs = route.pairs[: int(route.count)].long()
    assert rows.plain is not None and rows.sums is not None and rows.bytes is None and len(pairs) > 20
    plain = rows.plain[: len(pairs)]
    assert torch.equal(plain[:, :columns], x[pairs // 2]) and not plain[:, columns:].any()
    wanted = plain.double().unflatten(1, (-1, 64)).sum(-1)
    assert rows.sums.shape[1] % 4 == 0, "copies take 16 bytes"
    found = rows.sums[: len(pairs), : wanted.shape[1]].double()
    torch.testing.assert_close(found, wanted, atol=1e-6 * 64, rtol=1e-6)


def from_bytes(stored: torch.Tensor, sums: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes [P, K] in a 16-bit type and sums [records, P, floats] -> x [P, K], scales and sums [P, segments]."""
    rows, segment = len(stored), min(group, 64)
    high, low = stored.contiguous().view(torch.int8).view(rows, -1, 2, 4, 4, 4).unbind(2)  # unit, t, n, byte
    integers = high.double() * 256 + low.double()
    # of byte b: octet 2 n + b % 2, column 2 t + b // 2
    integers = integers.unflatten(-1, (2, 2)).permute(0, 1, 3, 5, 2, 4).reshape(rows, -1)
    pairs = sums.double().transpose(0, 1).flatten(1).unflatten(1, (-1, 2))[:, : integers.shape[1] // segment]
    scales, totals = pairs.unbind(-1)
    return (integers.unflatten(1, (-1, segment)) * scales.unsqueeze(-1)).flatten(1), scales, scales * totals
