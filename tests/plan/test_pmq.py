# SPDX-License-Identifier: Apache-2.0
"""PMQ: the published plans of Mixtral-8x7B, both solvers against brute force, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.plan.pmq import SOLVERS, Layer, allocate_global, allocate_layer, allocate_model, layer_totals

# The published statistics lie in a data folder beside the repository, absent in a user's clone.
PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "mixtral_pmq.json"
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"{PUBLISHED} is not here")


def published() -> tuple[list[Layer], dict[int, list[list[int]]]]:
    body = json.loads(PUBLISHED.read_text())
    layers = [
        Layer(
            name=f"layer {n}",
            frequency=body["frequency"][n],
            weight=body["weight"][n],
            loss=[{int(width): loss for width, loss in each.items()} for each in body["loss"][n]],
        )
        for n in range(body["num_layers"])
    ]
    return layers, {int(total): plan for total, plan in body["allocations"].items()}


def cost_of(layer: Layer, bits: Sequence[int], gamma: float = 1.0, scale: float = 1.0) -> float:
    """The objective, written once more."""
    frequency, weight = sum(layer.frequency), sum(layer.weight)
    return math.fsum(
        (f / frequency) * (w / weight) ** 1.5 * (loss[j] / scale) ** gamma
        for f, w, loss, j in zip(layer.frequency, layer.weight, layer.loss, bits, strict=True)
    )


def brute_force(layer: Layer, total: int, gamma: float = 1.0, widths: Sequence[int] = (1, 2, 3)) -> float:
    found = [b for b in itertools.product(widths, repeat=len(layer.loss)) if sum(b) == total]
    strict = [b for b in found if set(widths[-2:]) <= set(b)]
    return min(cost_of(layer, bits, gamma) for bits in strict or found)


def allocate(layer: Layer, total: int, **options: Any) -> list[int]:
    return allocate_layer(layer.frequency, layer.weight, layer.loss, total, **options)


@needs_published
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_published_plan_comes_out(solver: str) -> None:
    layers, plans = published()
    assert sorted(plans) == [12, 14, 16, 18, 20]
    for total, plan in plans.items():
        assert [allocate(layer, total, solver=solver) for layer in layers] == plan
        assert allocate_model(layers, total / 8, solver=solver) == plan


@needs_published
def test_the_paper_s_exponent_gives_other_plans() -> None:
    layers, plans = published()
    same = 0
    for (n, layer), (total, plan) in itertools.product(enumerate(layers), plans.items()):
        by_dp, by_highs = (allocate(layer, total, gamma=2, solver=solver) for solver in ("dp", "highs"))
        assert by_dp == by_highs
        if n % 8 == 0:  # 6561 allocations each
            assert cost_of(layer, by_dp, 2) == pytest.approx(brute_force(layer, total, 2), rel=1e-12)
        same += by_dp == plan[n]
    assert same == 117  # of 160


@needs_published
def test_both_solvers_agree_on_the_global_program() -> None:
    layers, _ = published()
    by_dp, by_highs = (allocate_global(layers, 2.0, solver=solver) for solver in ("dp", "highs"))
    assert by_dp == by_highs
    sums = [sum(bits) for bits in by_dp]
    assert sum(sums) == 512 and len(set(sums)) > 1
    assert all({2, 3} <= set(bits) for bits in by_dp)


losses = st.floats(0, 1e3) | st.sampled_from([0.0, 1.0])
positive = st.floats(1e-3, 1e3)


@st.composite
def small_layers(draw: st.DrawFn, widths: Sequence[int] = (1, 2, 3), most: int = 5) -> Layer:
    count = draw(st.integers(1, most))
    numbers = st.lists(positive, min_size=count, max_size=count)
    menus = st.fixed_dictionaries(dict.fromkeys(widths, losses))
    return Layer(
        frequency=draw(numbers), weight=draw(numbers), loss=draw(st.lists(menus, min_size=count, max_size=count))
    )


@settings(max_examples=60)
@given(small_layers(), st.data(), st.sampled_from([1.0, 2.0]))
def test_both_solvers_find_the_optimum(layer: Layer, data: st.DataObject, gamma: float) -> None:
    total = data.draw(st.integers(len(layer.loss), 3 * len(layer.loss)))
    best = brute_force(layer, total, gamma)
    largest = max(cost_of(layer, [width] * len(layer.loss), gamma) for width in (1, 2, 3))
    for solver in SOLVERS:
        bits = allocate(layer, total, gamma=gamma, solver=solver)
        assert sum(bits) == total
        assert cost_of(layer, bits, gamma) == pytest.approx(best, rel=1e-9, abs=1e-9 * largest)


@settings(max_examples=40)
@given(st.lists(small_layers(most=3), min_size=1, max_size=2), st.data())
def test_the_global_program_is_optimal(layers: list[Layer], data: st.DataObject) -> None:
    count = sum(len(layer.loss) for layer in layers)
    total = data.draw(st.integers(count, 3 * count))
    scales = [data.draw(positive) for _ in layers]

    def cost(plan: Sequence[Sequence[int]]) -> float:
        return math.fsum(cost_of(*each) for each in zip(layers, plan, [1.0] * len(plan), scales, strict=True))

    each = [list(itertools.product((1, 2, 3), repeat=len(layer.loss))) for layer in layers]
    allowed = [plan for plan in itertools.product(*each) if sum(map(sum, plan)) == total]
    strict = [plan for plan in allowed if all({2, 3} <= set(bits) or len(bits) < 2 for bits in plan)]
    best = min(map(cost, strict or allowed))
    for solver in SOLVERS:
        found = allocate_global(layers, total / count, layer_scale=scales, solver=solver)
        assert sum(map(sum, found)) == total
        assert cost(found) == pytest.approx(best, rel=1e-9, abs=1e-9 * max(map(cost, allowed)))


SAME = Layer(frequency=[1] * 4, weight=[1] * 4, loss=[{1: 4.0, 2: 2.0, 3: 1.0}] * 4)


def test_of_equal_plans_the_earlier_experts_get_more_bits() -> None:
    assert allocate(SAME, 9, solver="dp") == [3, 2, 2, 2]
    assert sorted(allocate(SAME, 9, solver="highs")) == [2, 2, 2, 3]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_two_largest_widths_occur_wherever_they_can(solver: str) -> None:
    # without the rule no expert would have 2 bits: that width costs as much as 1 bit
    steep = Layer(frequency=[1] * 4, weight=[1] * 4, loss=[{1: 4.0, 2: 4.0, 3: 0.0}] * 4)
    assert sorted(allocate(steep, 8, solver=solver)) == [1, 2, 2, 3]
    assert allocate(SAME, 12, solver=solver) == [3, 3, 3, 3]
    assert allocate(SAME, 4, solver=solver) == [1, 1, 1, 1]
    assert sorted(allocate(SAME, 5, solver=solver)) == [1, 1, 1, 2]
    assert sorted(allocate_global([SAME, SAME], 1.0, solver=solver)[1]) == [1, 1, 1, 1]
    wide = Layer(frequency=[1] * 3, weight=[1] * 3, loss=[{2: 4.0, 4: 1.0, 8: 0.0}] * 3)
    assert sorted(allocate(wide, 14, widths=(2, 4, 8), solver=solver)) == [2, 4, 8]


def test_a_layer_that_matters_more_gets_more_bits() -> None:
    found = allocate_global([SAME, SAME], 2.0, layer_scale=[10.0, 1.0])
    assert sum(found[0]) < sum(found[1])
    again = allocate_global([SAME, SAME], 2.0)
    assert sum(map(sum, again)) == 16


def test_experts_that_nobody_asks_for_cost_nothing() -> None:
    layer = Layer(frequency=[1, 0, 0], weight=[1, 0, 0], loss=[{1: 4.0, 2: 2.0, 3: 1.0}] * 3)
    for solver in SOLVERS:
        bits = allocate(layer, 6, solver=solver)
        assert bits[0] == 3
    silent = Layer(frequency=[1, 1], weight=[1, 1], loss=[{1: 0.0, 2: 0.0, 3: 0.0}] * 2)
    assert [sum(allocate(silent, 5, solver=solver)) for solver in SOLVERS] == [5, 5]


def test_totals_are_rounded_by_largest_remainder() -> None:
    assert layer_totals([8] * 32, 2.5) == [20] * 32
    assert layer_totals([8, 8, 8], 2.54) == [20, 20, 20]  # 60.96 bits in all
    assert layer_totals([8, 8, 8], 2.55) == [21, 20, 20]
    assert layer_totals([4, 10], 2.15) == [9, 21]  # 8.6 and 21.5 bits
    assert layer_totals([20], 2.55) == [51]


@pytest.mark.parametrize(
    ("change", "total", "options", "message"),
    [
        ({}, 13, {}, r"layer: 4 experts of 1, 2, 3 bits cannot sum to 13 bits; ask for a total in 4\.\.12"),
        ({}, 3, {}, "cannot sum to 3 bits"),
        ({}, -1, {}, "cannot sum to -1 bits"),
        ({}, 7, {"widths": (2,)}, r"4 experts of 2 bits cannot sum to 7 bits; ask for a total in 8\.\.8"),
        ({}, 8.0, {}, "cannot sum to 8.0 bits"),
        ({}, 8, {"widths": (3, 2)}, r"widths \(3, 2\) are not whole numbers of bits in rising order"),
        ({}, 8, {"widths": ()}, r"widths \(\) are not"),
        ({}, 16, {"widths": (1, 4)}, "expert 0 has no loss at 4 bits, only at"),
        ({}, 8, {"solver": "gurobi"}, "solver 'gurobi' is unknown; choose one of highs, dp"),
        ({"frequency": [1, 1, 1]}, 8, {}, "3 frequencies, 4 weights and 4 losses; give one of each per expert"),
        ({"frequency": [1, 1, 1, -1]}, 8, {}, "expert 3's frequency is -1, not a finite number of at least 0"),
        ({"weight": [1, math.nan, 1, 1]}, 8, {}, "expert 1's weight is nan"),
        ({"weight": [0, 0, 0, 0]}, 8, {}, "the experts' weight sums to 0.0; calibrate on text that reaches"),
        ({"loss": [{1: 1.0, 2: math.inf, 3: 0.0}] * 4}, 8, {}, "expert 0's loss at 2 bits is inf"),
        ({"loss": [{1: 1.0, 2: -2.0, 3: 0.0}] * 4}, 8, {}, "expert 0's loss at 2 bits is -2.0"),
        ({"loss": [{1: 1e200, 2: 1.0, 3: 0.0}] * 4}, 8, {"gamma": 2}, "expert 0's cost at 1 bits is inf"),
        ({"loss": [{1: 1.0, 3: 0.0}] * 4}, 8, {}, r"expert 0 has no loss at 2 bits, only at \[1, 3\]"),
        ({"loss": []}, 8, {}, "4 frequencies, 4 weights and 0 losses"),
    ],
)
def test_what_means_nothing_is_refused(
    change: dict[str, Any], total: Any, options: dict[str, Any], message: str
) -> None:
    layer = {"frequency": SAME.frequency, "weight": SAME.weight, "loss": SAME.loss} | change
    with pytest.raises(PlanError, match=message):
        allocate_layer(layer["frequency"], layer["weight"], layer["loss"], total, **options)


def test_a_cost_that_no_plan_can_have_hides_no_other() -> None:
    """Costs are scaled by the largest for HiGHS, which takes what is a millionth of it or less for nothing."""
    tiny = Layer(name="a", frequency=[1.0], weight=[1.0], loss=[{1: 1e-190, 2: 0.0, 3: 1.0}])
    free = Layer(name="b", frequency=[1.0], weight=[1.0], loss=[{1: 0.0, 2: 0.0, 3: 0.0}])
    for solver in SOLVERS:
        assert allocate_global([tiny, free], 1.5, layer_scale=[1.0, 1.0], solver=solver) == [[2], [1]]


def test_a_need_that_the_total_has_no_bits_for_is_dropped_as_a_whole() -> None:
    """Five bits for one expert and three: these cannot have 2 and 3 bits among them, so none is asked of them."""
    one = Layer(name="a", frequency=[1.0], weight=[1.0], loss=[{1: 1.0, 2: 0.0, 3: 0.0}])
    three = Layer(name="b", frequency=[1.0] * 3, weight=[1.0] * 3, loss=[{1: 0.0, 2: 0.0, 3: 0.0}] * 3)
    for solver in SOLVERS:
        assert allocate_global([one, three], 1.25, layer_scale=[1.0, 1.0], solver=solver) == [[2], [1, 1, 1]]


def test_averages_and_scales_are_checked() -> None:
    with pytest.raises(PlanError, match=r"3\.1 bits on average cannot be had from experts of 1, 2, 3 bits; ask"):
        allocate_model([SAME], 3.1)
    with pytest.raises(PlanError, match="nan bits on average"):
        allocate_global([SAME], math.nan)
    with pytest.raises(PlanError, match="1 layer scales for 2 layers; give one per layer"):
        allocate_global([SAME, SAME], 2.0, layer_scale=[1.0])
    with pytest.raises(PlanError, match=r"layer scale 0\.0 is not a positive number"):
        allocate_global([SAME], 2.0, layer_scale=[0.0])
    with pytest.raises(PlanError, match="no MoE layer"):
        allocate_global([], 2.0)
