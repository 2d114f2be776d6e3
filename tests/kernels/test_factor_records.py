# SPDX-License-Identifier: Apache-2.0
"""A compensator's factors in records are the factors, to the bit, and each where kernels look for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.format.packing import pack_codes
from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts, dequantize_factors
from moepress.kernels.factors import FactorShape, stored_rank, why_not_records
from moepress.kernels.records import deinterleave, dequantize_records, interleaved_rows, unpack_records

ALIGNED, OTHERS = (1, 2, 4, 8, 16, 32, 64, 128, 192), (3, 6, 12, 20, 24, 33, 48, 63, 65, 72, 96, 100, 130)
ranks, columns, widths = st.sampled_from(ALIGNED + OTHERS), st.sampled_from((64, 128, 192)), st.sampled_from((3, 4, 8))


def random_factors(spec: WeightSpec, n: int, k: int, lead: tuple[int, ...] = (), seed: int = 0) -> Parts:
    generator = torch.Generator().manual_seed(n * k + spec.rank + 7 * seed)
    parts = {}
    for name, count in (("u", n * spec.rank), ("v", spec.rank * k)):
        codes = torch.randint(0, 2**spec.factor_bits, (*lead, count), generator=generator, dtype=torch.uint8)
        parts[f"{name}_packed"] = pack_codes(codes, spec.factor_bits)
        parts[f"{name}_scale"] = torch.randn(*lead, -(-count // 64), generator=generator).half()
    return parts


def ranked(rank: int, bits: int) -> WeightSpec:
    return WeightSpec(bits=3, rank=rank, factor_bits=bits)


def placed(u: torch.Tensor, v: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """u and v as records have them, without padding beyond `stored_rank`: u's columns are cut to single scales."""
    n, width = u.shape[-2], stored_rank(rank)
    stored_v, stored_u = v.new_zeros(*v.shape[:-2], width, v.shape[-1]), u.new_zeros(*u.shape[:-2], n, width)
    for column in range(rank):
        twice = rank in OTHERS
        place = column // 64 * 128 + column % 64 if twice else column
        stored_v[..., [place, place + 64] if twice else [place], :] = v[..., column : column + 1, :]
        for row in range(n):
            first = (row * rank + column - column % 64) // 64
            stored_u[..., row, place + 64 * ((row * rank + column) // 64 - first) * twice] = u[..., row, column]
    return stored_u, stored_v


@given(n=st.integers(1, 200), k=columns, bits=widths, rank=ranks)
def test_records_hold_the_factors_of_a_dense_layer(n: int, k: int, bits: int, rank: int) -> None:
    spec = ranked(rank, bits)
    parts, shape = random_factors(spec, n, k), FactorShape.of([spec], n, k)
    width = stored_rank(rank)
    assert shape is not None and [(each.rows, each.columns) for each in shape.layouts] == [(width, k), (n, width)]
    v, u = (dequantize_records(*each) for each in zip(shape.pack([parts], rank), shape.layouts, strict=True))
    true_u, true_v = placed(*dequantize_factors(parts, spec, n, k), rank)
    assert torch.equal(u, true_u) and torch.equal(v, true_v)


@given(
    n=st.integers(1, 70), k=columns, bits=widths, some=st.lists(ranks, min_size=1, max_size=3),
    count=st.integers(1, 3), gate_up=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_experts_of_different_ranks_have_zeros_beside_their_factors(
    n: int, k: int, bits: int, some: list[int], count: int, gate_up: bool, seed: int
) -> None:
    specs, halves = [ranked(rank, bits) for rank in some], 2 if gate_up else 1
    shape = FactorShape.of([WeightSpec(bits=2), *specs], n, k, halves)
    most = max(map(stored_rank, some))
    v_layout, u_layout = shape.layouts
    assert (v_layout.rows, u_layout.columns) == (halves * most, halves * most)
    assert u_layout.rows == (interleaved_rows(n) if gate_up else n)
    parts = [random_factors(specs[0], n, k, (count,), 2 * seed + half) for half in range(halves)]
    v, u = (dequantize_records(*each) for each in zip(shape.pack(parts, some[0]), shape.layouts, strict=True))
    of_halves = deinterleave(u, n) if gate_up else (u,)
    for half, (own, own_u) in enumerate(zip(parts, of_halves, strict=True)):
        true_u, true_v = placed(*dequantize_factors(own, specs[0], n, k), some[0])
        wanted_v, wanted_u = torch.zeros(count, most, k), torch.zeros(count, n, halves * most)
        wanted_v[:, : true_v.shape[1]] = true_v
        wanted_u[..., half * most : half * most + true_u.shape[2]] = true_u
        assert torch.equal(v[:, half * most : (half + 1) * most], wanted_v) and torch.equal(own_u, wanted_u)
    # no more than that, in the rows that fill up the last eight of gate and of up
    assert u.count_nonzero() == sum(each.count_nonzero() for each in of_halves)


@given(n=st.integers(1, 40), rank=ranks, bits=widths)
def test_the_product_is_that_of_the_factors(n: int, rank: int, bits: int) -> None:
    spec = ranked(rank, bits)
    parts, shape = random_factors(spec, n, 64), FactorShape.of([spec, ranked(80, bits)], n, 64)
    v, u = (dequantize_records(*each).double() for each in zip(shape.pack([parts], rank), shape.layouts, strict=True))
    true_u, true_v = (each.double() for each in dequantize_factors(parts, spec, n, 64))
    torch.testing.assert_close(u @ v, true_u @ true_v)


@given(rank=st.integers(1, 700))
def test_ranks_in_records(rank: int) -> None:
    width = stored_rank(rank)
    assert width >= rank and (width in (8, 16, 32) or width % 64 == 0), "what rows of t have places for (factor.cuh)"
    assert (width == max(8, rank)) == (rank % 64 == 0 or 64 % rank == 0) and stored_rank(width) == width


def test_zeros_are_middle_codes_and_blocks_of_them_have_no_scale() -> None:
    """So that whatever a kernel does first with codes, scales and zeros, nothing is left."""
    shape = FactorShape.of([ranked(128, 3)], 8, 64, 2)
    parts = [random_factors(ranked(64, 3), 8, 64, (1,), half) for half in range(2)]
    (v_codes, v_scale, _), (u_codes, u_scale, _) = map(unpack_records, shape.pack(parts, 64), shape.layouts)
    for first in (64, 192):
        assert (v_codes[0, first : first + 64] == 4).all() and not v_scale[0, first : first + 64].any()
    gate, up = deinterleave(u_codes[0], 8)
    assert (gate[:, 64:] == 4).all() and (up[:, :128] == 4).all() and (up[:, 192:] == 4).all()
    gate, up = deinterleave(u_scale[0], 8)
    assert gate[:, 0].all() and up[:, 2].all() and not gate[:, 1:].any() and not up[:, [0, 1, 3]].any()


@pytest.mark.parametrize("specs", [[], [WeightSpec(bits=3)], [ranked(8, 16)], [ranked(8, 3), ranked(8, 4)]])
def test_where_there_are_no_records_there_is_no_shape(specs: list[WeightSpec]) -> None:
    assert FactorShape.of(specs, 64, 64) is None


@pytest.mark.parametrize(
    ("specs", "k", "reason"),
    [([ranked(16, 4)], 100, "multiple of 64, not 100"), ([ranked(16, 16)], 128, "factors of 16 bits have no records"),
     ([ranked(8, 8), WeightSpec(bits=3), ranked(16, 3)], 128, "several widths: 3, 8 bits")],
)  # fmt: skip
def test_reasons(specs: list[WeightSpec], k: int, reason: str) -> None:
    assert reason in str(why_not_records(specs, k))


@given(some=st.lists(ranks, max_size=4), k=columns, bits=widths)
def test_no_reason_where_there_are_records(some: list[int], k: int, bits: int) -> None:
    assert why_not_records([WeightSpec(bits=2), *(ranked(rank, bits) for rank in some)], k) is None
    assert why_not_records([WeightSpec(bits=2)], k + 1) is None
