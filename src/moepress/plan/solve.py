# SPDX-License-Identifier: Apache-2.0
"""One choice from every menu, at most so many bytes, least total loss: the multiple-choice knapsack. Pure, no torch.

Legend: M menus, C choices of the longest menu, S steps, lambda price in loss per byte.

1. Each menu's choices are reduced to the lower convex hull of (bytes, loss). Steps along the hulls, steepest first,
   are the optima of the linear relaxation (Sinha and Zoltners 1979): those budgets at which a step ends are solved
   exactly, with loss g_t after t steps. Between two of them, at the price of the step that did not fit,
   g_t - lambda * (bytes left) is a lower bound for every choice there is.
2. What the last, unfinished step leaves free is spent by a search around the hull solution (a dynamic program over a
   growing core, after Pisinger 1995): menus are opened in the order of how little their best alternative costs at
   price lambda, all Pareto-optimal combinations are kept, and those that the bound rules out are dropped. Where the
   search comes to its end the solution is optimal. It is cut off after a fixed amount of work; then `lower_bound` says
   how far the optimum can be.

More budget never gives more loss, cut off or not: a step's search does not look at the budget but makes one list of
candidates for all budgets from this step to the next, and no choice within one step's budgets has less loss than the
hull solution at the next. (Up to the rounding of float64 sums.)

Equal choices and equal menus are told apart by their contents, not by where they stand; only what is equal in both
numbers is taken in the order given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moepress.errors import PlanError

MAX_STATES = 20_000
MAX_WORK = 3_000_000
"""Combinations looked at in one search: about half a second."""

Menu = Sequence[tuple[int, float]]
"""(bytes, loss) of each choice."""
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A choice for every menu and how good it is known to be."""

    choices: tuple[int, ...]
    """Index into each menu."""
    bytes: int
    loss: float
    lower_bound: float
    """No choice within the budget has less loss than this. Equal to `loss` where the solution is proved optimal."""
    price: float
    """Loss that one more byte would save at this budget: the multiplier of the linear relaxation. 0 where every menu
    already has its best choice."""

    @property
    def gap(self) -> float:
        """Loss above `lower_bound`; 0 means optimal."""
        return self.loss - self.lower_bound


def solve(items: Sequence[Menu], budget: int) -> Solution:
    """The module's docstring in one call. Bytes are whole and non-negative, losses finite numbers of either sign.

    Raises PlanError for a menu without choices or with other numbers, and for a budget that is smaller than the
    smallest choices together.
    """
    order = sorted(range(len(items)), key=lambda i: sorted(items[i]))
    table = _table([items[i] for i in order])
    smallest = int(table.bytes.min(axis=1).sum()) if items else 0
    if smallest > budget:
        raise PlanError(
            f"a budget of {budget:,} bytes is too small: the smallest choices together take {smallest:,}; "
            "raise the budget or offer smaller specs"
        )
    chosen, proved, price, bound = _solve(table, budget)
    columns = table.column[np.arange(len(items)), chosen]
    choices = [0] * len(items)
    for i, column in zip(order, columns.tolist(), strict=True):
        choices[i] = column
    loss = math.fsum(float(menu[i][1]) for menu, i in zip(items, choices, strict=True))
    stored = sum(int(menu[i][0]) for menu, i in zip(items, choices, strict=True))
    # the bound is a sum in another order: it may be above the loss by a rounding
    lower = loss if proved else min(bound, loss)
    return Solution(choices=tuple(choices), bytes=stored, loss=loss, lower_bound=lower, price=price)


@dataclass(frozen=True)
class _Table:
    """Menus as (M, C) arrays, each row's choices by rising (bytes, loss); short rows repeat their last choice."""

    bytes: Ints
    loss: Floats
    column: Ints
    """The choice's index in the caller's menu."""


@dataclass(frozen=True)
class _Steps:
    """(S,) arrays: hull steps of all menus, steepest first."""

    menu: Ints
    after: Ints
    bytes: Ints
    loss: Floats
    """How much the loss falls, positive."""
    slope: Floats


def _table(items: Sequence[Menu]) -> _Table:
    width = max((len(menu) for menu in items), default=1)
    sizes, losses, columns = [], [], []
    for i, menu in enumerate(items):
        if not menu:
            raise PlanError(f"menu {i} of {len(items)} has no choice; offer at least one for each weight")
        rank = sorted(range(len(menu)), key=menu.__getitem__)
        rank += rank[-1:] * (width - len(rank))
        sizes.append([menu[c][0] for c in rank])
        losses.append([menu[c][1] for c in rank])
        columns.append(rank)
    try:
        as_bytes, as_loss = np.array(sizes), np.array(losses, dtype=float).reshape(len(items), width)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"menus are not pairs of bytes and loss: {error}") from error
    whole = as_bytes.size == 0 or as_bytes.dtype.kind == "i"
    if not whole or (as_bytes < 0).any() or as_bytes.max(initial=0) > 2**62 // max(1, len(items)):
        raise PlanError("menus: bytes are not all whole numbers of at least 0 that can be summed in 62 bits")
    if not np.isfinite(as_loss).all():
        bad = as_loss[~np.isfinite(as_loss)][0]
        raise PlanError(f"menus: a predicted loss is {bad}, not a finite number; leave that choice out")
    shape = (len(items), width)
    return _Table(as_bytes.astype(np.int64).reshape(shape), as_loss, np.array(columns, dtype=np.int64).reshape(shape))


def _solve(table: _Table, budget: int) -> tuple[Ints, bool, float, float]:
    """Columns of `table` per menu, whether they are proved optimal, the price, and the relaxation's lower bound."""
    rows = np.arange(len(table.bytes))
    start = np.zeros(len(rows), dtype=np.int64)  # the smallest choice: rows are sorted
    steps = _hull_steps(table)
    spent = int(table.bytes[rows, start].sum()) + np.concatenate([[0], np.cumsum(steps.bytes)])
    taken = int(np.searchsorted(spent, budget, side="right")) - 1
    chosen = start.copy()
    for menu, after in zip(steps.menu[:taken].tolist(), steps.after[:taken].tolist(), strict=True):
        chosen[menu] = after
    loss = math.fsum(table.loss[rows, chosen].tolist())
    if taken == len(steps.menu):
        return chosen, True, 0.0, loss
    price, left = float(steps.slope[taken]), budget - int(spent[taken])
    if left == 0:
        return chosen, True, price, loss
    chosen, proved = _search(table, chosen, price, int(steps.bytes[taken]), float(steps.loss[taken]), left)
    return chosen, proved, price, loss - price * left


def _hull_steps(table: _Table) -> _Steps:
    """From the smallest choice on, always the steepest way down; of equally steep ones the longest."""
    rows = np.arange(len(table.bytes))
    at = np.zeros(len(rows), dtype=np.int64)
    limit = np.full(len(rows), math.inf)
    found: list[tuple[Ints, Ints, Ints, Floats, Floats]] = []
    while True:
        more = table.bytes - table.bytes[rows, at][:, None]
        less = table.loss[rows, at][:, None] - table.loss
        useful = (more > 0) & (less > 0)
        slopes = np.where(useful, less / np.where(useful, more, 1), -1.0)
        best = slopes.max(axis=1, initial=-1.0)
        longest = np.where(slopes == best[:, None], more, -1).argmax(axis=1) if len(rows) else at
        moved = np.flatnonzero(best > 0)
        if not len(moved):
            break
        # slopes fall along a hull; in floats they may rise by a rounding, and sorting must not swap the steps then
        limit[moved] = np.minimum(best[moved], limit[moved])
        after = longest[moved]
        found.append((moved, after, more[moved, after], less[moved, after], limit[moved]))
        at[moved] = after
    if not found:
        none = np.zeros(0, dtype=np.int64)
        return _Steps(none, none, none, np.zeros(0), np.zeros(0))
    menu, after, size, gain, slope = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((np.arange(len(menu)), menu, -slope))
    return _Steps(menu[order], after[order], size[order], gain[order], slope[order])


def _search(table: _Table, chosen: Ints, price: float, room: int, gain: float, left: int) -> tuple[Ints, bool]:
    """The best combination near the hull solution `chosen` with `left` bytes to spend, and whether it is the best.

    `room` and `gain` are the bytes and the loss of the step that did not fit: 0 <= left < room. States are differences
    to `chosen`. Everything but the last lines is the same for every `left`: that makes budgets comparable.
    """
    rows = np.arange(len(chosen))
    more = table.bytes - table.bytes[rows, chosen][:, None]
    change = table.loss - table.loss[rows, chosen][:, None]
    reduced = np.maximum(change + price * more, 0.0)  # loss above the bound, negative by a rounding only
    slack = gain * (1 + 1e-9)
    reduced[(more == 0) & (change >= 0)] = math.inf  # what is chosen already
    nearest = reduced.min(axis=1, initial=math.inf)
    size, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[int, Ints, Ints]] = []
    work, proved = 0, True
    for menu in np.lexsort((rows, nearest)).tolist():
        columns = np.flatnonzero(reduced[menu] <= slack)
        if not len(columns):
            break  # nor has any later menu
        work += len(size) * (len(columns) + 1)
        if work > MAX_WORK:
            proved = False
            break
        columns = np.concatenate([[chosen[menu]], columns])
        parents = len(size)
        size = (size + more[menu, columns][:, None]).ravel()
        loss = (loss + change[menu, columns][:, None]).ravel()
        kept = _within(size, loss, price, slack)
        proved &= len(kept) <= MAX_STATES
        kept = _nearest(kept, size, loss, price)
        history.append((menu, columns[kept // parents], kept % parents))
        size, loss = size[kept], loss[kept]
        slack = min(slack, _widest_gap(size, loss, price, room))
    fits = np.flatnonzero(size <= left)
    best = fits[np.lexsort((size[fits], loss[fits]))[0]]
    return _trace(chosen, history, int(best)), proved


def _within(size: Ints, loss: Floats, price: float, slack: float) -> Ints:
    """Indices of Pareto-optimal states that lie at most `slack` above the bound, by rising size."""
    kept = _pareto(size, loss)
    return kept[loss[kept] + price * size[kept] <= slack]


def _nearest(kept: Ints, size: Ints, loss: Floats, price: float) -> Ints:
    """Of too many states those nearest to the bound, and always the best one that needs no room at all."""
    if len(kept) <= MAX_STATES:
        return kept
    above = loss[kept] + price * size[kept]
    above[np.searchsorted(size[kept], 0, side="right") - 1] = -math.inf
    return kept[np.sort(np.argsort(above, kind="stable")[:MAX_STATES])]


def _pareto(size: Ints, loss: Floats) -> Ints:
    """Indices of states that no other equals or beats in both."""
    order = np.lexsort((loss, size))
    before = np.minimum.accumulate(np.concatenate([[math.inf], loss[order][:-1]]))
    return order[loss[order] < before]


def _widest_gap(size: Ints, loss: Floats, price: float, room: int) -> float:
    """The most by which, at any budget within the step, the best state so far lies above the bound.

    Rounded up, so that in floats too it is at least what each of these states itself lies above the bound.
    """
    inside = np.flatnonzero(size <= room)
    inside = inside[_pareto(size[inside], loss[inside])]
    until = np.concatenate([size[inside][1:], [room]])
    widest = float((loss[inside] + price * until)[until > 0].max())
    return widest + 1e-9 * abs(widest)


def _trace(chosen: Ints, history: list[tuple[int, Ints, Ints]], state: int) -> Ints:
    out = chosen.copy()
    for menu, columns, parents in reversed(history):
        out[menu] = columns[state]
        state = int(parents[state])
    return out
