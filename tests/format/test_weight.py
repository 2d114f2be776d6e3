# SPDX-License-Identifier: Apache-2.0
"""`dequantize` is the documented equation: held against a loop over single elements in float64 that shares no code."""

from __future__ import annotations

import math

import pytest
import torch

from moepress.format.spec import FACTOR_GROUP, WeightSpec
from moepress.format.weight import affine, dequantize, dequantize_base, dequantize_factor, dequantize_factors

Parts = dict[str, torch.Tensor]


def random_parts(spec: WeightSpec, n: int, k: int, *lead: int) -> Parts:
    """Any bytes are codes; scales and zeros differ in every group and are far from 0 and 1."""
    generator = torch.Generator().manual_seed(7)
    parts = {}
    for name, (dtype, shape) in spec.parts(n, k).items():
        if dtype == "U8":
            parts[name] = torch.randint(0, 256, (*lead, *shape), generator=generator, dtype=torch.uint8)
        else:
            values = torch.randn((*lead, *shape), generator=generator)
            parts[name] = (3 * values if name == "zero" else values).half()
    return parts


def code_at(row: list[int], bits: int, index: int) -> int:
    """Code `index` of packed bytes, bit by bit."""
    places = range(index * bits, (index + 1) * bits)
    return sum((row[place // 8] >> place % 8 & 1) << j for j, place in enumerate(places))


def by_the_book(parts: Parts, spec: WeightSpec, n: int, k: int) -> torch.Tensor:
    """w[n, k] = (code - zero) * scale + sum_r u v, element by element, in Python's own floats."""
    packed, scale, zero = (parts[name].tolist() for name in ("packed", "scale", "zero"))
    u, v = (factor_by_the_book(parts, name, spec, n if name == "u" else k) for name in ("u", "v"))
    out = torch.empty(n, k, dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            group = j // spec.group_size
            value = (code_at(packed[i], spec.bits, j) - zero[i][group]) * scale[i][group]
            out[i, j] = value + sum(u[i * spec.rank + r] * v[r * k + j] for r in range(spec.rank))
    return out


def factor_by_the_book(parts: Parts, name: str, spec: WeightSpec, side: int) -> list[float]:
    """Row-major values of one factor."""
    if not spec.rank:
        return []
    if spec.factor_bits == 16:
        return parts[name].flatten().tolist()
    packed, scale = parts[f"{name}_packed"].tolist(), parts[f"{name}_scale"].tolist()
    half = 2 ** (spec.factor_bits - 1)
    return [
        (code_at(packed, spec.factor_bits, i) - half) * scale[i // FACTOR_GROUP] for i in range(side * spec.rank)
    ]  # fmt: skip


SPECS = [
    WeightSpec(bits=1, group_size=32),
    WeightSpec(bits=2, group_size=64, rank=3, factor_bits=3),
    WeightSpec(bits=3, group_size=64, rank=5, factor_bits=4),
    WeightSpec(bits=4, group_size=32, rank=2, factor_bits=8),
    WeightSpec(bits=5, group_size=32),
    WeightSpec(bits=6, group_size=128, rank=1, factor_bits=16),
    WeightSpec(bits=8, group_size=64, rank=4, factor_bits=3),
]
by_tag = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.tag)


@by_tag
@pytest.mark.parametrize(("n", "k"), [(5, 128), (7, 131), (3, 33)])
def test_dequantize_is_the_documented_equation(spec: WeightSpec, n: int, k: int) -> None:
    parts = random_parts(spec, n, k)
    found = dequantize(parts, spec, n, k)
    expected = by_the_book(parts, spec, n, k)
    assert found.dtype == torch.float32 and found.shape == (n, k)
    # float32 rounding of terms of this size, nothing more
    assert (found - expected).abs().max() <= 1e-6 * (1 + expected.abs().max()) * (1 + spec.rank)


@by_tag
def test_experts_in_front_are_dequantised_one_by_one(spec: WeightSpec) -> None:
    n, k = 6, 100
    parts = random_parts(spec, n, k, 3)
    stacked = dequantize(parts, spec, n, k)
    assert stacked.shape == (3, n, k)
    for expert in range(3):
        alone = dequantize({name: tensor[expert] for name, tensor in parts.items()}, spec, n, k)
        torch.testing.assert_close(stacked[expert], alone, rtol=1e-6, atol=1e-6)
    assert not torch.equal(stacked[0], stacked[1])


@by_tag
def test_the_weight_is_base_plus_factors(spec: WeightSpec) -> None:
    n, k = 6, 100
    parts = random_parts(spec, n, k)
    expected = dequantize_base(parts, spec, k)
    if spec.rank:
        u, v = dequantize_factors(parts, spec, n, k)
        assert (u.shape, v.shape) == ((n, spec.rank), (spec.rank, k))
        expected = expected + u @ v
        assert not torch.equal(expected, dequantize_base(parts, spec, k))
    assert torch.equal(dequantize(parts, spec, n, k), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_factor_group_runs_across_rows(bits: int) -> None:
    # 10 x 20 values in row-major order make 3 groups of 64 and one of 8
    count = 200
    packed = torch.randint(0, 256, (count * bits // 8,), dtype=torch.uint8)
    scale = torch.tensor([1.0, 10.0, 100.0, 1000.0]).half()
    found = dequantize_factor(packed, scale, bits, (10, 20)).flatten()
    for i in range(count):
        code = code_at(packed.tolist(), bits, i)
        assert found[i].item() == (code - 2 ** (bits - 1)) * 10.0 ** (i // 64)


def test_scales_and_zeros_are_evaluated_in_float32() -> None:
    # in fp16 the difference 7 - 3.001 and its product would both be rounded
    scale, zero = torch.tensor([[0.3333]]).half(), torch.tensor([[3.001]]).half()
    found = affine(torch.full((1, 32), 7, dtype=torch.uint8), scale, zero, 32)
    expected = (7 - zero.item()) * scale.item()
    assert math.isclose(found[0, 0].item(), expected, rel_tol=2e-7)
    assert found[0, 0].item() != torch.tensor(expected).half().item()


def test_the_parts_are_left_alone() -> None:
    spec = WeightSpec(bits=8, group_size=32, rank=2, factor_bits=8)
    parts = random_parts(spec, 4, 64)
    before = {name: tensor.clone() for name, tensor in parts.items()}
    dequantize(parts, spec, 4, 64)
    assert all(torch.equal(parts[name], before[name]) for name in parts)
