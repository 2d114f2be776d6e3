# SPDX-License-Identifier: Apache-2.0
"""The knapsack: the optimum on small menus, and the promises that hold on every input."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.plan import solve as module
from moepress.plan.solve import Menu, Solution, solve

Items = list[list[tuple[int, float]]]

sizes = st.integers(0, 30) | st.integers(0, 10**9)
losses = st.integers(0, 20).map(float) | st.floats(-1e6, 1e6)
menus = st.lists(st.tuples(sizes, losses), min_size=1, max_size=5)
small_items = st.lists(menus, max_size=5)


def smallest(items: Items) -> int:
    return sum(min(size for size, _ in menu) for menu in items)


def largest(items: Items) -> int:
    return sum(max(size for size, _ in menu) for menu in items)


def realistic(count: int, choices: int = 20, seed: int = 0) -> Items:
    """Menus like a planner's: a few widths, group sizes and ranks, losses that spread over orders of magnitude."""
    draw = random.Random(seed)
    items: Items = []
    for _ in range(count):
        numel, weight = draw.choice([2048 * 768, 4096 * 2048, draw.randint(10**5, 10**7)]), draw.lognormvariate(0, 2)
        items.append([])
        for _ in range(choices):
            bits, group, rank = draw.choice([2, 3, 4, 5, 6, 8]), draw.choice([32, 64, 128]), draw.choice([0, 16, 32])
            error = weight * numel * 4.0**-bits * draw.uniform(0.5, 1.5) * (1 - rank / 100)
            items[-1].append((numel * bits // 8 + numel // group * 4 + rank * 2000, error))
    return items


def check(items: Items, budget: int, found: Solution) -> None:
    chosen = [menu[i] for menu, i in zip(items, found.choices, strict=True)]
    assert found.bytes == sum(size for size, _ in chosen) <= budget
    assert found.loss == math.fsum(loss for _, loss in chosen)
    assert found.gap >= 0 and found.price >= 0


@settings(max_examples=400)
@given(small_items, st.data())
def test_small_menus_are_solved_to_the_optimum(items: Items, data: st.DataObject) -> None:
    budget = data.draw(st.integers(smallest(items), largest(items) + 5))
    found = solve(items, budget)
    check(items, budget, found)
    every = [c for c in itertools.product(*items) if sum(size for size, _ in c) <= budget]
    best = min(math.fsum(loss for _, loss in c) for c in every)
    scale = max((abs(loss) for menu in items for _, loss in menu), default=1.0)
    assert found.gap == 0
    assert found.loss == pytest.approx(best, rel=1e-12, abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(12))
def test_every_budget_of_larger_problems_is_solved_to_the_optimum(seed: int) -> None:
    draw = random.Random(seed)
    items: Items = [[(draw.randint(0, 40), float(draw.randint(0, 500))) for _ in range(6)] for _ in range(14)]
    low, high = smallest(items), largest(items)
    best = [0.0] * (high + 1)  # by dynamic programming over bytes: best[b] is the optimum of the menus so far
    for menu in items:
        every = range(len(best))
        best = [min((best[b - size] + loss for size, loss in menu if size <= b), default=math.inf) for b in every]
    for budget in range(low, high + 1):
        found = solve(items, budget)
        assert (found.loss, found.gap) == (best[budget], 0), budget


@settings(max_examples=100)
@given(small_items, st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_a_larger_budget_never_loses_more(items: Items, shares: list[float]) -> None:
    low, high = smallest(items), largest(items)
    budgets = sorted(low + round(share * (high - low)) for share in shares)
    found = [solve(items, budget).loss for budget in budgets]
    scale = max((abs(loss) for menu in items for _, loss in menu), default=1.0)
    assert all(b <= a + 1e-12 * scale for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("work", [0, 50, 2_000, 100_000])
@pytest.mark.parametrize("states", [1, 3, 20_000])
def test_a_search_that_is_cut_off_keeps_its_promises(work: int, states: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_WORK", work)
    monkeypatch.setattr(module, "MAX_STATES", states)
    items = realistic(40, 8)
    low, high = smallest(items), largest(items)
    middle = (low + high) // 2
    budgets = [low + (high - low) * i // 60 for i in range(61)] + [middle + 997 * i for i in range(60)]
    before, cut = math.inf, 0
    for budget in sorted(budgets):
        found = solve(items, budget)
        check(items, budget, found)
        assert found.loss <= before
        before = found.loss
        cut += found.gap > 0
    assert cut or work == 100_000


def test_the_bound_of_a_search_that_is_cut_off_holds(monkeypatch: Any) -> None:
    items = realistic(60, 10)
    budget = (smallest(items) + largest(items)) // 3
    best = solve(items, budget)
    assert best.gap == 0
    monkeypatch.setattr(module, "MAX_WORK", 10)
    rough = solve(items, budget)
    assert rough.lower_bound <= best.loss <= rough.loss
    assert 0 < rough.gap < 0.05 * rough.loss


@settings(max_examples=100)
@given(small_items, st.data(), st.randoms(use_true_random=False))
def test_the_order_of_menus_and_choices_does_not_matter(items: Items, data: st.DataObject, draw: Any) -> None:
    budget = data.draw(st.integers(smallest(items), largest(items)))
    shuffled = [draw.sample(menu, len(menu)) for menu in draw.sample(items, len(items))]
    first, second = solve(items, budget), solve(shuffled, budget)
    assert (first.bytes, first.loss, first.price) == (second.bytes, second.loss, second.price)

    def taken(all_of: Items, found: Solution) -> list[Any]:
        return sorted((sorted(menu), menu[i]) for menu, i in zip(all_of, found.choices, strict=True))

    assert taken(items, first) == taken(shuffled, second)
    assert solve(items, budget) == first


def test_many_menus_take_little_time_and_come_close() -> None:
    items = realistic(3_000)
    budget = smallest(items) + (largest(items) - smallest(items)) // 3
    found = solve(items, budget)
    check(items, budget, found)
    assert found.gap <= 1e-5 * found.loss
    assert budget - found.bytes < 10_000


def test_the_price_is_what_the_next_byte_saves() -> None:
    items: Items = [[(1, 10.0), (3, 2.0), (11, 0.0)], [(2, 6.0), (4, 4.0)]]
    assert solve(items, 3).price == 4.0
    assert solve(items, 5).price == 1.0
    assert solve(items, 7).price == 0.25
    assert solve(items, 15).price == 0.0
    assert solve(items, 15).choices == (2, 1)


def test_choices_off_the_hull_are_found() -> None:
    # the hull offers 0 or 10 bytes; 9 are left
    items: Items = [[(0, 10.0), (9, 3.0), (10, 0.0)]]
    assert solve(items, 9).choices == (1,)
    assert solve(items, 8).choices == (0,)
    assert solve(items, 10).choices == (2,)


def test_nothing_to_choose_is_no_problem() -> None:
    assert solve([], 0) == Solution(choices=(), bytes=0, loss=0.0, lower_bound=0.0, price=0.0)
    assert solve([[(5, 1.0)]], 5).choices == (0,)
    assert solve([[(5, 1.0), (5, 0.5), (4, 0.5)]], 100).choices == (2,)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([[(4, 1.0)], [(3, 1.0), (9, 0.0)]], "a budget of 6 bytes is too small: the smallest choices together take 7"),
        ([[]], "menu 0 of 1 has no choice"),
        ([[(1, math.nan)]], "a predicted loss is nan, not a finite number"),
        ([[(1, math.inf), (2, 0.0)]], "a predicted loss is inf"),
        ([[(-1, 0.0)]], "bytes are not all whole numbers of at least 0"),
        ([[(1.5, 0.0)]], "bytes are not all whole numbers"),
        ([[(2**70, 0.0)]], "bytes are not all whole numbers"),
        ([[(2**62, 0.0), (0, 0.0)]] * 2, "can be summed in 62 bits"),
        ([[("a", 0.0)]], "bytes are not all whole numbers"),
        ([[(1, "x")]], "menus are not pairs of bytes and loss"),
    ],
)
def test_what_means_nothing_is_refused(items: list[Menu], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        solve(items, 6)
