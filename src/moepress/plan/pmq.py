# SPDX-License-Identifier: Apache-2.0
"""PMQ: how many bits each routed expert gets (MC-MoE, arXiv 2410.06270, section 3.2). Pure, no torch.

Legend: i expert, j width in bits, n experts of a layer; f frequency, w router weight, eps loss of one expert alone at
one width, k mean bits of an expert.

For each layer the integer program

    min  sum_ij  f_i^alpha * w_i^beta * eps_ij^gamma * x_ij
    s.t. sum_ij j * x_ij = n * k,   sum_j x_ij = 1 for each i,   sum_i x_ij >= 1 for the two largest widths j

with f and w normalised to sum 1 within the layer. The defaults alpha 1, beta 1.5, gamma 1 are what the authors'
code computes: they give each of the plans published for Mixtral-8x7B. The paper's text says gamma 2, which gives other
plans.

The last constraint is the paper's ("at least one expert with 3 bits and one with 2"), written for any widths. It is
dropped where no allocation with this total can meet it: a single expert, or all at the largest width.

Two solvers, both exact: `highs` (scipy.optimize.milp) and `dp` (a dynamic program over the bits spent). Of equal
optima `dp` takes the one that gives earlier experts more bits; `highs` gives one of them, the same each time.

`allocate_global` (ours) is one program over all layers instead. Raw losses grow with depth (300 times from Mixtral's
first to its last layer), so that they are divided by a scale per layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moepress.errors import PlanError

WIDTHS = (1, 2, 3)
SOLVERS = ("highs", "dp")
LARGEST_COST = 1e6
"""Costs are scaled to this before HiGHS sees them: its absolute gap of 1e-6, which scipy cannot change, is then 1e-12
of the largest cost."""

Costs = list[dict[int, float]]
"""Per expert, the cost of each width."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What PMQ looks at in one MoE layer, an entry per expert."""

    name: str = "layer"
    """For messages."""
    frequency: Sequence[float]
    """Tokens routed to the expert; any unit."""
    weight: Sequence[float]
    """Sum of the routing weights that tokens gave the expert; any unit."""
    loss: Sequence[Mapping[int, float]]
    """Width in bits -> error of the layer's output when this expert alone has that width (PMQ's epsilon)."""


def allocate_layer(
    frequency: Sequence[float],
    weight: Sequence[float],
    loss: Sequence[Mapping[int, float]],
    total_bits: int,
    *,
    widths: Sequence[int] = WIDTHS,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    solver: str = "highs",
    name: str = "layer",
) -> list[int]:
    """Bits of each expert, summing to `total_bits`, by the program in this module's docstring.

    Raises PlanError for evidence that is not one finite, non-negative number per expert (and width), and for a total
    that no choice of widths gives.
    """
    layer = Layer(name=name, frequency=frequency, weight=weight, loss=loss)
    return _solve([_costs(layer, widths, (alpha, beta, gamma))], [total_bits], widths, solver, [name])[0]


def allocate_model(
    layers: Sequence[Layer],
    average_bits: float,
    *,
    widths: Sequence[int] = WIDTHS,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    solver: str = "highs",
) -> list[list[int]]:
    """One program a layer, as published: bits per layer and expert, whose mean over experts is at most `average_bits`.

    Totals per layer come from `layer_totals`. Raises PlanError as `allocate_layer` does.
    """
    totals = layer_totals([len(layer.loss) for layer in layers], average_bits, widths)
    costs = [_costs(layer, widths, (alpha, beta, gamma)) for layer in layers]
    return _solve(costs, totals, widths, solver, [layer.name for layer in layers])


def allocate_global(
    layers: Sequence[Layer],
    average_bits: float,
    *,
    layer_scale: Sequence[float] | None = None,
    widths: Sequence[int] = WIDTHS,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    solver: str = "dp",
) -> list[list[int]]:
    """One program over all layers (ours): layers may differ in mean bits, as far as their losses do.

    `layer_scale` holds one positive number per layer, in the unit of its losses, such as the norm of the residual
    stream there; a loss enters as eps / scale. Without it, each layer is divided by its mean loss at the smallest
    width. The two largest widths occur in every layer of two experts or more, unless no allocation allows that in all.
    Raises PlanError as `allocate_layer` does.
    """
    widths = _checked_widths(widths)
    if layer_scale is not None and len(layer_scale) != len(layers):
        raise PlanError(f"{len(layer_scale)} layer scales for {len(layers)} layers; give one per layer")
    if not layers:
        raise PlanError("no MoE layer to allocate bits to; the statistics hold none")
    scales = [_mean_loss(layer, widths[0]) for layer in layers] if layer_scale is None else layer_scale
    for layer, scale in zip(layers, scales, strict=True):
        if not (math.isfinite(scale) and scale > 0):
            raise PlanError(f"{layer.name}: layer scale {scale} is not a positive number; measure it again")
    costs = [_costs(layer, widths, (alpha, beta, gamma), scale) for layer, scale in zip(layers, scales, strict=True)]
    count = sum(len(each) for each in costs)
    total = _floor(_checked_average(average_bits, widths) * count)
    run = _RUN[_checked_solver(solver)]
    needs = [_needed(widths) if len(each) >= len(_needed(widths)) else () for each in costs]
    found = run(costs, total, needs) or run(costs, total, [()] * len(costs))
    if found is None:
        raise _unreachable("all layers", total, count, widths)
    return found


def layer_totals(experts: Sequence[int], average_bits: float, widths: Sequence[int] = WIDTHS) -> list[int]:
    """Experts of each layer -> bits of each layer: the largest whole total not above `average_bits` x experts.

    By largest remainder: each layer gets its share rounded down, then one more bit goes to those that lost most, the
    earlier first. Raises PlanError where the average lies outside the widths.
    """
    average = _checked_average(average_bits, widths)
    shares = [average * count for count in experts]
    totals = [_floor(share) for share in shares]
    left = _floor(sum(shares)) - sum(totals)
    for i in sorted(range(len(shares)), key=lambda i: (round(totals[i] - shares[i], 9), i))[:left]:
        totals[i] += 1
    return totals


def _solve(
    layers: list[Costs], totals: Sequence[int], widths: Sequence[int], solver: str, names: Sequence[str]
) -> list[list[int]]:
    widths, solver = _checked_widths(widths), _checked_solver(solver)
    bits = []
    for costs, total, name in zip(layers, totals, names, strict=True):
        if type(total) is not int or not _reachable(total, len(costs), widths):
            raise _unreachable(name, total, len(costs), widths)
        need = _needed(widths)
        if not _reachable(total - sum(need), len(costs) - len(need), widths):
            need = ()
        found = _RUN[solver]([costs], total, [need])
        assert found is not None, f"{name}: {total} bits are reachable and the solver says they are not"
        bits.append(found[0])
    return bits


def _costs(layer: Layer, widths: Sequence[int], exponents: tuple[float, float, float], scale: float = 1.0) -> Costs:
    """f^alpha * w^beta * (eps / scale)^gamma of each expert and width."""
    alpha, beta, gamma = exponents
    if not layer.loss or not len(layer.frequency) == len(layer.weight) == len(layer.loss):
        raise PlanError(
            f"{layer.name}: {len(layer.frequency)} frequencies, {len(layer.weight)} weights and {len(layer.loss)} "
            "losses; give one of each per expert"
        )
    frequency = _shares(layer.name, "frequency", layer.frequency)
    weight = _shares(layer.name, "weight", layer.weight)
    costs: Costs = []
    for i, loss in enumerate(layer.loss):
        costs.append({})
        for width in widths:
            if width not in loss:
                raise PlanError(
                    f"{layer.name}: expert {i} has no loss at {width} bits, only at {sorted(loss)}; "
                    "measure that width or leave it out"
                )
            eps = _checked_number(f"{layer.name}: expert {i}'s loss at {width} bits", loss[width])
            cost = _power(frequency[i], alpha) * _power(weight[i], beta) * _power(eps / scale, gamma)
            costs[i][width] = _checked_number(f"{layer.name}: expert {i}'s cost at {width} bits", cost)
    return costs


def _power(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except (OverflowError, ZeroDivisionError):  # the caller's check names the expert
        return math.inf


def _shares(name: str, what: str, values: Sequence[float]) -> list[float]:
    checked = [_checked_number(f"{name}: expert {i}'s {what}", value) for i, value in enumerate(values)]
    total = math.fsum(checked)
    if not 0 < total < math.inf:
        raise PlanError(f"{name}: the experts' {what} sums to {total}; calibrate on text that reaches this layer")
    return [value / total for value in checked]


def _mean_loss(layer: Layer, width: int) -> float:
    return math.fsum(loss.get(width, math.nan) for loss in layer.loss) / max(1, len(layer.loss)) or 1.0


# the two solvers


def _dp(layers: Sequence[Costs], total: int, needs: Sequence[tuple[int, ...]]) -> list[list[int]] | None:
    """Exact: the best cost of every total within each layer, then the best split of the total over the layers."""
    menus = [_options(costs, need) for costs, need in zip(layers, needs, strict=True)]
    tables = [
        _suffix_costs(menu, min(total, sum(max(costs[i]) for i in range(len(costs)))), 2 ** len(need))
        for menu, costs, need in zip(menus, layers, needs, strict=True)
    ]
    curves = [[(bits, 0, cost) for bits, cost in enumerate(t[0, -1].tolist()) if cost < math.inf] for t in tables]
    if total < 0 or not all(curves):
        return None
    split = _suffix_costs(curves, total, 1)
    if split[0, 0, total] == math.inf:
        return None
    spent = _walk(split, curves, total)
    return [_walk(table, menu, bits) for table, menu, bits in zip(tables, menus, spent, strict=True)]


Option = tuple[int, int, float]
"""(bits, mask of the needed widths that it meets, cost)."""


def _options(costs: Costs, need: tuple[int, ...]) -> list[list[Option]]:
    masks = {width: 1 << i for i, width in enumerate(need)}
    return [[(width, masks.get(width, 0), cost) for width, cost in each.items()] for each in costs]


def _suffix_costs(menus: Sequence[Sequence[Option]], total: int, masks: int) -> NDArray[np.float64]:
    """[i, m, s] -> the least cost of menus i.. that spend just s bits and meet every need in the mask m."""
    table = np.full((len(menus) + 1, masks, total + 1), math.inf)
    table[-1, 0, 0] = 0.0
    for i in reversed(range(len(menus))):
        for bits, met, cost in menus[i]:
            for mask in range(masks) if bits <= total else ():
                rest = table[i + 1, mask & ~met, : total + 1 - bits]
                np.minimum(table[i, mask, bits:], rest + cost, out=table[i, mask, bits:])
    return table


def _walk(table: NDArray[np.float64], menus: Sequence[Sequence[Option]], total: int) -> list[int]:
    """The bits behind `table`'s best entry; of equal ones, the most for the earliest."""
    mask, left, chosen = table.shape[1] - 1, total, []
    for i, menu in enumerate(menus):
        # the sums are those that made the table, bit for bit, so that == finds them
        for bits, met, cost in sorted(menu, reverse=True):
            if bits <= left and table[i + 1, mask & ~met, left - bits] + cost == table[i, mask, left]:
                chosen.append(bits)
                mask, left = mask & ~met, left - bits
                break
    assert len(chosen) == len(menus), f"{len(chosen)} of {len(menus)} choices found"
    return chosen


def _highs(layers: Sequence[Costs], total: int, needs: Sequence[tuple[int, ...]]) -> list[list[int]] | None:
    """The same by branch and bound: a 0/1 column per expert and width.

    Widths that leave the others too few bits or too many have none: their costs would be in the scale of all.
    """
    least, most = (sum(end(each) for costs in layers for each in costs) for end in (min, max))
    columns = [(n, i, width, cost) for n, costs in enumerate(layers) for i, each in enumerate(costs)
               for width, cost in each.items() if least - min(each) <= total - width <= most - max(each)]  # fmt: skip
    left = {(n, width) for n, _, width, _ in columns}
    if any((n, width) not in left for n, need in enumerate(needs) for width in need):
        return None
    if len({column[:2] for column in columns}) < sum(map(len, layers)):
        return None
    rows: dict[tuple[int, ...], int] = {}
    entries: list[tuple[int, int, int]] = []
    for column, (n, i, width, _) in enumerate(columns):
        entries.append((rows.setdefault((n, i), len(rows)), column, 1))
        entries.append((rows.setdefault((), len(rows)), column, width))
        if width in needs[n]:
            entries.append((rows.setdefault((n, width, 0), len(rows)), column, 1))
    low = np.array([total if key == () else 1 for key in rows], dtype=float)
    high = np.array([math.inf if len(key) == 3 else total if key == () else 1 for key in rows], dtype=float)
    row, column_of, value = zip(*entries, strict=True)
    matrix = coo_array((value, (row, column_of)), shape=(len(rows), len(columns))).tocsc()
    costs = np.array([cost for *_, cost in columns])
    result = milp(
        costs / (costs.max() or 1.0) * LARGEST_COST,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, low, high),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    bits = [[0] * len(each) for each in layers]
    for (n, i, width, _), taken in zip(columns, result.x, strict=True):
        bits[n][i] += width if taken > 0.5 else 0
    assert sum(map(sum, bits)) == total, f"HiGHS spent {sum(map(sum, bits))} of {total} bits"
    return bits


_RUN = {"highs": _highs, "dp": _dp}


# checks


def _needed(widths: Sequence[int]) -> tuple[int, ...]:
    return tuple(widths[-2:])


def _reachable(total: int, experts: int, widths: Sequence[int]) -> bool:
    if total < 0 or experts < 0:
        return False
    sums = 1  # bit s is set where some choice of widths sums to s
    for _ in range(experts):
        shifted = 0
        for width in widths:
            shifted |= sums << width
        sums = shifted
    return bool(sums >> total & 1)


def _unreachable(name: str, total: object, experts: int, widths: Sequence[int]) -> PlanError:
    return PlanError(
        f"{name}: {experts} experts of {', '.join(map(str, widths))} bits cannot sum to {total} bits; "
        f"ask for a total in {experts * widths[0]}..{experts * widths[-1]} that they can"
    )


def _checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
    if not widths or list(widths) != sorted(set(widths)) or not all(type(w) is int and w > 0 for w in widths):
        raise PlanError(f"widths {tuple(widths)} are not whole numbers of bits in rising order; write e.g. {WIDTHS}")
    return tuple(widths)


def _checked_solver(solver: str) -> str:
    if solver not in SOLVERS:
        raise PlanError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    return solver


def _checked_average(average_bits: float, widths: Sequence[int]) -> float:
    widths = _checked_widths(widths)
    if not widths[0] <= average_bits <= widths[-1]:  # NaN fails too
        raise PlanError(
            f"{average_bits} bits on average cannot be had from experts of {', '.join(map(str, widths))} bits; "
            f"ask for {widths[0]} to {widths[-1]}"
        )
    return average_bits


def _checked_number(what: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise PlanError(f"{what} is {value}, not a finite number of at least 0; measure it again")
    return value


def _floor(value: float) -> int:
    # 2.55 x 20 is 50.99999999999999
    return math.floor(value + 1e-9 * max(1.0, value))
