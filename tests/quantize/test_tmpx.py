# SPDX-License-Identifier: Apache-2.0
"""Scales and zeros: never worse than min/max, near the best there is, and as fp16 stores them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moepress.quantize.grid as module
from moepress.quantize.affine import MAX_INVERSE_SCALE, MAX_ZERO
from moepress.quantize.grid import codes_of, fit_groups
from moepress.quantize.rtn import rtn

WIDTHS = [1, 2, 3, 4, 8]


def draw(rows: int, k: int, seed: int, tailed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the importance of its columns, which spans five orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, k, generator=generator)
    weight = 0.02 * (weight**3 if tailed else weight)
    return weight, torch.exp(3 * torch.randn(k, generator=generator))


def fit(weight: torch.Tensor, importance: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale, zero = fit_groups(["w"], weight[None], importance[None], torch.tensor([2.0**bits - 1]), group)
    return scale[0], zero[0]


def errors(
    weight: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """Each group's weighted squared error [N, G] of rounding to nearest, in float64."""
    k = weight.shape[1]
    w, d = weight.double(), importance.double()
    s, z = (each.double().repeat_interleave(group, 1)[:, :k] for each in (scale, zero))
    codes = (w / s + z).round().clamp(0, 2**bits - 1)
    lost = (w - (codes - z) * s).square() * d
    return torch.stack([part.sum(1) for part in lost.split(group, 1)], 1)


@settings(max_examples=3000)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    shape=st.sampled_from([(32, 70), (64, 64), (64, 160), (128, 100), (128, 200)]),
    seed=st.integers(0, 10**6),
    tailed=st.booleans(),
)
def test_no_group_is_worse_than_by_min_and_max(bits: int, shape: tuple[int, int], seed: int, tailed: bool) -> None:
    group, k = shape
    weight, importance = draw(5, k, seed, tailed)
    found = errors(weight, importance, *fit(weight, importance, bits, group), bits, group)
    whole, zero = (
        torch.cat(each, 1) for each in zip(*map(partial(full_range, bits), weight.split(group, 1)), strict=True)
    )
    assert (found <= 1.001 * errors(weight, importance, whole, zero, bits, group) + 1e-12).all()


def full_range(bits: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of min/max [N, 1] in fp16, within the bounds of the format."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    top, reach = 2**bits - 1, rows.abs().amax(1, keepdim=True)
    scale = ((high - low) / top).clamp(min=1 / MAX_INVERSE_SCALE).maximum(reach / MAX_ZERO)
    return scale.half(), (top / 2 - (high + low) / 2 / scale).half()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nearly_as_good_as_a_search_of_all_scales_and_zeros(bits: int) -> None:
    weight, importance = draw(24, 32, 3)
    importance = importance**0.2
    found = errors(weight, importance, *fit(weight, importance, bits, 32), bits, 32)
    top = 2**bits - 1
    whole, middle = (weight.amax(1) - weight.amin(1)) / top, (weight.amax(1) + weight.amin(1)) / 2
    best = torch.full_like(found, torch.inf)
    for share in torch.linspace(0.3, 1.1, 60):
        scale = (share * whole)[:, None]
        for shift in torch.linspace(-top / 2, top / 2, 60):
            zero = top / 2 + shift - middle[:, None] / scale
            best = best.minimum(errors(weight, importance, scale, zero, bits, 32))
    assert (found / best).log().mean() < 0.2
    plain = rtn("w", weight, bits, 32)
    assert found.sum() < 0.9 * errors(weight, importance, plain.scale, plain.zero, bits, 32).sum()


def test_columns_that_matter_are_kept() -> None:
    weight, _ = draw(8, 64, 5)
    importance = torch.ones(64)
    importance[:4] = 1e6
    scale, zero = fit(weight, importance, 2, 64)
    own = errors(weight[:, :4], importance[:4], scale, zero, 2, 64).mean()
    plain = rtn("w", weight, 2, 64)
    assert own < 0.2 * errors(weight[:, :4], importance[:4], plain.scale, plain.zero, 2, 64).mean()


@pytest.mark.parametrize(("step", "most"), [("CLIP_POINTS", 1), ("REFITS", 0)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_both_clipping_and_regression_help(step: str, most: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = draw(32, 256, 7, tailed=True)
    with_both = errors(weight, importance, *fit(weight, importance, bits, 64), bits, 64)
    assert (module.CLIP_POINTS, module.REFITS) == (24, 3)
    monkeypatch.setattr(module, step, most)
    without = errors(weight, importance, *fit(weight, importance, bits, 64), bits, 64)
    assert with_both.sum() < 0.97 * without.sum()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_more_refits_never_lose(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = draw(16, 160, 8)
    before = None
    for refits in range(5):
        monkeypatch.setattr(module, "REFITS", refits)
        found = errors(weight, importance, *fit(weight, importance, bits, 64), bits, 64)
        assert before is None or (found <= before * (1 + 1e-5)).all()
        before = found


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_are_those_of_fp16_and_widths_do_not_mix(bits: int) -> None:
    weight, importance = draw(6, 100, 9)
    scale, zero = fit(weight, importance, bits, 64)
    assert torch.equal(scale, scale.half().float()) and torch.equal(zero, zero.half().float())
    assert scale.shape == zero.shape == (6, 2)
    other, own = draw(6, 100, 10)
    tops = torch.tensor([3.0, 2.0**bits - 1, 255])
    both = fit_groups(list("abc"), torch.stack([other, weight, other]), torch.stack([own, importance, own]), tops, 64)
    assert torch.equal(both[0][1], scale) and torch.equal(both[1][1], zero)


def test_one_bit_is_the_mean_whatever_matters() -> None:
    weight, importance = draw(6, 100, 11)
    scale, zero = fit(weight, importance, 1, 64)
    means = torch.stack([part.abs().mean(1) for part in weight.split(64, 1)], 1)
    assert torch.equal(scale, (2 * means).half().float()) and torch.equal(zero, torch.full((6, 2), 0.5))


@settings(max_examples=3000)
@given(st.integers(0, 10**6), st.sampled_from(WIDTHS))
def test_codes_are_the_nearest_values(seed: int, bits: int) -> None:
    weight, _ = draw(3, 20, seed)
    scale, zero = torch.tensor(0.01), torch.tensor(2**bits / 2 - 0.3)
    codes = codes_of(weight, scale, zero, torch.tensor(2.0**bits - 1))
    every = (torch.arange(2**bits) - zero) * scale
    nearest = (weight[..., None] - every).abs().amin(-1)
    torch.testing.assert_close((weight - (codes - zero) * scale).abs(), nearest, rtol=1e-4, atol=1e-8)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
