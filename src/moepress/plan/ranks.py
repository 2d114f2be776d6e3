# SPDX-License-Identifier: Apache-2.0
"""Rank policies: how many ranks each weight's compensator gets. Pure, no torch.

A policy is a sum of terms `kind-amount` joined by `+`; a weight's rank is the sum over the terms, at most the smaller
side of the weight. Gate and up of an expert always share one rank (they run as one matrix).

    uniform-R        R everywhere
    dense-R          R for attention, shared experts and dense MLPs
    sparse-R         R for routed experts
    kurtosis-A       routed experts, A on average, in proportion to 1 + excess kurtosis (ours): heavy tails get more.
                     Spends at most the bytes of sparse-A.
    milo-kurtosis-A  MiLo's released rule, A = 16 or 32 (k = 2 or 3): 0 below kurtosis 0.5, 1024 above 9.5, else
                     2^(round(kurtosis) + k). The averages are nominal: on Mixtral-8x7B they come out at 22 and 33.
                     Gate and up take the larger of their two ranks.
    frequency-A      MiLo's rule for unbalanced models: an expert's rank is its share of its layer's tokens, times
                     A x experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moepress.errors import PlanError
from moepress.format.spec import WeightSpec
from moepress.graph.view import DENSE_GROUPS, ROUTED, WeightRef

KINDS = ("uniform", "dense", "sparse", "kurtosis", "milo-kurtosis", "frequency")
_TERM = re.compile(rf"({'|'.join(KINDS)})-(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Term:
    """One summand of a policy."""

    kind: str
    amount: float


@dataclass(frozen=True)
class Evidence:
    """What the policies may look at: excess kurtosis by weight name, token counts of each expert by bank."""

    kurtosis: Mapping[str, float] = field(default_factory=dict)
    frequency: Mapping[str, Sequence[float]] = field(default_factory=dict)


def parse_policy(text: str) -> tuple[Term, ...]:
    """`dense-512+kurtosis-16` -> its terms. Raises PlanError naming the term that is wrong."""
    terms = []
    for part in text.split("+"):
        found = _TERM.fullmatch(part.strip())
        if not found:
            raise PlanError(
                f"rank policy {part!r} is not understood; write kind-rank with kind one of {', '.join(KINDS)}"
            )
        kind, amount = found.group(1), float(found.group(2))
        if kind in {"uniform", "dense", "sparse"} and amount != int(amount):
            raise PlanError(f"rank policy {part!r}: {kind} takes a whole number")
        if kind == "milo-kurtosis" and amount not in (16, 32):
            raise PlanError(f"rank policy {part!r}: the published rule knows 16 and 32 only; use kurtosis-{amount:g}")
        terms.append(Term(kind, amount))
    return tuple(terms)


def needs(text: str) -> set[str]:
    """Which evidence a policy needs: a subset of {"kurtosis", "frequency"}."""
    kinds = {term.kind for term in parse_policy(text) if term.amount}
    return {name for name in ("kurtosis", "frequency") if any(name in kind for kind in kinds)}


def assign_ranks(
    policy: str, weights: Sequence[WeightRef], spec: WeightSpec, factor_bits: int, evidence: Evidence
) -> dict[str, int]:
    """Weight name -> rank. `spec` and `factor_bits` give the cost of a rank. PlanError for missing evidence."""
    ranks = {ref.name: 0 for ref in weights}
    units = expert_units(weights)
    for term in parse_policy(policy):
        for name, rank in _RULES[term.kind](term.amount, weights, units, factor_bits, evidence).items():
            ranks[name] += rank
    return {ref.name: min(ranks[ref.name], *ref.shape) for ref in weights}


def expert_units(weights: Sequence[WeightRef]) -> list[tuple[WeightRef, ...]]:
    """Routed weights by what shares a rank: (gate, up) and (down,) of each expert."""
    units: dict[tuple[str | None, int | None, bool], list[WeightRef]] = {}
    for ref in weights:
        if ref.group == ROUTED:
            units.setdefault((ref.bank, ref.expert, ref.projection == "down"), []).append(ref)
    return [tuple(unit) for unit in units.values()]


def distribute(scores: Sequence[float], caps: Sequence[int], costs: Sequence[int], budget: int) -> list[int]:
    """Whole ranks in proportion to `scores`, each at most its cap, whose summed `rank * cost` is at most `budget`.

    The largest multiplier that fits is found by bisection, and what is left goes one rank at a time to the largest
    remainders. A larger budget never spends less.
    """

    def at(level: float) -> list[int]:
        return [min(cap, int(level * score)) for score, cap in zip(scores, caps, strict=True)]

    def spent(ranks: Sequence[int]) -> int:
        return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))

    if not scores or spent(caps) <= budget:
        return list(caps)
    low, high = 0.0, max(cap / score for cap, score in zip(caps, scores, strict=True)) + 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) <= budget else (low, middle)
    ranks = at(low)
    left = budget - spent(ranks)

    # ties are broken by what the items are, so that their order does not matter
    def remainder(i: int) -> tuple[float, float, int, int]:
        return ranks[i] - low * scores[i], -scores[i], costs[i], -caps[i]

    for i in sorted(range(len(scores)), key=remainder):
        if ranks[i] < caps[i] and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks


def milo_kurtosis_rank(kurtosis: float, average: float) -> int:
    """MiLo's released rule for one matrix, its jump to 2048 or 4096 at a rounded kurtosis of 9 included."""
    rounded = round(kurtosis)
    if rounded < 1:
        return 0
    return 1024 if rounded > 9 else 2 ** (rounded + (2 if average == 16 else 3))


Units = list[tuple[WeightRef, ...]]


def _flat(groups: tuple[str, ...]) -> Callable[..., dict[str, int]]:
    def rule(amount: float, weights: Sequence[WeightRef], *_: object) -> dict[str, int]:
        return {ref.name: int(amount) for ref in weights if ref.group in groups}

    return rule


def _kurtosis(
    amount: float, _: Sequence[WeightRef], units: Units, factor_bits: int, evidence: Evidence
) -> dict[str, int]:
    scores = [1 + max(0.0, *(_known(evidence.kurtosis, ref.name) for ref in unit)) for unit in units]
    caps = [min(min(ref.shape) for ref in unit) for unit in units]
    # a rank's cost in bits of codes, whole numbers; scales cost in proportion
    costs = [sum(sum(ref.shape) for ref in unit) * factor_bits for unit in units]
    budget = int(sum(min(amount, cap) * cost for cap, cost in zip(caps, costs, strict=True)))
    ranks = distribute(scores, caps, costs, budget)
    return {ref.name: rank for unit, rank in zip(units, ranks, strict=True) for ref in unit}


def _milo_kurtosis(
    amount: float, _: Sequence[WeightRef], units: Units, factor_bits: int, evidence: Evidence
) -> dict[str, int]:
    def rank(unit: tuple[WeightRef, ...]) -> int:
        return max(milo_kurtosis_rank(_known(evidence.kurtosis, ref.name), amount) for ref in unit)

    return {ref.name: rank(unit) for unit in units for ref in unit}


def _frequency(
    amount: float, _: Sequence[WeightRef], units: Units, factor_bits: int, evidence: Evidence
) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for unit in units:
        bank, expert = unit[0].bank, unit[0].expert
        counts = evidence.frequency.get(bank or "")
        if counts is None:
            raise PlanError(
                f"{bank}: no expert frequencies; measure them with `moepress profile SRC --text FILE -o FREQ.json` "
                "and pass --frequencies FREQ.json"
            )
        if expert is None or expert >= len(counts) or not sum(counts) > 0:
            raise PlanError(f"{bank}: {len(counts)} frequencies summing to {sum(counts)} do not cover expert {expert}")
        share = counts[expert] / sum(counts)
        ranks |= {ref.name: round(share * amount * len(counts)) for ref in unit}
    return ranks


def _known(kurtosis: Mapping[str, float], name: str) -> float:
    if name not in kurtosis:
        raise PlanError(f"{name}: its kurtosis was not measured; the policy needs it")
    return kurtosis[name]


_RULES: dict[str, Callable[..., dict[str, int]]] = {
    "uniform": _flat((*DENSE_GROUPS, ROUTED)),
    "dense": _flat(DENSE_GROUPS),
    "sparse": _flat((ROUTED,)),
    "kurtosis": _kurtosis,
    "milo-kurtosis": _milo_kurtosis,
    "frequency": _frequency,
}
