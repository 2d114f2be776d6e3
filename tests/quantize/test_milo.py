# SPDX-License-Identifier: Apache-2.0
"""The alternation of MiLo: what its rounds are, that they help, and when they end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import moepress.quantize.milo as milo_module
from moepress.format.weight import affine
from moepress.quantize.affine import AffineWeight
from moepress.quantize.hqq import hqq
from moepress.quantize.milo import TOLERANCE, WINDOW, MiloResult, milo

Gaussian = Callable[..., torch.Tensor]
DemoWeight = Callable[[str], torch.Tensor]


def dequantized(found: AffineWeight) -> torch.Tensor:
    return affine(found.codes, found.scale, found.zero, 64)


def norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.double()).item()


def error(weight: torch.Tensor, found: MiloResult) -> float:
    return norm(weight - dequantized(found.base) - found.u @ found.v) / norm(weight)


@pytest.fixture
def weight(demo_weight: DemoWeight) -> torch.Tensor:
    return demo_weight("1.mlp.experts.2.down_proj").float()


def test_no_alternation_is_hqq_and_one_svd(weight: torch.Tensor) -> None:
    found = milo("w", weight, 3, 64, 8, iterations=0)
    base = hqq("w", weight, 3, 64)
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found.base, field), getattr(base, field)), field
    residual = weight - dequantized(base)
    assert torch.equal(found.residual, residual)
    best = torch.linalg.svdvals(residual.double())[8:].square().sum().sqrt().item()
    assert best * 0.9999 <= norm(residual - found.u @ found.v) <= best * 1.05
    assert len(found.residual_norms) == 1


def test_one_alternation_quantises_what_the_compensator_leaves(weight: torch.Tensor) -> None:
    start, found = (milo("w", weight, 3, 64, 8, iterations) for iterations in (0, 1))
    again = hqq("w", weight - start.u @ start.v, 3, 64)
    torch.testing.assert_close(dequantized(found.base), dequantized(again), atol=1e-3, rtol=0)
    # the residual is that of the weight itself, not of the last target
    assert torch.equal(found.residual, weight - dequantized(found.base))


@pytest.mark.parametrize("iterations", [0, 3])
def test_the_norms_are_those_of_what_is_left(weight: torch.Tensor, iterations: int) -> None:
    found = milo("w", weight, 3, 64, 8, iterations)
    assert found.residual_norms[-1] == pytest.approx(
        norm(weight - dequantized(found.base) - found.u @ found.v), rel=1e-4
    )


@pytest.mark.parametrize("name", ["0.self_attn.q_proj", "1.mlp.experts.2.down_proj", "3.mlp.shared_expert.gate_proj"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_alternating_leaves_less_and_less(name: str, bits: int, demo_weight: DemoWeight) -> None:
    norms = milo("w", demo_weight(name).float(), bits, 64, 8, iterations=10).residual_norms
    # each HQQ pass minimises another norm than the SVD, so only the first steps are certain
    assert norms[0] > norms[1] > norms[2] > norms[3]
    assert min(norms) < 0.97 * norms[0] and norms[-1] < norms[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_compensator_beats_plain_hqq_and_more_rank_less(bits: int, weight: torch.Tensor) -> None:
    plain = norm(weight - dequantized(hqq("w", weight, bits, 64))) / norm(weight)
    errors = [error(weight, milo("w", weight, bits, 64, rank, 5)) for rank in (1, 8, 32)]
    assert plain > errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("shape", [(64, 32), (8, 64), (40, 100)])
def test_the_largest_rank_leaves_nothing(shape: tuple[int, int], gaussian: Gaussian) -> None:
    weight = gaussian(*shape)
    found = milo("w", weight, 3, 32, min(shape), iterations=2)
    base = affine(found.base.codes, found.base.scale, found.base.zero, 32)
    assert norm(weight - base - found.u @ found.v) < 1e-5 * norm(weight)


def test_at_most_the_iterations_asked_for(weight: torch.Tensor) -> None:
    for iterations in (0, 1, 4):
        assert len(milo("w", weight, 2, 64, 4, iterations).residual_norms) == iterations + 1


def fake_hqq(monkeypatch: pytest.MonkeyPatch, levels: list[float]) -> None:
    """A quantiser whose residuals of a zero weight have these sizes, one after another, whatever it is given.

    All singular values of the residual are equal, so that every projection leaves the same share of it.
    """
    sizes = iter(levels)
    flat = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0))).Q.T

    def solve(name: str, weight: torch.Tensor, bits: int, group_size: int) -> AffineWeight:
        return AffineWeight(torch.zeros(weight.shape, dtype=torch.uint8), torch.tensor(next(sizes)), torch.zeros(1))

    monkeypatch.setattr(milo_module, "hqq", solve)
    monkeypatch.setattr(milo_module, "affine", lambda codes, scale, zero, group_size: -flat * scale)


@pytest.mark.parametrize(
    ("levels", "stop"),
    [
        ([1.0] * 20, 4),  # flat from the start: two full windows, one apart
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 8),  # falls to the end
        ([1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 5),  # the window still holds the 1.0 at four
        ([1.0, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8], 6),
        ([1.0, 0.9, 0.8, 1.0, 0.7, 0.6, 0.5, 0.4], 4),  # the mean of the window did not fall
        ([0.0] * 20, 4),  # nothing left at all
    ],
)
def test_the_loop_ends_when_the_mean_of_the_window_settles(
    levels: list[float], stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hqq(monkeypatch, levels)
    found = milo("w", torch.zeros(16, 64), 3, 64, 4, iterations=len(levels) - 1)
    assert len(found.residual_norms) == stop


@pytest.mark.parametrize(("step", "stops"), [(0.5, True), (2.0, False)])
def test_the_tolerance_is_a_ten_thousandth(step: float, stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (WINDOW, TOLERANCE) == (3, 1e-4)
    fake_hqq(monkeypatch, [(1 - step * TOLERANCE) ** i for i in range(12)])
    found = milo("w", torch.zeros(16, 64), 3, 64, 4, iterations=11)
    assert len(found.residual_norms) == (4 if stops else 12)


def test_real_weights_settle_before_a_generous_limit(weight: torch.Tensor) -> None:
    norms = milo("w", weight[:64], 3, 64, 4, iterations=200).residual_norms
    assert 4 < len(norms) < 201
    before, now = sum(norms[-4:-1]), sum(norms[-3:])
    assert before - now < TOLERANCE * before


def test_the_same_name_gives_the_same_factors(weight: torch.Tensor) -> None:
    one, again, other = (milo(name, weight, 3, 64, 4, 2) for name in ("a", "a", "b"))
    assert torch.equal(one.u, again.u) and torch.equal(one.base.codes, again.base.codes)
    assert not torch.equal(one.u, other.u)


def test_the_input_is_left_alone(weight: torch.Tensor) -> None:
    before = weight.clone()
    milo("w", weight, 3, 64, 4, 2)
    assert torch.equal(weight, before)


def test_the_best_alternation_is_kept_not_the_last(weight: torch.Tensor) -> None:
    found = milo("w", weight, 1, 64, 16, iterations=10)  # at one bit the alternation soon gets worse
    assert found.residual_norms[-1] > 1.01 * min(found.residual_norms), "the case no longer tells best from last"
    assert error(weight, found) * norm(weight) == pytest.approx(min(found.residual_norms), rel=1e-4)
    assert torch.equal(found.residual, weight - dequantized(found.base))
