# SPDX-License-Identifier: Apache-2.0
"""Excess kurtosis: MiLo's formula in float64, on distributions whose value is known, leaving the weight alone."""

from __future__ import annotations

import pytest
import torch

import moepress.measure.weights as weights_module
from moepress.measure.weights import excess_kurtosis


def by_the_book(weight: torch.Tensor) -> float:
    """mean((w - mean)^4) / std^4 - 3 with the unbiased std, at once and in float64."""
    exact = weight.double().flatten()
    return ((exact - exact.mean()).pow(4).mean() / exact.std(unbiased=True) ** 4 - 3).item()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.02, 0.0), (0.02, 0.5), (3.0, -7.0)])
def test_the_formula(dtype: torch.dtype, scale: float, shift: float) -> None:
    weight = (scale * normal(40, 50).pow(3) + shift).to(dtype)
    assert excess_kurtosis(weight) == pytest.approx(by_the_book(weight), rel=1e-4, abs=1e-4)


def test_known_distributions() -> None:
    uniform = torch.rand(300, 1000, generator=torch.Generator().manual_seed(1))
    assert excess_kurtosis(normal(300, 1000)) == pytest.approx(0, abs=0.05)
    assert excess_kurtosis(uniform) == pytest.approx(-1.2, abs=0.01)
    assert excess_kurtosis(uniform.log()) == pytest.approx(6, abs=0.5)  # exponential
    assert excess_kurtosis(torch.tensor([[-1.0, 1.0] * 5000])) == pytest.approx(-2, abs=1e-3)


def test_the_std_is_the_unbiased_one() -> None:
    # 4 values: the biased std would give -2
    assert excess_kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0]])) == pytest.approx((3 / 4) ** 2 - 3)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e5])
def test_a_constant_weight_has_none(value: float) -> None:
    assert excess_kurtosis(torch.full((7, 9), value)) == 0.0
    assert excess_kurtosis(torch.full((1, 1), value).bfloat16()) == 0.0


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1e12, 1e15])
def test_neither_tiny_nor_huge_weights_leave_the_range(scale: float) -> None:
    weight = normal(64, 64).pow(3)
    assert excess_kurtosis(weight * scale) == pytest.approx(by_the_book(weight), rel=1e-3)


def test_what_float32_cannot_square_has_none() -> None:
    assert excess_kurtosis(normal(8, 8) * 1e30) == 0.0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(37, 53) + torch.linspace(0, 3, 37).unsqueeze(1)  # chunks differ in mean
    at_once = excess_kurtosis(weight)
    monkeypatch.setattr(weights_module, "_CHUNK", 100)
    assert excess_kurtosis(weight) == pytest.approx(at_once, rel=1e-9)
    assert at_once == pytest.approx(by_the_book(weight), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_left_alone(dtype: torch.dtype) -> None:
    weight = (normal(20, 30) + 1).to(dtype)
    before = weight.clone()
    excess_kurtosis(weight)
    assert torch.equal(weight, before)


def test_views_count_their_own_values() -> None:
    weight = normal(40, 60)
    view = weight[::2, 10:30].T
    assert excess_kurtosis(view) == pytest.approx(by_the_book(view), rel=1e-4)
