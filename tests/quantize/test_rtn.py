# SPDX-License-Identifier: Apache-2.0
"""RTN on the min/max grid: against a scalar implementation, and where groups are awkward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import moepress.quantize.rtn as rtn_module
from moepress.errors import CheckpointError
from moepress.format.weight import affine
from moepress.quantize.affine import AffineWeight
from moepress.quantize.rtn import rtn

Gaussian = Callable[..., torch.Tensor]
WIDTHS = (1, 2, 3, 4, 5, 6, 8)


def dequantized(found: AffineWeight, group_size: int = 64) -> torch.Tensor:
    return affine(found.codes, found.scale, found.zero, group_size)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 128])
def test_codes_are_the_nearest_of_the_min_max_grid(bits: int, group_size: int, gaussian: Gaussian) -> None:
    weight = gaussian(6, 2 * group_size)
    found = rtn("w", weight, bits, group_size)
    levels = 2**bits - 1
    for row in range(6):
        for g in range(2):
            group = weight[row, g * group_size : (g + 1) * group_size].double()
            low, high = group.min(), group.max()
            step = (high - low) / levels
            assert found.scale[row, g].item() == pytest.approx(step.item(), rel=1e-3)
            assert found.zero[row, g].item() == pytest.approx((-low / step).item(), rel=1e-3)
            exact = (group - low) / step
            codes = found.codes[row, g * group_size : (g + 1) * group_size]
            # exact halves apart, which float32 may round either way
            assert ((codes - exact).abs() <= 0.5 + 1e-4).all()
            assert codes.min() == 0 and codes.max() == levels


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_weight_moves_by_more_than_half_a_step(bits: int, gaussian: Gaussian) -> None:
    weight = gaussian(8, 256)
    found = rtn("w", weight, bits, 64)
    step = found.scale.float().repeat_interleave(64, 1)
    # the fp16 scale and zero add up to 2^-11 of |w| and of the zero each
    slack = weight.abs() * 2**-11 + (2**bits) * step * 2**-10
    assert ((dequantized(found) - weight).abs() <= step / 2 + slack).all()


def test_more_bits_lose_less(gaussian: Gaussian) -> None:
    weight = gaussian(16, 256)
    errors = [relative(dequantized(rtn("w", weight, bits, 64)), weight) for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True)
    # 3 bits on Gaussian groups of 64 lose about 19 %
    assert 0.17 < errors[2] < 0.21


def test_groups_run_along_the_input_dimension() -> None:
    # each group has its own offset: a group that mixed columns or rows would lose it
    offsets = torch.arange(12.0).view(3, 4).mul(10).repeat_interleave(32, 1)
    weight = offsets + torch.linspace(0, 1, 32).repeat(3, 4)
    found = dequantized(rtn("w", weight, 8, 32), 32)
    assert (found - weight).abs().max() < 0.1


def test_constant_and_zero_groups_are_exact() -> None:
    weight = torch.tensor([0.0, 0.5, -2.0, 100.0]).repeat_interleave(64).view(2, 128)
    found = rtn("w", weight, 3, 64)
    assert torch.equal(dequantized(found), weight)
    assert torch.equal(found.scale, torch.ones(2, 2).half())


def test_a_group_too_narrow_to_scale_becomes_its_minimum() -> None:
    weight = torch.linspace(0.25, 0.25 + 5e-5, 64).view(1, 64)
    assert torch.equal(dequantized(rtn("w", weight, 3, 64)), torch.full((1, 64), 0.25))


def test_a_group_just_wide_enough_keeps_a_normal_scale() -> None:
    weight = torch.linspace(0, 1.1e-4, 64).view(1, 64)
    found = rtn("w", weight, 3, 64)
    assert found.scale.item() == pytest.approx(1 / 2e4, rel=1e-3)
    assert relative(dequantized(found), weight) < 0.3


def test_a_group_far_from_zero_stays_where_it_is(gaussian: Gaussian) -> None:
    weight = 100 + gaussian(4, 128, size=0.001)
    found = rtn("w", weight, 3, 64)
    assert torch.isfinite(found.zero).all()
    assert relative(dequantized(found), weight) < 5e-4


@pytest.mark.parametrize("tail", [1, 17, 36])
def test_a_ragged_last_group_is_quantised_like_a_weight_of_its_own(tail: int, gaussian: Gaussian) -> None:
    weight = gaussian(5, 128 + tail)
    whole, first, last = (rtn("w", w, 3, 64) for w in (weight, weight[:, :128], weight[:, 128:]))
    assert torch.equal(whole.codes, torch.cat([first.codes, last.codes], 1))
    assert torch.equal(whole.scale, torch.cat([first.scale, last.scale], 1))
    assert torch.equal(whole.zero, torch.cat([first.zero, last.zero], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_taken_at_its_value(dtype: torch.dtype, gaussian: Gaussian) -> None:
    weight = gaussian(5, 100).to(dtype)
    same(rtn("w", weight, 3, 64), rtn("w", weight.float(), 3, 64))


def test_the_input_is_left_alone(gaussian: Gaussian) -> None:
    weight = gaussian(5, 100)
    before = weight.clone()
    rtn("w", weight, 3, 64)
    assert torch.equal(weight, before)


def test_chunks_of_rows_change_nothing(gaussian: Gaussian, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(11, 100)
    at_once = rtn("w", weight, 3, 64)
    monkeypatch.setattr(rtn_module, "row_chunks", lambda w: (slice(i, i + 2) for i in range(0, len(w), 2)))
    same(rtn("w", weight, 3, 64), at_once)


def test_weights_too_large_for_fp16_scales_are_told() -> None:
    weight = torch.full((1, 64), 1e30)
    weight[0, 0] = -1e30
    with pytest.raises(CheckpointError, match=r"blk\.w: a scale of .* does not fit fp16 .* --keep 'blk\.w'"):
        rtn("blk.w", weight, 3, 64)


def same(one: AffineWeight, other: AffineWeight) -> None:
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
