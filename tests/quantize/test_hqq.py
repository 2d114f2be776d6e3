# SPDX-License-Identifier: Apache-2.0
"""HQQ against the package `hqq` itself, on real weights and on ones that make each part of the solver matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import moepress.quantize.hqq as hqq_module
from moepress.format.weight import affine
from moepress.quantize.affine import AffineWeight
from moepress.quantize.hqq import BETA, ITERATIONS, NORM, SHRINK_FROM, hqq, shrink
from moepress.quantize.rtn import rtn

Quantizer = pytest.importorskip("hqq.core.quantize", reason="the peer package hqq is not installed").Quantizer

Gaussian = Callable[..., torch.Tensor]
DemoWeight = Callable[[str], torch.Tensor]
CLOSE = 1e-3
PEER_WIDTHS = (1, 2, 3, 4, 8)
REAL = (
    "0.self_attn.q_proj",
    "3.self_attn.o_proj",
    "1.mlp.experts.5.gate_proj",
    "3.mlp.experts.0.down_proj",
    "2.mlp.shared_expert.up_proj",
)


def peer(weight: torch.Tensor, bits: int, group_size: int = 64) -> torch.Tensor:
    """What the package makes of a weight whose rows are whole groups, with the fp16 parameters that we store."""
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group_size, axis=1, device="cpu", compute_dtype=torch.float32,
        round_zero=False, bitpack=False,
    )  # fmt: skip
    scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
    return ((codes.float() - zero) * scale).view(weight.shape)


def dequantized(found: AffineWeight, group_size: int = 64) -> torch.Tensor:
    return affine(found.codes, found.scale, found.zero, group_size)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


def heavy_tailed(size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal, chi = torch.randn(48, 256, generator=generator), torch.randn(48, 256, 3, generator=generator)
    return size * normal / chi.square().mean(-1).sqrt()  # Student's t with 3 degrees of freedom


def with_outliers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weight = 0.02 * torch.randn(48, 256, generator=generator)
    weight[torch.rand(48, 256, generator=generator) < 0.02] *= 100
    return weight


HARD = {
    "heavy tails of a usual size": lambda: heavy_tailed(0.02),
    "heavy tails of size 1": lambda: heavy_tailed(1.0),
    "heavy tails of size 10": lambda: heavy_tailed(10.0),
    "outliers 100 times larger": with_outliers,
    "one loud row": lambda: torch.cat([with_outliers(), 30 * heavy_tailed(1.0)[:1]]),
    "all positive": lambda: heavy_tailed(1.0).abs(),
}


@pytest.mark.parametrize("bits", PEER_WIDTHS)
@pytest.mark.parametrize("name", REAL)
def test_real_weights_come_out_as_from_the_package(name: str, bits: int, demo_weight: DemoWeight) -> None:
    weight = demo_weight(name)
    assert relative(dequantized(hqq("w", weight, bits, 64)), peer(weight, bits)) < CLOSE


@pytest.mark.parametrize("bits", PEER_WIDTHS)
@pytest.mark.parametrize("kind", HARD)
def test_hard_weights_come_out_as_from_the_package(kind: str, bits: int) -> None:
    weight = HARD[kind]()
    assert relative(dequantized(hqq("w", weight, bits, 64)), peer(weight, bits)) < CLOSE


@pytest.mark.parametrize("group_size", [32, 128])
def test_other_group_sizes_come_out_as_from_the_package(group_size: int) -> None:
    weight = heavy_tailed(1.0)
    found = dequantized(hqq("w", weight, 3, group_size), group_size)
    assert relative(found, peer(weight, 3, group_size)) < CLOSE


def test_the_hard_weights_do_exercise_the_shrinkage() -> None:
    # else the comparison above would pass without it
    weight = heavy_tailed(1.0)
    residual = weight - dequantized(hqq("w", weight, 2, 64))
    assert (residual.abs() > SHRINK_FROM).float().mean() > 0.05


@pytest.mark.parametrize("kind", ["heavy tails of size 1", "outliers 100 times larger", "one loud row"])
def test_the_shrinkage_matters_where_it_is_active(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = HARD[kind]()
    with_it = dequantized(hqq("w", weight, 2, 64))
    monkeypatch.setattr(hqq_module, "shrink", torch.zeros_like)
    assert relative(dequantized(hqq("w", weight, 2, 64)), with_it) > 10 * CLOSE


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hqq_loses_less_than_rounding(bits: int, demo_weight: DemoWeight) -> None:
    for name in REAL:
        weight = demo_weight(name)
        ours, plain = (relative(dequantized(solve("w", weight, bits, 64)), weight.float()) for solve in (hqq, rtn))
        assert ours < plain


def by_the_book(group: torch.Tensor, bits: int, steps: int) -> tuple[torch.Tensor, list[float]]:
    """One group's dequantised values after `steps` updates, and the error that each update saw: float64, one group."""
    low, high = group.min(), group.max()
    inverse = (2**bits - 1) / (high - low)
    zero = -low * inverse
    errors = []
    for _ in range(steps):
        codes = (group * inverse + zero).round().clamp(0, 2**bits - 1)
        residual = group - (codes - zero) / inverse
        size = residual.abs()
        extra = residual.sign() * (size - size.pow(NORM - 1) / BETA).clamp(min=0)
        zero = (codes - (group - extra) * inverse).mean()
        errors.append(residual.abs().sum().item())
    codes = (group * inverse + zero).round().clamp(0, 2**bits - 1)
    return (codes - zero) / inverse, errors


def possible_stops(groups: list[torch.Tensor], bits: int) -> set[int]:
    """After how many updates groups that form one matrix stop: with the first that does not lower their summed error.

    Two, where float32 noise decides whether an error is lower.
    """
    errors = [sum(column) for column in zip(*(by_the_book(g, bits, ITERATIONS)[1] for g in groups), strict=True)]
    return {
        next((i + 1 for i in range(1, ITERATIONS) if errors[i] >= errors[i - 1] * slack), ITERATIONS)
        for slack in (1 - 1e-6, 1 + 1e-6)
    }  # fmt: skip


def off_the_book(weight: torch.Tensor, groups: list[torch.Tensor], bits: int, stop: int) -> float:
    """Relative difference of `hqq` from a stop after `stop` updates."""
    expected = torch.cat([by_the_book(group, bits, stop)[0] for group in groups]).view(weight.shape)
    return relative(dequantized(hqq("w", weight, bits, 64)).double(), expected)


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_the_stop_is_after_the_first_update_that_does_not_help(size: float) -> None:
    early, elsewhere = 0, 0
    for seed in range(16):
        weight = size * torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
        groups = [weight[0].double()]
        stops = possible_stops(groups, 2)
        assert min(off_the_book(weight, groups, 2, stop) for stop in stops) < CLOSE, seed
        early += max(stops) < ITERATIONS
        elsewhere += off_the_book(weight, groups, 2, ITERATIONS) > CLOSE
    assert early and (elsewhere or size < 1), "these seeds tell no stop from another"


def test_the_stop_is_common_to_the_whole_matrix() -> None:
    # rows that stop at different times alone must share one stop together
    weight = heavy_tailed(0.02)[:, :64]
    together = hqq("w", weight, 2, 64)
    alone = torch.cat([hqq("w", row, 2, 64).zero for row in weight.split(1)])
    assert not torch.equal(together.zero, alone)
    assert relative(dequantized(together), peer(weight, 2)) < CLOSE


def test_no_more_than_twenty_updates() -> None:
    assert ITERATIONS == 20
    # a slope of single steps moves the zero a little in every iteration for long
    weight = torch.linspace(0, 1, 64).pow(4).view(1, 64)
    expected, errors = by_the_book(weight.double().flatten(), 3, ITERATIONS)
    assert min(errors) < errors[0]
    assert relative(dequantized(hqq("w", weight, 3, 64)).flatten(), expected) < 0.05


def test_shrink_is_the_generalised_soft_threshold() -> None:
    x = torch.tensor([-5.0, -0.5, -0.2, -0.17, -0.1, 0.0, 1e-30, 0.16, 0.18, 0.5, 5.0])
    expected = [
        (1 if v > 0 else -1) * max(abs(v) - abs(v) ** (NORM - 1) / BETA, 0) if v else 0.0 for v in x.tolist()
    ]  # fmt: skip
    torch.testing.assert_close(shrink(x), torch.tensor(expected))
    assert not shrink(torch.tensor([0.0, SHRINK_FROM * 0.999, -0.01])).any()


def test_constant_and_zero_groups_are_exact() -> None:
    weight = torch.tensor([0.0, 0.5, -2.0, 100.0]).repeat_interleave(64).view(2, 128)
    assert torch.equal(dequantized(hqq("w", weight, 3, 64)), weight)


def test_flat_groups_among_usual_ones_come_out_as_from_the_package(gaussian: Gaussian) -> None:
    weight = gaussian(6, 256)
    weight[1] = 0
    weight[2, :64] = 0.5
    weight[3, 64:128] = 1e-5 * torch.linspace(-1, 1, 64)
    weight[4, 128:192] = 0.25 + 4e-5 * torch.linspace(-1, 1, 64)
    found = dequantized(hqq("w", weight, 3, 64))
    assert relative(found, peer(weight, 3)) < CLOSE
    assert not found[1].any()


def test_a_group_too_narrow_to_scale_becomes_its_mean() -> None:
    weight = torch.linspace(0.25, 0.25 + 8e-5, 64).view(1, 64)
    assert dequantized(hqq("w", weight, 3, 64)).unique().item() == pytest.approx(0.25004, rel=5e-4)


@pytest.mark.parametrize("centre", [100.0, -100.0, 1.0, 1000.0])
def test_a_group_far_from_zero_stays_where_it_is(centre: float, gaussian: Gaussian) -> None:
    weight = centre + gaussian(4, 128, size=0.001)
    for bits in (1, 3, 8):
        found = hqq("w", weight, bits, 64)
        assert torch.isfinite(found.zero).all() and torch.isfinite(found.scale).all()
        # the zero's fp16 rounding, and losing the spread of 0.001 altogether
        assert relative(dequantized(found), weight) < 2**-11 + 0.001 / abs(centre)


@pytest.mark.parametrize("tail", [1, 17, 36])
def test_a_ragged_last_group_is_quantised_in_its_own_grid(tail: int, gaussian: Gaussian) -> None:
    weight = gaussian(24, 128 + tail)
    found = hqq("w", weight, 3, 64)
    tails = weight[:, 128:]
    assert relative(dequantized(found)[:, :128], dequantized(hqq("w", weight[:, :128], 3, 64))) < 0.02
    inverse = 7 / (tails.amax(1) - tails.amin(1)) if tail > 1 else torch.ones(24)
    torch.testing.assert_close(found.scale[:, 2], inverse.reciprocal().half())
    if tail == 1:  # a group of one is constant
        torch.testing.assert_close(dequantized(found)[:, 128:], tails, rtol=1e-3, atol=1e-6)


def test_a_short_row_is_all_tail(gaussian: Gaussian) -> None:
    weight = gaussian(24, 40)
    padded = torch.cat([weight, weight[:, :24]], 1)  # the same set of values has the same grid
    short, full = hqq("w", weight, 3, 64), hqq("w", padded, 3, 64)
    assert torch.equal(short.scale, full.scale)
    assert relative(dequantized(short), weight) < relative(dequantized(rtn("w", weight, 3, 64)), weight)


def test_a_ragged_weight_stops_as_one_matrix(gaussian: Gaussian) -> None:
    weight = gaussian(4, 96)
    groups = [group.double() for row in weight for group in (row[:64], row[64:])]
    together = possible_stops(groups, 2)
    assert {stop for group in groups for stop in possible_stops([group], 2)} - together
    assert min(off_the_book(weight, groups, 2, stop) for stop in together) < CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_taken_at_its_value(dtype: torch.dtype, gaussian: Gaussian) -> None:
    weight = gaussian(5, 100).to(dtype)
    same(hqq("w", weight, 3, 64), hqq("w", weight.float(), 3, 64))


def test_the_input_is_left_alone() -> None:
    for weight in (heavy_tailed(0.02), heavy_tailed(1.0), heavy_tailed(0.02)[:, :100]):
        before = weight.clone()
        hqq("w", weight, 3, 64)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("columns", [256, 100])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_chunks_of_rows_change_nothing(size: float, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(size)[:, :columns]
    at_once = hqq("w", weight, 2, 64)
    for rows in (1, 7, 24):
        monkeypatch.setattr(
            hqq_module, "row_chunks", lambda w, n=rows: (slice(i, i + n) for i in range(0, len(w), n))
        )  # fmt: skip
        same(hqq("w", weight, 2, 64), at_once)


def test_chunks_that_would_stop_apart_stop_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # each chunk runs all iterations; codes and zeros must both be those of the common stop, not of the last iteration
    monkeypatch.setattr(hqq_module, "row_chunks", lambda w: (slice(i, i + 1) for i in range(len(w))))
    elsewhere = 0
    for seed in range(12):
        weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
        groups = [row.double() for row in weight]
        stops = possible_stops(groups, 2)
        assert min(off_the_book(weight, groups, 2, stop) for stop in stops) < CLOSE, seed
        at_stop, at_end = (torch.cat([by_the_book(g, 2, n)[0] for g in groups]) for n in (max(stops), ITERATIONS))
        elsewhere += (at_stop - at_end).abs().max().item() > 0.5
    assert elsewhere > 2, "these seeds tell no stop from the end"


def same(one: AffineWeight, other: AffineWeight) -> None:
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
