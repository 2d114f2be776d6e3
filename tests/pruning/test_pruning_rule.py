# SPDX-License-Identifier: Apache-2.0
"""`prune` on its own: how many are kept and which, sums, dtypes, and that the router's order does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.pruning.rule import Rule, WeightRule, prune, rescale

HIDDEN = 4


class Told(WeightRule):
    """Keeps as many as it is told, and remembers what it was given."""

    def __init__(self, keep: Sequence[int]) -> None:
        super().__init__()
        self.keep = torch.tensor(keep)

    def count(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.given = hidden, weights
        return self.keep


class Masked(Rule):
    """Keeps what it is told."""

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert weights.dtype == torch.float32
        return torch.tensor([[False, True, True], [True, False, False]])


@st.composite
def routed(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """ids and weights [T, k] as some router gives them, and how many to keep of each token."""
    tokens, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    experts = draw(st.integers(top_k, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    row = st.lists(st.floats(2**-10, 4, width=16), min_size=top_k, max_size=top_k)
    weights = torch.tensor([draw(row) for _ in range(tokens)]).to(dtype)
    ids = torch.tensor([draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)])
    return ids, weights, [draw(st.integers(1, top_k)) for _ in range(tokens)]


def run(ids: torch.Tensor, weights: torch.Tensor, keep: list[int], renormalises: bool, skips: bool) -> tuple:
    rule = Told(keep)
    return prune(rule, torch.zeros(len(ids), HIDDEN, dtype=weights.dtype), ids, weights, renormalises, skips)


@given(routed(), st.booleans(), st.booleans())
def test_the_largest_weights_are_kept_in_their_places(
    case: tuple[torch.Tensor, torch.Tensor, list[int]], renormalises: bool, skips: bool
) -> None:
    ids, weights, keep = case
    new_ids, new_weights = run(ids, weights, keep, renormalises, skips)
    assert (new_ids.dtype, new_ids.shape) == (ids.dtype, ids.shape)
    assert (new_weights.dtype, new_weights.shape) == (weights.dtype, weights.shape)
    ran = new_weights != 0
    assert ran.sum(-1).tolist() == keep
    for token, own in enumerate(ran):
        kept, dropped = weights[token][own], weights[token][~own]
        assert not len(dropped) or kept.min() >= dropped.max()
    assert torch.equal(new_ids[ran], ids[ran])
    assert torch.equal(new_ids[~ran], torch.full_like(ids[~ran], -1) if skips else ids[~ran])


@given(routed())
def test_sums_are_preserved_where_the_family_renormalises(case: tuple[torch.Tensor, torch.Tensor, list[int]]) -> None:
    ids, weights, keep = case
    _, scaled = run(ids, weights, keep, True, True)
    _, plain = run(ids, weights, keep, False, True)
    ran = plain != 0
    assert torch.equal(plain[ran], weights[ran])
    # each kept weight is rounded once to the router's dtype
    torch.testing.assert_close(
        scaled.double().sum(-1), weights.double().sum(-1), rtol=torch.finfo(weights.dtype).eps, atol=0
    )
    exact = plain.double() * (weights.double().sum(-1) / plain.double().sum(-1)).unsqueeze(-1)
    torch.testing.assert_close(scaled.double(), exact, rtol=torch.finfo(weights.dtype).eps, atol=0)


@given(routed(), st.booleans())
def test_keeping_all_changes_no_bit(case: tuple[torch.Tensor, torch.Tensor, list[int]], renormalises: bool) -> None:
    ids, weights, keep = case
    found = run(ids, weights, [ids.shape[1]] * len(keep), renormalises, True)
    assert torch.equal(found[0], ids) and torch.equal(found[1], weights)


@given(routed(), st.randoms(use_true_random=False), st.booleans())
def test_the_routers_order_plays_no_part(
    case: tuple[torch.Tensor, torch.Tensor, list[int]], random: Random, renormalises: bool
) -> None:
    ids, weights, keep = case
    # equal weights do keep the router's order
    weights = (torch.arange(1, ids.shape[1] + 1) / 4 + weights.float() * 2**-12).expand_as(ids)
    order = list(range(ids.shape[1]))
    random.shuffle(order)
    straight = run(ids, weights, keep, renormalises, True)
    shuffled = run(ids[:, order], weights[:, order], keep, renormalises, True)
    assert torch.equal(straight[0][:, order], shuffled[0])
    torch.testing.assert_close(straight[1][:, order], shuffled[1])


def test_a_rule_may_keep_any_choice() -> None:
    ids, weights = (
        torch.tensor([[7, 2, 9], [1, 3, 5]]),
        torch.tensor([[0.5, 0.25, 0.125], [0.25, 0.25, 0.5]]).bfloat16(),
    )
    new_ids, new_weights = prune(Masked(), torch.zeros(2, HIDDEN), ids, weights, False, True)
    assert new_ids.tolist() == [[-1, 2, 9], [1, -1, -1]]
    assert new_weights.tolist() == [[0.0, 0.25, 0.125], [0.25, 0.0, 0.0]]


def test_the_rule_sees_descending_float32_weights() -> None:
    rule = Told([1])
    hidden = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    prune(rule, hidden, torch.tensor([[5, 0, 3]]), torch.tensor([[0.25, 0.5, 0.125]]).bfloat16(), True, True)
    assert rule.given[0] is hidden
    assert rule.given[1].dtype == torch.float32 and rule.given[1].tolist() == [[0.5, 0.25, 0.125]]


def test_equal_weights_keep_the_routers_order() -> None:
    ids, weights = run(torch.tensor([[7, 2, 9]]), torch.tensor([[0.5, 0.5, 0.5]]), [2], True, True)
    assert ids.tolist() == [[7, 2, -1]] and weights.tolist() == [[0.75, 0.75, 0.0]]


def test_a_token_without_weight_stays_finite() -> None:
    _, weights = run(torch.tensor([[1, 2]]), torch.zeros(1, 2), [1], True, False)
    assert weights.tolist() == [[0.0, 0.0]]


def test_no_token_at_all() -> None:
    ids, weights = run(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3), [], True, True)
    assert ids.shape == weights.shape == (0, 3)


def test_a_soft_mask_has_a_gradient() -> None:
    weights, mask = torch.tensor([[0.2, 0.6, 0.2]]), torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    scaled = rescale(weights, mask, True)
    assert scaled.sum().item() == pytest.approx(1.0)
    scaled[0, 1].backward()
    assert mask.grad is not None and mask.grad[0, 2] < 0 < mask.grad[0, 1]
