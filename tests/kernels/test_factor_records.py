# SPDX-License-Identifier: Apache-2.0
"""A compensator's factors in records are the factors, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.format.packing import pack_codes
from moepress.format.spec import WeightSpec
from moepress.format.weight import dequantize_factors
from moepress.kernels.linear.factors import factor_layouts, pack_factors, why_not_records
from moepress.kernels.records import dequantize_records


def random_factors(spec: WeightSpec, n: int, k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * k + spec.rank)
    parts = {}
    for name, count in (("u", n * spec.rank), ("v", spec.rank * k)):
        codes = torch.randint(0, 2**spec.factor_bits, (count,), generator=generator, dtype=torch.uint8)
        parts[f"{name}_packed"] = pack_codes(codes, spec.factor_bits)
        parts[f"{name}_scale"] = torch.randn(-(-count // 64), generator=generator).half()
    return parts


@given(
    n=st.integers(1, 200), k=st.sampled_from([64, 128, 192, 256]), bits=st.sampled_from([3, 4, 8]),
    rank=st.sampled_from([8, 16, 32, 64, 128]),
)  # fmt: skip
def test_records_hold_the_factors(n: int, k: int, bits: int, rank: int) -> None:
    spec = WeightSpec(bits=3, rank=rank, factor_bits=bits)
    parts = random_factors(spec, n, k)
    assert why_not_records(spec, k) is None
    layouts = factor_layouts(spec, n, k)
    v, u = (dequantize_records(*each) for each in zip(pack_factors(parts, spec, n, k), layouts, strict=True))
    true_u, true_v = dequantize_factors(parts, spec, n, k)
    assert torch.equal(u, true_u) and torch.equal(v, true_v)


@pytest.mark.parametrize(
    ("rank", "bits", "k", "reason"),
    [(24, 4, 128, "rank of 8, 16, 32 or a multiple of 64, not 24"), (16, 4, 100, "multiple of 64, not 100"),
     (16, 16, 128, "as they are"), (4, 3, 128, "not 4")],
)  # fmt: skip
def test_reasons(rank: int, bits: int, k: int, reason: str) -> None:
    assert reason in str(why_not_records(WeightSpec(bits=3, rank=rank, factor_bits=bits), k))
