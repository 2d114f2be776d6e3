# SPDX-License-Identifier: Apache-2.0
"""One compressed linear against float64 truth, with torch's own error in the same dtype as the yardstick."""

from __future__ import annotations

import pytest
import torch

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts, dequantize, dequantize_factors
from moepress.kernels.linear.reference import compressed_linear

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
)
on_devices = pytest.mark.parametrize("device", ["cpu", CUDA])
in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SPECS = [
    WeightSpec(bits=1, group_size=32),
    WeightSpec(bits=2, group_size=64, rank=7, factor_bits=3),
    WeightSpec(bits=3, group_size=64),
    WeightSpec(bits=3, group_size=64, rank=16, factor_bits=3),
    WeightSpec(bits=3, group_size=128, rank=8, factor_bits=4),
    WeightSpec(bits=4, group_size=64, rank=5, factor_bits=8),
    WeightSpec(bits=5, group_size=32),
    WeightSpec(bits=6, group_size=64),
    WeightSpec(bits=8, group_size=64, rank=4, factor_bits=16),
]
by_tag = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.tag)


def random_parts(spec: WeightSpec, n: int, k: int, device: str, seed: int = 0) -> Parts:
    """Every code occurs; each group has its own scale and zero; u v is as large as the quantised part."""
    generator = torch.Generator().manual_seed(seed)
    step = 0.1 / 2**spec.bits
    factor_step = (0.03 / max(spec.rank, 1) ** 0.5) ** 0.5 / 2 ** max(spec.factor_bits - 2, 0)
    parts = {}
    for name, (dtype, shape) in spec.parts(n, k).items():
        uniform = torch.rand(shape, generator=generator)
        if dtype == "U8":
            parts[name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        elif name == "scale":
            parts[name] = (step * (0.5 + uniform)).half()
        elif name == "zero":
            parts[name] = (2**spec.bits * (0.2 + 0.6 * uniform)).half()
        elif name in ("u", "v"):
            parts[name] = ((0.03 / spec.rank**0.5) ** 0.5 * torch.randn(shape, generator=generator)).half()
        else:
            parts[name] = (factor_step * (0.5 + uniform)).half()
    return {name: tensor.to(device) for name, tensor in parts.items()}


def inputs(*shape: int, dtype: torch.dtype, device: str, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check(
    x: torch.Tensor, parts: Parts, spec: WeightSpec, n: int, k: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs the op; asserts that its error is at most twice that of torch in x's dtype with the dequantised matrices.

    With a compensator that is torch with three matrices: R values a token are rounded in between, which one product
    of the sum would not do.
    """
    linear = torch.nn.functional.linear
    y = compressed_linear(x, parts, spec, n, k, bias)
    truth = linear(x.double(), dequantize(parts, spec, n, k).double(), None if bias is None else bias.double())
    base = dequantize(parts, WeightSpec(bits=spec.bits, group_size=spec.group_size), n, k)
    plain = linear(x, base.to(x.dtype), bias)
    if spec.rank:
        u, v = (factor.to(x.dtype) for factor in dequantize_factors(parts, spec, n, k))
        plain = plain + linear(linear(x, v), u)
    assert y.dtype == x.dtype and y.shape == truth.shape
    error, yardstick = ((found.double() - truth).abs() for found in (y, plain))
    assert error.max() <= 2 * yardstick.max() + 1e-6, f"max {error.max():.3g} against {yardstick.max():.3g}"
    assert error.mean() <= 2 * yardstick.mean() + 1e-7, f"mean {error.mean():.3g} against {yardstick.mean():.3g}"
    return y


@on_devices
@in_dtypes
@by_tag
@pytest.mark.parametrize(("tokens", "n", "k"), [(33, 48, 256), (1, 70, 131), (5, 128, 96)])
def test_against_float64(
    spec: WeightSpec, tokens: int, n: int, k: int, dtype: torch.dtype, device: str
) -> None:  # fmt: skip
    if k < spec.group_size:
        k = spec.group_size + 1
    check(inputs(tokens, k, dtype=dtype, device=device), random_parts(spec, n, k, device), spec, n, k)


def test_both_terms_of_the_test_data_matter() -> None:
    for spec in SPECS:
        weight = dequantize(random_parts(spec, 48, 256, "cpu"), spec, 48, 256)
        base = dequantize(
            random_parts(spec, 48, 256, "cpu"), WeightSpec(bits=spec.bits, group_size=spec.group_size), 48, 256
        )
        if spec.rank:
            assert 0.3 < (weight - base).norm() / base.norm() < 3, spec.tag
        assert base.mean().abs() < base.std(), spec.tag


@on_devices
@in_dtypes
@pytest.mark.parametrize("spec", SPECS[2:4], ids=lambda spec: spec.tag)
def test_a_bias_is_added_once(spec: WeightSpec, dtype: torch.dtype, device: str) -> None:
    n, k = 40, 128
    x, parts = inputs(9, k, dtype=dtype, device=device), random_parts(spec, n, k, device)
    bias = 3 * inputs(n, dtype=dtype, device=device, seed=2)
    with_bias = check(x, parts, spec, n, k, bias)
    assert (with_bias - check(x, parts, spec, n, k)).abs().max() > 1


@on_devices
@pytest.mark.parametrize("spec", SPECS[2:4], ids=lambda spec: spec.tag)
@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (1, 2, 2)])
def test_any_leading_dimensions(spec: WeightSpec, lead: tuple[int, ...], device: str) -> None:
    n, k = 24, 128
    parts, x = random_parts(spec, n, k, device), inputs(*lead, k, dtype=torch.float32, device=device)
    y = compressed_linear(x, parts, spec, n, k)
    assert y.shape == (*lead, n)
    flat = compressed_linear(x.reshape(-1, k), parts, spec, n, k)
    torch.testing.assert_close(y.reshape(-1, n), flat, atol=1e-6, rtol=1e-5)


@on_devices
@pytest.mark.parametrize("spec", SPECS[2:4], ids=lambda spec: spec.tag)
def test_input_that_is_not_contiguous(spec: WeightSpec, device: str) -> None:
    n, k = 24, 128
    x = inputs(k, 10, dtype=torch.float32, device=device).T[::2]
    check(x, random_parts(spec, n, k, device), spec, n, k)


@pytest.mark.parametrize("spec", SPECS[2:4], ids=lambda spec: spec.tag)
def test_parts_and_input_are_left_alone(spec: WeightSpec) -> None:
    n, k = 24, 128
    x, parts = inputs(4, k, dtype=torch.float32, device="cpu"), random_parts(spec, n, k, "cpu")
    before = {name: tensor.clone() for name, tensor in parts.items()} | {"x": x.clone()}
    compressed_linear(x, parts, spec, n, k)
    assert all(torch.equal(before[name], tensor) for name, tensor in [*parts.items(), ("x", x)])
