# SPDX-License-Identifier: Apache-2.0
"""moepress's own kernels as a contender, with what they mean in their place: random records, reference, reasons."""

from __future__ import annotations

import pytest
import torch
from benching import CPU, SMALL_DENSE, SMALL_MOE, run

from moepress.bench import ours
from moepress.bench.ours import Moepress
from moepress.bench.problems import DENSE, LAYERS, MOE, Problem
from moepress.errors import PlanError
from moepress.format.spec import BITS, GROUP_SIZES
from moepress.kernels.records import dequantize_records, unpack_records
from stand_in import Kernels, stand_in


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.delenv("MOEPRESS_KERNELS", raising=False)
    return stand_in(monkeypatch)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(MOE, (8, 2, 64, 48), 5),
        Problem(MOE, (8, 3, 72, 24), 40, bits=2, group_size=32, dtype="fp16"),
        Problem(MOE, (8, 2, 64, 64), 5, rank=16),
        Problem(MOE, (8, 2, 64, 64), 5, rank=24),
        Problem(DENSE, (48, 64), 1, bits=4),
        Problem(DENSE, (48, 64), 2, rank=8),
        Problem(DENSE, (70, 200), 9, bits=5, group_size=128, rank=6),
    ],
    ids=["experts", "ragged experts", "rank 16", "rank 24", "dense", "dense, rank 8", "ragged dense, rank 6"],
)
def test_a_layer_agrees_with_its_reference(problem: Problem, kernels: Kernels) -> None:
    (row,) = run(problem, [Moepress()])
    assert row.reason is None and 0 < row.error < 0.02 and row.repeatable, row.trace
    in_records = problem.rank == 8  # of a rank of 6 a scale belongs to several rows' parts, and K is no multiple of 64
    dense = "linear with factors" if in_records else "linear"
    assert set(kernels.calls) == {"experts" if problem.moe else dense}
    assert row.note.endswith(" b, real zeros")


def test_copies_differ(kernels: Kernels) -> None:
    with torch.no_grad():
        first, second = (call() for call in Moepress().prepare(SMALL_MOE, 2, 0, CPU))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_records_are_random_and_sensible(bits: int, group_size: int) -> None:
    problem = Problem(MOE, (3, 2, 192, 100), 1, bits=bits, group_size=group_size)
    for matrix, layout in enumerate(ours.layouts_of(problem)):
        records = ours.random_records(problem, matrix, 0, 0, CPU)
        codes, scale, zero = unpack_records(records, layout)
        assert set(codes.unique().tolist()) == set(range(2**bits))
        assert (scale > 0).all() and scale.unique().numel() > 30 and zero.isfinite().all()
        weight = dequantize_records(records, layout)
        assert weight.std().item() == pytest.approx(0.02, rel=0.25) and weight.mean().abs() < 0.004
        assert torch.equal(records, ours.random_records(problem, matrix, 0, 0, CPU))
        assert not torch.equal(records, ours.random_records(problem, matrix, 0, 1, CPU))


def test_bits_are_those_of_the_records(kernels: Kernels) -> None:
    mixtral = LAYERS["mixtral-8x7b"]
    assert Moepress().bits_per_weight(Problem(MOE, mixtral, 8)) == 3.5
    assert Moepress().bits_per_weight(Problem(MOE, mixtral, 8, bits=6, group_size=128)) == 8.25
    with_factors = Moepress().bits_per_weight(Problem(DENSE, (1024, 1024), 8, rank=16))
    assert with_factors == pytest.approx(3.5 + 3.25 * 16 * 2 / 1024)


def test_reasons(kernels: Kernels) -> None:
    assert Moepress().why_not(SMALL_DENSE) is None
    assert "(down: the scales of v need" in Moepress().why_not(Problem(MOE, (8, 2, 64, 48), 5, rank=4))
    assert "no multiple of 8" in Moepress().why_not(Problem(DENSE, (48, 68), 1))
    with pytest.raises(PlanError):
        ours.layouts_of(Problem(DENSE, (48, 64), 1, group_size=48))
    assert "group_size 48 is not supported" in Moepress().why_not(Problem(DENSE, (48, 64), 1, group_size=48))
    assert [(each.name, each.chosen) for each in ours.explain(SMALL_MOE)] == [
        ("moepress cuda", True), ("moepress triton", False), ("moepress reference", False),
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_that() -> None:
    assert "this layer is on cpu" in Moepress().why_not(SMALL_DENSE)


def test_all_token_counts_are_compiled_at_once(kernels: Kernels) -> None:
    Moepress().warm_up([Problem(MOE, (8, 2, 64, 48), tokens) for tokens in (1, 8, 64)] + [SMALL_DENSE], CPU)
    assert kernels.warmed == [(1, [2], torch.bfloat16, "cpu")]
