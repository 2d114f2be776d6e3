# SPDX-License-Identifier: Apache-2.0
"""Rank policies: their grammar, MiLo's published rules to the letter, and the promises of the general one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.format.spec import FACTOR_BITS, WeightSpec
from moepress.graph.view import ROUTED, ModelGraph, WeightRef
from moepress.plan.ranks import (
    KINDS,
    Evidence,
    Term,
    assign_ranks,
    distribute,
    expert_units,
    milo_kurtosis_rank,
    needs,
    parse_policy,
)

Mixtral = Callable[..., ModelGraph]
SPEC = WeightSpec(bits=3)


def assign(graph: ModelGraph, policy: str, factor_bits: int = 3, **evidence: Any) -> dict[str, int]:
    return assign_ranks(policy, graph.weights, SPEC, factor_bits, Evidence(**evidence))


def kurtosis_of(graph: ModelGraph, by_role: Mapping[str, float]) -> dict[str, float]:
    return {ref.name: by_role.get(ref.role, 0.0) for ref in graph.weights}


def total(ranks: Mapping[str, int], weights: Sequence[WeightRef], factor_bits: int = 3) -> int:
    """Stored bytes of the compensators of routed experts."""
    out = 0
    for ref in weights:
        if ref.group == ROUTED and ranks[ref.name]:
            spec = WeightSpec(bits=3, rank=ranks[ref.name], factor_bits=factor_bits)
            out += spec.num_bytes(*ref.shape) - SPEC.num_bytes(*ref.shape)
    return out


# grammar


def test_a_policy_is_a_sum_of_terms() -> None:
    assert parse_policy("dense-512+kurtosis-16") == (Term("dense", 512), Term("kurtosis", 16))
    assert parse_policy(" dense-512 + milo-kurtosis-32 ") == (Term("dense", 512), Term("milo-kurtosis", 32))
    assert parse_policy("frequency-1.5") == (Term("frequency", 1.5),)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([16, 32])), min_size=1, max_size=4))
def test_what_is_written_is_what_is_read(terms: list[tuple[str, int]]) -> None:
    text = "+".join(f"{kind}-{amount}" for kind, amount in terms)
    assert parse_policy(text) == tuple(Term(kind, float(amount)) for kind, amount in terms)


@pytest.mark.parametrize(
    "text",
    ["", "dense", "dense-", "dense--1", "dense-x", "sense-16", "dense-16+", "+dense-16", "dense-16 sparse-16",
     "dense-1e3", "Dense-16", "dense-16,sparse-2", "kurtosis-.5", "kurtosis-nan"],
)  # fmt: skip
def test_other_text_is_refused_with_the_term_and_the_kinds(text: str) -> None:
    with pytest.raises(PlanError, match=r"rank policy '.*' is not understood; .* uniform, dense, sparse, kurtosis"):
        parse_policy(text)


@pytest.mark.parametrize("kind", ["uniform", "dense", "sparse"])
def test_plain_ranks_are_whole_numbers(kind: str) -> None:
    with pytest.raises(PlanError, match=f"{kind} takes a whole number"):
        parse_policy(f"{kind}-1.5")
    assert parse_policy(f"{kind}-2.0") == (Term(kind, 2),)


@pytest.mark.parametrize("amount", ["8", "24", "16.5", "0"])
def test_the_published_rule_knows_two_averages(amount: str) -> None:
    with pytest.raises(PlanError, match=f"knows 16 and 32 only; use kurtosis-{amount}"):
        parse_policy(f"milo-kurtosis-{amount}")


def test_needs_names_the_evidence() -> None:
    assert needs("dense-512+sparse-16+uniform-1") == set()
    assert needs("dense-512+kurtosis-16") == needs("milo-kurtosis-32") == {"kurtosis"}
    assert needs("frequency-2+kurtosis-1") == {"kurtosis", "frequency"}
    assert needs("frequency-0+kurtosis-0") == set()


# flat terms and sums


def test_flat_terms_reach_their_groups(mixtral: Mixtral) -> None:
    graph = mixtral()
    for policy, dense, sparse in [
        ("uniform-7", 7, 7), ("dense-7", 7, 0), ("sparse-7", 0, 7), ("dense-7+sparse-3", 7, 3),
        ("uniform-2+dense-3+dense-4", 9, 2),
    ]:  # fmt: skip
        ranks = assign(graph, policy)
        assert ranks == {ref.name: sparse if ref.group == ROUTED else dense for ref in graph.weights}, policy


def test_a_sum_is_capped_at_the_smaller_side(mixtral: Mixtral) -> None:
    graph = mixtral(hidden=128, inner=96)
    ranks = assign(graph, "uniform-90+dense-30+sparse-7")
    assert {ranks[ref.name] for ref in graph.weights if ref.group == "attn"} == {120}
    assert {ranks[ref.name] for ref in graph.weights if ref.group == ROUTED} == {96}
    assert set(assign(graph, "uniform-100000").values()) == {96, 128}


def test_units_are_gate_with_up_and_down_alone(mixtral: Mixtral) -> None:
    graph = mixtral(layers=1, experts=2)
    units = [[ref.role for ref in unit] for unit in expert_units(graph.weights)]
    assert sorted(map(sorted, units)) == [["expert.down"], ["expert.down"]] + [["expert.gate", "expert.up"]] * 2


def test_weights_that_are_kept_get_nothing_and_take_nothing(mixtral: Mixtral) -> None:
    graph = mixtral()
    some = [ref for ref in graph.weights if ref.layer == 1]
    ranks = assign_ranks("kurtosis-4", some, SPEC, 3, Evidence(kurtosis=kurtosis_of(graph, {})))
    assert ranks.keys() == {ref.name for ref in some}
    assert total(ranks, some) == total(assign(graph, "sparse-4"), some)


# MiLo's published kurtosis rule


@pytest.mark.parametrize(
    ("kurtosis", "k2", "k3"),
    [
        (-1.2, 0, 0), (0.0, 0, 0), (0.49, 0, 0),
        (0.5, 0, 0),  # half to even: 0
        (0.51, 8, 16), (1.0, 8, 16), (1.49, 8, 16),
        (1.5, 16, 32), (2.5, 16, 32),  # both round to 2
        (2.51, 32, 64), (3.5, 64, 128), (4.5, 64, 128), (6.0, 256, 512), (8.0, 1024, 2048), (8.5, 1024, 2048),
        (8.625, 2048, 4096), (9.0, 2048, 4096), (9.375, 2048, 4096),  # the jump: more than beyond it
        (9.5, 1024, 1024), (9.51, 1024, 1024), (23.25, 1024, 1024), (104.0, 1024, 1024),
    ],
)  # fmt: skip
def test_the_published_rule_to_the_letter(kurtosis: float, k2: int, k3: int) -> None:
    assert milo_kurtosis_rank(kurtosis, 16) == k2
    assert milo_kurtosis_rank(kurtosis, 32) == k3


def test_the_published_rule_takes_the_larger_of_gate_and_up(mixtral: Mixtral) -> None:
    graph = mixtral(hidden=4096, inner=4096)
    measured = kurtosis_of(graph, {"expert.gate": 1.0, "expert.up": 3.0, "expert.down": 9.0, "attn.q": 50.0})
    ranks = assign(graph, "dense-5+milo-kurtosis-16", kurtosis=measured)
    by_role = {ref.role: ranks[ref.name] for ref in graph.weights}
    assert by_role == {"attn.q": 5, "attn.k": 5, "attn.v": 5, "attn.o": 5,
                       "expert.gate": 32, "expert.up": 32, "expert.down": 2048}  # fmt: skip


# frequencies


def test_a_frequency_is_a_share_of_the_average(mixtral: Mixtral) -> None:
    graph = mixtral(layers=2, experts=4)
    banks = {"model.layers.0.block_sparse_moe.experts": [10, 20, 30, 40],
             "model.layers.1.block_sparse_moe.experts": [0, 0, 0, 5.0]}  # fmt: skip
    ranks = assign(graph, "frequency-8", frequency=banks)
    found = {(ref.layer, ref.expert): ranks[ref.name] for ref in graph.weights if ref.group == ROUTED}
    # share times 8 x 4, rounded half to even; 32 is below the cap of 128
    assert [found[0, e] for e in range(4)] == [3, 6, 10, 13]
    assert [found[1, e] for e in range(4)] == [0, 0, 0, 32]
    assert {ranks[ref.name] for ref in graph.weights if ref.group != ROUTED} == {0}


def test_missing_evidence_is_told_with_the_way_to_get_it(mixtral: Mixtral) -> None:
    graph = mixtral()
    with pytest.raises(PlanError, match=r"layers\.0\..*experts: no expert frequencies; .* `moepress profile SRC"):
        assign(graph, "frequency-8")
    with pytest.raises(PlanError, match=r"w1\.weight: its kurtosis was not measured"):
        assign(graph, "kurtosis-8")
    short = {ref.bank: [1, 2] for ref in graph.weights if ref.bank}
    with pytest.raises(PlanError, match="2 frequencies summing to 3 do not cover expert 2"):
        assign(graph, "frequency-8", frequency=short)
    with pytest.raises(PlanError, match="summing to 0"):
        assign(graph, "frequency-8", frequency={bank: [0, 0, 0, 0] for bank in short})


# the general kurtosis policy


items = st.lists(
    st.tuples(st.floats(1, 60), st.integers(1, 200), st.integers(1, 5000)), min_size=1, max_size=25
)  # fmt: skip
budgets = st.integers(0, 10**6)


def shares(of: Sequence[tuple[float, int, int]], budget: int) -> list[int]:
    scores, caps, costs = zip(*of, strict=True)
    return distribute(scores, caps, costs, budget)


def spent(of: Sequence[tuple[float, int, int]], ranks: Sequence[int]) -> int:
    return sum(rank * cost for rank, (_, _, cost) in zip(ranks, of, strict=True))


@given(items, budgets)
def test_budget_and_caps_are_kept(of: list[tuple[float, int, int]], budget: int) -> None:
    ranks = shares(of, budget)
    assert spent(of, ranks) <= budget
    assert all(0 <= rank <= cap for rank, (_, cap, _) in zip(ranks, of, strict=True))


@given(items, budgets)
def test_the_budget_is_used_up(of: list[tuple[float, int, int]], budget: int) -> None:
    ranks = shares(of, budget)
    room = [cost for rank, (_, cap, cost) in zip(ranks, of, strict=True) if rank < cap]
    # what is left is less than a rank for each item that could take one
    assert not room or budget - spent(of, ranks) < sum(room)


@given(items, budgets, st.integers(0, 10**5))
def test_a_larger_budget_never_spends_less(of: list[tuple[float, int, int]], budget: int, more: int) -> None:
    assert spent(of, shares(of, budget)) <= spent(of, shares(of, budget + more))


@given(items, budgets)
def test_ranks_are_in_proportion_to_scores(of: list[tuple[float, int, int]], budget: int) -> None:
    ranks = shares(of, budget)
    # one level explains all: rank is between level * score - 1 and level * score + 1, or at its cap
    low = max([(rank - 1) / score for rank, (score, _, _) in zip(ranks, of, strict=True)])
    high = min([(rank + 1) / s for rank, (s, cap, _) in zip(ranks, of, strict=True) if rank < cap], default=low)
    assert low <= high * (1 + 1e-9)


@given(items, budgets, st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_matter(of: list[tuple[float, int, int]], budget: int, random: Any) -> None:
    shuffled = list(of)
    random.shuffle(shuffled)
    one, other = (sorted(zip(each, shares(each, budget), strict=True)) for each in (of, shuffled))
    assert one == other


@given(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=2, max_size=8), budgets, st.randoms(use_true_random=False))
def test_nor_does_it_among_ties(scores: list[float], budget: int, random: Any) -> None:
    of = [(score, 8, 3 + i % 3) for i, score in enumerate(scores)]
    shuffled = list(of)
    random.shuffle(shuffled)
    one, other = (sorted(zip(each, shares(each, budget % 200), strict=True)) for each in (of, shuffled))
    assert one == other


def test_nothing_to_share_among_nobody() -> None:
    assert distribute([], [], [], 100) == []
    assert distribute([1.0, 2.0], [3, 3], [1, 1], 0) == [0, 0]
    assert distribute([1.0, 2.0], [3, 3], [1, 1], 6) == [3, 3]
    assert distribute([1.0, 2.0, 3.0], [9, 9, 9], [1, 1, 1], 12) == [2, 4, 6]


@given(
    st.sampled_from([64, 128, 192]), st.sampled_from([64, 128, 320]), st.sampled_from(FACTOR_BITS),
    st.one_of(st.integers(0, 200), st.floats(0.01, 8).map(lambda x: round(x, 2))), st.data(),
)  # fmt: skip
def test_kurtosis_never_takes_more_bytes_than_sparse(
    mixtral: Mixtral, hidden: int, inner: int, factor_bits: int, amount: float, data: st.DataObject
) -> None:
    graph = mixtral(hidden=hidden, inner=inner)
    draw = st.lists(st.floats(-1.5, 100), min_size=len(graph.weights), max_size=len(graph.weights))
    measured = dict(zip([ref.name for ref in graph.weights], data.draw(draw), strict=True))
    general = assign(graph, f"kurtosis-{amount}", factor_bits, kurtosis=measured)
    plain = assign(graph, f"sparse-{-int(-amount // 1)}", factor_bits)
    assert total(general, graph.weights, factor_bits) <= total(plain, graph.weights, factor_bits)


def test_kurtosis_stays_within_sparse_where_layers_differ_in_size(mixtral: Mixtral) -> None:
    # sparse-100 gives the narrow layer 64 at most; the rest of that must not go to the wide one
    narrow, wide = mixtral(layers=1, hidden=64, inner=64), mixtral(layers=2, hidden=256, inner=256)
    weights = [*narrow.weights, *(ref for ref in wide.weights if ref.layer == 1)]
    measured = {ref.name: 0.0 for ref in weights}
    general = assign_ranks("kurtosis-100", weights, SPEC, 3, Evidence(kurtosis=measured))
    plain = assign_ranks("sparse-100", weights, SPEC, 3, Evidence())
    assert total(general, weights) <= total(plain, weights)


def test_heavy_tails_get_more(mixtral: Mixtral) -> None:
    graph = mixtral(layers=1, hidden=256, inner=512)
    measured = kurtosis_of(graph, {"expert.down": 3.0, "expert.up": 1.0, "expert.gate": -0.5})
    ranks = assign(graph, "kurtosis-10", kurtosis=measured)
    by_role = {ref.role: {ranks[r.name] for r in graph.weights if r.role == ref.role} for ref in graph.weights}
    assert by_role["expert.gate"] == by_role["expert.up"]  # the heavier of the two decides for both
    up, down = max(by_role["expert.up"]), max(by_role["expert.down"])
    assert down == pytest.approx(2 * up, abs=2)
    assert 2 * up + down == pytest.approx(30, abs=2)
    assert by_role["attn.q"] == {0}


def test_light_tails_count_like_normal_ones(mixtral: Mixtral) -> None:
    graph = mixtral()
    light, normal = (assign(graph, "kurtosis-5", kurtosis=kurtosis_of(graph, dict.fromkeys(
        ("expert.gate", "expert.up", "expert.down"), value))) for value in (-1.2, 0.0))  # fmt: skip
    assert light == normal
    assert {normal[ref.name] for ref in graph.weights if ref.group == ROUTED} == {5}
