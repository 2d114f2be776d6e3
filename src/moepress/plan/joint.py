# SPDX-License-Identifier: Apache-2.0
"""Plans from calibration: widths, group sizes, ranks and methods chosen together (ours), and PMQ's preset.

`plan_joint` chooses one label (method and spec) for each weight, such that predicted losses add up to as little as
possible within a number of bytes (moepress.plan.solve). `plan_pmq` gives routed experts the widths of PMQ
(moepress.plan.pmq) and everything else 4 bits. Pure, no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moepress.errors import PlanError
from moepress.format.spec import WeightSpec, check_shape
from moepress.graph.view import ROUTED, ModelGraph, WeightRef
from moepress.plan.compare import NOTE, allocation_note
from moepress.plan.plan import Plan, check_plan, parse_label
from moepress.plan.pmq import WIDTHS, Layer, allocate_global, allocate_model
from moepress.plan.settings import METHODS
from moepress.plan.solve import Solution, solve
from moepress.plan.statistics import Statistics

ITERATIONS = 10
"""A plan's alternations where a label says milo; Settings' default."""
LABEL_PRECISION = 0.01
"""Averages are stated with two decimals, some of them rounded and some cut off: the paper's 2.05 is 2.058."""
SCOPES = ("layer", "global")

Menus = Mapping[str, Mapping[str, float]]
"""Weight name -> label (`gptq b3g64`) -> predicted loss of choosing it."""


def plan_joint(
    graph: ModelGraph,
    source: str,
    menus: Menus,
    budget_bytes: int,
    *,
    method: str | None = None,
    keep: Collection[str] = (),
    iterations: int = ITERATIONS,
    refit: bool = True,
    notes: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan with the least predicted loss whose compressed weights take at most `budget_bytes` in all.

    Bytes count codes, scales, zeros and factors (`Budget.bytes_for` gives them from what a user types). Gate and up of
    a routed expert are one item: they choose among the labels that both offer, and their losses add up. Labels that do
    not fit a weight's shape are passed over. `keep` names weights that stay as they are and need no menu. `method` is
    the plan's default, else the most frequent one; `iterations` and `refit` matter where a label says milo.

    The plan's notes say what each role got, what it costs in bytes and loss, and how near the optimum the choice is
    known to be. Raises PlanError for a missing, unknown or empty menu, a loss that is not finite, and a budget that is
    too small.
    """
    _check_names(graph, menus, keep)
    items = _items(graph, menus, frozenset(keep))
    solution = solve([[(c.bytes, c.loss) for c in item.choices] for item in items], budget_bytes)
    labels = {
        ref.name: item.choices[choice].label
        for item, choice in zip(items, solution.choices, strict=True)
        for ref in item.refs
    }
    plan = _assemble(graph, source, labels, method, iterations, refit)
    losses = {name: float(menus[name][label]) for name, label in labels.items()}
    note = allocation_note(plan, graph, losses, by="joint", budget_bytes=budget_bytes, **_facts(solution))
    plan = replace(plan, notes={**(notes or {}), NOTE: note})
    check_plan(plan, graph)
    return plan


def plan_pmq(
    graph: ModelGraph,
    source: str,
    statistics: Statistics,
    average_bits: float,
    *,
    quantiser: str = "rtn",
    widths: Sequence[int] = WIDTHS,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    scope: str = "layer",
    solver: str = "dp",
    experts_only: bool = False,
    method: str = "gptq",
    group_size: int = 128,
    dense_spec: WeightSpec | None = None,
    keep: Collection[str] = (),
    notes: Mapping[str, Any] | None = None,
) -> Plan:
    """PMQ's plan: gate, up and down of a routed expert at its width, attention, shared experts and dense MLPs 4 bits.

    `average_bits` is the mean over the code bits of all compressed weights, as the paper labels its models: on
    Mixtral-8x7B 2.54 stands for 20 bits per 8 experts beside 4 bits for attention, 2.543 in truth. So, where one total
    for every layer comes nearer to the request than `LABEL_PRECISION`, that is taken; else the largest number of bits
    whose mean is not above the request. With `experts_only` the mean is over routed experts alone and never above the
    request. Scales and zeros are not counted. Experts of all layers are taken to be of one size.

    `quantiser` is the one whose losses are used; frequency is the token count and weight the routing weight before
    normalisation, as in the authors' code. `scope` "layer" gives every layer the same average, as published; "global"
    (ours) shares bits between layers, with losses over the root mean square of the layer's residual stream.

    Raises PlanError for statistics of another model or without what is needed, and for an average out of reach.
    """
    dense = dense_spec or WeightSpec(bits=4, group_size=group_size)
    if statistics.source != source:
        raise PlanError(
            f"the statistics are of source {statistics.source:.12} and this is {source:.12}; calibrate on this model"
        )
    banks = _banks(graph, keep)
    counts = {len(experts) for experts in banks.values()}
    mean = _expert_mean(graph, average_bits, widths, None if experts_only else dense.bits, keep, counts)
    layers = [_layer(bank, len(experts), statistics, quantiser) for bank, experts in banks.items()]
    options: dict[str, Any] = {"widths": widths, "alpha": alpha, "beta": beta, "gamma": gamma, "solver": solver}
    if scope == "global":
        scales = [_residual(bank, experts[0][0].layer, statistics) for bank, experts in banks.items()]
        bits = allocate_global(layers, mean, layer_scale=scales, **options)
    elif scope == "layer":
        bits = allocate_model(layers, mean, **options)
    else:
        raise PlanError(f"scope {scope!r} is unknown; choose one of {', '.join(SCOPES)}")
    weights: dict[str, WeightSpec | None] = {ref.name: None if ref.name in keep else dense for ref in graph.weights}
    for experts, own in zip(banks.values(), bits, strict=True):
        for refs, width in zip(experts, own, strict=True):
            weights |= {ref.name: WeightSpec(bits=width, group_size=group_size) for ref in refs}
    plan = Plan(source, method, ITERATIONS, True, weights)
    facts = {"by": "pmq", "asked_bits": average_bits, "mean_bits": _mean_bits(graph, plan), "scope": scope,
             "quantiser": quantiser, "alpha": alpha, "beta": beta, "gamma": gamma}  # fmt: skip
    losses = _known_losses(plan, statistics)
    loss = {"loss": math.fsum(losses.values())} if losses else {}
    note = allocation_note(plan, graph, losses, **facts, **loss)
    plan = replace(plan, notes={**(notes or {}), NOTE: note})
    check_plan(plan, graph)
    return plan


@dataclass(frozen=True, order=True)
class _Choice:
    bytes: int
    loss: float
    label: str


@dataclass(frozen=True)
class _Item:
    """Weights that share one choice."""

    refs: tuple[WeightRef, ...]
    choices: tuple[_Choice, ...]


def _items(graph: ModelGraph, menus: Menus, keep: frozenset[str]) -> list[_Item]:
    """Sorted by name and choices by content, so that the order of the input decides nothing."""
    units: dict[tuple[object, ...], list[WeightRef]] = {}
    for ref in graph.weights:
        if ref.name not in keep:
            paired = ref.group == ROUTED and ref.projection in ("gate", "up")
            units.setdefault((ref.bank, ref.expert) if paired else (ref.name,), []).append(ref)
    labels = {label for menu in menus.values() for label in menu}
    sizes = _sizes({ref.shape for ref in graph.weights}, {label: parse_label(label)[1] for label in labels})
    items = [_item(tuple(sorted(refs, key=lambda ref: ref.name)), menus, sizes) for refs in units.values()]
    return sorted(items, key=lambda item: item.refs[0].name)


Sizes = Mapping[tuple[int, int], Mapping[str, int]]
"""Shape -> label -> bytes of one weight; only labels that fit the shape."""


def _sizes(shapes: Collection[tuple[int, int]], specs: Mapping[str, WeightSpec]) -> Sizes:
    return {
        shape: {label: spec.num_bytes(*shape) for label, spec in specs.items() if _fits(spec, shape)}
        for shape in shapes
    }


def _fits(spec: WeightSpec, shape: tuple[int, int]) -> bool:
    try:
        check_shape("", spec, *shape)
    except PlanError:
        return False
    return True


def _item(refs: tuple[WeightRef, ...], menus: Menus, sizes: Sizes) -> _Item:
    shared = set.intersection(*(set(menus[ref.name]) for ref in refs))
    choices = []
    for label in shared.intersection(*(sizes[ref.shape] for ref in refs)):
        loss = math.fsum(float(menus[ref.name][label]) for ref in refs)
        if not math.isfinite(loss):
            raise PlanError(f"{refs[0].name}: the predicted loss of {label} is {loss}, not finite; measure it again")
        choices.append(_Choice(sum(sizes[ref.shape][label] for ref in refs), loss, label))
    if not choices:
        names = " and ".join(ref.name for ref in refs)
        raise PlanError(
            f"{names}: none of the {len(shared)} labels offered fits shape {refs[0].shape}; "
            "offer a smaller group size or keep the weight"
        )
    return _Item(refs, tuple(sorted(choices)))


def _check_names(graph: ModelGraph, menus: Menus, keep: Collection[str]) -> None:
    names = {ref.name for ref in graph.weights}
    missing = [ref.name for ref in graph.weights if ref.name not in keep and ref.name not in menus]
    if missing:
        raise PlanError(
            f"{missing[0]} and {len(missing) - 1} more weights have no predicted losses; measure or keep them"
        )
    unknown = sorted({*menus, *keep} - names)
    if unknown:
        raise PlanError(
            f"{unknown[0]} is not a weight of this model; {len(names)} are, such as {min(names, default='')}"
        )


def _assemble(
    graph: ModelGraph, source: str, labels: Mapping[str, str], method: str | None, iterations: int, refit: bool
) -> Plan:
    parsed = {name: parse_label(label) for name, label in labels.items()}
    if method is None:
        counts = Counter(own for own, _ in parsed.values())
        method = min(counts, key=lambda own: (-counts[own], own), default=METHODS[0])
    weights = {ref.name: parsed[ref.name][1] if ref.name in parsed else None for ref in graph.weights}
    methods = {name: own for name, (own, _) in parsed.items()}
    return Plan(source, method, iterations, refit, weights, {}, methods)


def _facts(solution: Solution) -> dict[str, Any]:
    return {
        "loss": solution.loss,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "loss_per_byte": solution.price,
    }


# PMQ


def _banks(graph: ModelGraph, keep: Collection[str]) -> dict[str, list[list[WeightRef]]]:
    """Bank -> expert -> its weights; banks that are kept are left out."""
    banks: dict[str, dict[int, list[WeightRef]]] = {}
    for ref in graph.weights:
        if ref.bank is not None and ref.expert is not None and ref.name not in keep:
            banks.setdefault(ref.bank, {}).setdefault(ref.expert, []).append(ref)
    if not banks:
        raise PlanError("no routed expert is left to compress; PMQ chooses widths for these alone")
    return {bank: [experts[i] for i in sorted(experts)] for bank, experts in banks.items()}


def _layer(bank: str, count: int, statistics: Statistics, quantiser: str) -> Layer:
    experts = statistics.experts.get(bank)
    if experts is None or len(experts) != count:
        found = "none" if experts is None else str(len(experts))
        raise PlanError(f"{bank}: statistics of {count} experts are needed and there are {found}; calibrate again")
    for i, expert in enumerate(experts):
        if quantiser not in expert.loss:
            raise PlanError(
                f"{bank}: expert {i} has no losses of quantiser {quantiser!r}, only of {sorted(expert.loss)}; "
                "choose one of these or calibrate again"
            )
    return Layer(
        name=bank,
        frequency=[expert.tokens for expert in experts],
        weight=[expert.weight_before for expert in experts],
        loss=[expert.loss[quantiser] for expert in experts],
    )


def _residual(bank: str, layer: int, statistics: Statistics) -> float:
    mean_square = statistics.residual.get(layer, 0.0)
    if not mean_square > 0:
        raise PlanError(f"{bank}: the residual stream of layer {layer} was not measured; calibrate again")
    return math.sqrt(mean_square)


def _expert_mean(
    graph: ModelGraph,
    asked: float,
    widths: Sequence[int],
    dense_bits: int | None,
    keep: Collection[str],
    counts: Collection[int],
) -> float:
    """The mean bits of an expert for which the mean over all weights is as asked; over experts where `dense_bits` is
    None. `counts` holds the numbers of experts that layers have."""
    routed = sum(ref.numel for ref in graph.weights if ref.name not in keep and ref.group == ROUTED)
    dense = sum(ref.numel for ref in graph.weights if ref.name not in keep and ref.group != ROUTED)
    precision = LABEL_PRECISION
    if dense_bits is None:
        dense, dense_bits, precision = 0, 0, 0.0
    elsewhere = dense * dense_bits

    def label(mean: float) -> float:
        return (routed * mean + elsewhere) / (routed + dense)

    low, high = label(min(widths)), label(max(widths))
    if not low - precision <= asked <= high + precision:  # NaN fails too
        besides = f" and {dense_bits} bits elsewhere" if dense else ""
        raise PlanError(
            f"an average of {asked} bits cannot be had: with experts of {', '.join(map(str, widths))} bits{besides} "
            f"it lies between {low:.2f} and {high:.2f}; ask for one of these"
        )
    mean = (asked * (routed + dense) - elsewhere) / routed
    mean = min(max(mean, min(widths)), max(widths))
    if len(counts) == 1:
        count = max(counts)
        same = round(mean * count) / count
        if abs(label(same) - asked) < precision:
            return same
    return mean


def _mean_bits(graph: ModelGraph, plan: Plan) -> float:
    sized = [(ref.numel, spec.bits) for ref in graph.weights if (spec := plan.weights[ref.name])]
    return sum(numel * bits for numel, bits in sized) / sum(numel for numel, _ in sized)


def _known_losses(plan: Plan, statistics: Statistics) -> dict[str, float]:
    """Each weight's predicted loss; nothing where the statistics lack one of them."""
    losses = {}
    for name, spec in plan.weights.items():
        if spec is not None:
            loss = statistics.errors.get(name, {}).get(f"{plan.method_of(name)} {spec.tag}")
            if loss is None:
                return {}
            losses[name] = loss
    return losses
