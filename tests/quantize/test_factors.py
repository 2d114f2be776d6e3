# SPDX-License-Identifier: Apache-2.0
"""Factors are stored by the documented rules, reproduced here one value at a time; refitting them only helps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moepress.errors import CheckpointError
from moepress.format.packing import unpack_codes
from moepress.format.weight import dequantize_factor
from moepress.quantize.factors import quantize_factor, quantize_factors

Gaussian = Callable[..., torch.Tensor]


def stored(factor: torch.Tensor, bits: int) -> tuple[list[int], list[float], torch.Tensor]:
    """Codes, scales and dequantised values of a factor."""
    parts = quantize_factor("w", "u", factor, bits)
    codes = unpack_codes(parts["u_packed"], bits, factor.numel())
    shape = (factor.shape[0], factor.shape[1])
    return (
        codes.tolist(),
        parts["u_scale"].tolist(),
        dequantize_factor(parts["u_packed"], parts["u_scale"], bits, shape),
    )


def nearest(x: float) -> int:
    """Half to even, as torch rounds."""
    return round(x)


def milo_int3(values: list[float]) -> tuple[float, list[int]]:
    """MiLo's released rule for one group: c the signed maximum, code = clamp(round(7 x / (2 c)) + 4, 0, 7)."""
    c = max(values)
    return 2 * c / 7, [min(max(nearest(7 * x / (2 * c)) + 4, 0), 7) for x in values]


def lowest_code(values: list[float], bits: int) -> tuple[float, list[int]]:
    """The value of largest size lands on the lowest code."""
    half = 2 ** (bits - 1)
    extreme = max(values, key=abs)
    scale = -extreme / half
    return scale, [min(max(nearest(x / scale) + half, 0), 2 * half - 1) for x in values]


def exact_in_fp16(bits: int, seed: int, sign: float | None = None) -> torch.Tensor:
    """A factor [8, 20] whose groups have scales that fp16 holds exactly, so that only the rule decides the codes."""
    factor = torch.randn(160, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
    if sign is not None:
        factor = factor.abs().clamp(min=0.01) * sign
    unit = 3.5 if bits == 3 and sign is None else 2.0 ** (bits - 1)
    for first in range(0, 160, 64):  # the last group holds 32 values
        scale = 2.0 ** -(first // 64) * 1.25
        factor[first : first + 64] *= scale
        factor[first + 5] = scale * unit * (sign or 1.0)
        if sign is None and bits == 3:
            factor[first + 6] = -scale * unit * 1.5  # beyond the lowest code: the signed maximum decides all the same
    return factor.view(8, 20)


@pytest.mark.parametrize("seed", range(5))
def test_int3_follows_the_released_rule(seed: int) -> None:
    factor = exact_in_fp16(3, seed)
    codes, scales, values = stored(factor, 3)
    flat = factor.flatten().tolist()
    for g in range(3):
        group = slice(g * 64, (g + 1) * 64)
        scale, expected = milo_int3(flat[group])
        assert scales[g] == scale
        assert codes[group] == expected
        assert values.flatten()[group].tolist() == [(code - 4) * scale for code in expected]
    assert {0, 7} <= set(codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int4_and_int8_put_the_largest_value_on_the_lowest_code(bits: int, sign: float) -> None:
    factor = exact_in_fp16(bits, 1, sign)
    factor[factor.abs() < 0.5] *= -1  # both signs occur
    codes, scales, _ = stored(factor, bits)
    flat = factor.flatten().tolist()
    for g in range(3):
        group = slice(g * 64, (g + 1) * 64)
        scale, expected = lowest_code(flat[group], bits)
        assert scales[g] == scale and (scale < 0) == (sign > 0)
        assert codes[group] == expected
        assert codes[g * 64 + 5] == 0


def test_int3_takes_the_lowest_code_where_no_value_is_positive() -> None:
    factor = exact_in_fp16(3, 2, sign=-1.0)
    codes, scales, values = stored(factor, 3)
    for g in range(3):
        group = slice(g * 64, (g + 1) * 64)
        assert (scales[g], codes[group]) == lowest_code(factor.flatten()[group].tolist(), 3)
    assert relative(values, factor) < 0.25


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_an_all_negative_group_of_any_values_survives(bits: int, gaussian: Gaussian) -> None:
    factor = -gaussian(16, 16, size=1.0).abs() - 0.01
    assert relative(stored(factor, bits)[2], factor) < 0.25


def test_a_group_with_one_tiny_value_of_the_other_sign_survives(gaussian: Gaussian) -> None:
    factor = -gaussian(16, 16, size=1.0).abs() - 0.01
    factor[::4, 0] = 1e-3  # one in each group of 64: MiLo's own rule would scale the whole group by it
    assert relative(stored(factor, 3)[2], factor) < 0.25


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_groups_stay_zero_beside_others(bits: int, gaussian: Gaussian) -> None:
    factor = gaussian(4, 64)
    factor[1] = 0
    factor[3] = 0
    values = stored(factor, bits)[2]
    assert not values[1].any() and not values[3].any()
    assert relative(values[::2], factor[::2]) < 0.3


@pytest.mark.parametrize(("bits", "low", "high"), [(3, 0.19, 0.22), (4, 0.08, 0.11), (8, 0.004, 0.007)])
def test_what_the_widths_lose_on_gaussian_factors(bits: int, low: float, high: float, gaussian: Gaussian) -> None:
    factor = gaussian(512, 32)
    assert low < relative(stored(factor, bits)[2], factor) < high


def test_codes_are_chosen_against_the_scale_that_is_stored(gaussian: Gaussian) -> None:
    factor = gaussian(64, 64)
    codes, scales, _ = stored(factor, 8)
    for g in range(64):
        expected = [min(max(round(x / scales[g]) + 128, 0), 255) for x in factor[g].tolist()]
        away = [abs((x / scales[g]) % 1 - 0.5) > 1e-3 for x in factor[g].tolist()]
        found = codes[g * 64 : (g + 1) * 64]
        assert all(a == b for a, b, clear in zip(found, expected, away, strict=True) if clear)


def test_sixteen_bits_are_the_values_in_fp16(gaussian: Gaussian) -> None:
    factor = gaussian(8, 20)
    parts = quantize_factor("w", "v", factor, 16)
    assert parts.keys() == {"v"} and torch.equal(parts["v"], factor.half())


def test_factors_too_large_for_fp16_are_told() -> None:
    for bits in (3, 16):
        with pytest.raises(CheckpointError, match=r"blk\.w: a factor .* does not fit fp16"):
            quantize_factor("blk.w", "u", torch.full((4, 64), 1e9), bits)


def residual_and_factors(n: int, k: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a quantiser leaves: noise with some structure, and its best factors."""
    generator = torch.Generator().manual_seed(seed)
    columns = 1 + 4 * torch.rand(k, generator=generator).square()
    residual = 0.004 * torch.randn(n, k, generator=generator) * columns
    left, sizes, right = torch.linalg.svd(residual, full_matrices=False)
    root = sizes[:rank].sqrt()
    return residual, left[:, :rank] * root, root.unsqueeze(1) * right[:rank]


def left_over(residual: torch.Tensor, u: torch.Tensor, v: torch.Tensor, bits: int, refit: bool) -> float:
    parts = quantize_factors("w", residual, u, v, bits, refit)
    if bits == 16:
        product = parts["u"].float() @ parts["v"].float()
    else:
        product = dequantize_factor(parts["u_packed"], parts["u_scale"], bits, (u.shape[0], u.shape[1])) @ (
            dequantize_factor(parts["v_packed"], parts["v_scale"], bits, (v.shape[0], v.shape[1]))
        )
    return torch.linalg.matrix_norm(residual - product).item()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "k", "rank"), [(96, 128, 8), (128, 64, 16), (64, 192, 1)])
def test_refitting_never_loses(bits: int, n: int, k: int, rank: int) -> None:
    for seed in range(6):
        residual, u, v = residual_and_factors(n, k, rank, seed)
        refitted, plain = (left_over(residual, u, v, bits, refit) for refit in (True, False))
        assert refitted <= plain * (1 + 1e-3), seed


def test_refitting_wins_back_a_good_part_of_what_int3_loses() -> None:
    residual, u, v = residual_and_factors(128, 192, 16, 0)
    exact = left_over(residual, u, v, 16, refit=False)
    plain, refitted = (left_over(residual, u, v, 3, refit) for refit in (False, True))
    assert exact < refitted < plain
    assert (plain - refitted) > 0.1 * (plain - exact)


def test_without_refitting_factors_are_quantised_independently() -> None:
    residual, u, v = residual_and_factors(32, 64, 4, 0)
    parts = quantize_factors("w", residual, u, v, 3, refit=False)
    for label, factor in (("u", u), ("v", v)):
        alone = quantize_factor("w", label, factor, 3)
        assert all(torch.equal(parts[name], alone[name]) for name in alone)


def test_a_zero_residual_has_zero_factors() -> None:
    zeros = torch.zeros(32, 64), torch.zeros(32, 4), torch.zeros(4, 64)
    for bits in (3, 16):
        assert left_over(*zeros, bits, refit=True) == 0


def test_the_input_is_left_alone() -> None:
    given = residual_and_factors(32, 64, 4, 0)
    before = [tensor.clone() for tensor in given]
    quantize_factors("w", *given, 3, refit=True)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected)).item()
