# SPDX-License-Identifier: Apache-2.0
"""Selector: what it computes, what the dial and repricing do to it, and how it begins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import PruningError
from moepress.pruning.selector import Selector

HIDDEN = 48


def make(top_k: int, seed: int = 0) -> Selector:
    """One whose costs lie about the price of an expert and differ from token to token."""
    selector = Selector(HIDDEN, top_k)
    selector.initialise(seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed + 1)
        for parameter in (selector.inner_bias, selector.outer, selector.outer_bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
        selector.outer.mul_(3)
    return selector


def tokens(top_k: int, seed: int = 0, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 2)
    weights = torch.rand(count, top_k, generator=generator).sort(dim=-1, descending=True).values
    return torch.randn(count, HIDDEN, generator=generator) * 7, weights / weights.sum(-1, keepdim=True)


cases = st.tuples(st.integers(2, 8), st.integers(0, 100))


@given(cases, st.floats(-1, 8, width=32))
def test_it_is_what_its_docstring_says(case: tuple[int, int], dial: float) -> None:
    top_k, seed = case
    selector, (hidden, weights) = make(top_k, seed).requires_grad_(False), tokens(top_k, seed, count=3)
    selector.dial.fill_(dial)
    for x, w, kept in zip(hidden.double(), weights.double(), selector(hidden, weights).tolist(), strict=True):
        own = {name: parameter.double() for name, parameter in selector.named_parameters()}
        f = torch.cat([own["projection"] @ x / x.square().mean().sqrt(), w.log()])
        inner = own["inner"] @ f + own["inner_bias"]
        z = own["outer"] @ (inner * inner.sigmoid()) + own["outer_bias"]
        costs = [*z.exp().tolist(), 0.0]
        totals = [cost + (1 + dial) * j for j, cost in enumerate(costs, start=1)]
        assert totals[kept - 1] <= min(totals) * (1 + 1e-4) + 1e-5


@given(cases, st.floats(-1, 8, width=32), st.floats(0, 8, width=32))
def test_more_dial_never_keeps_more(case: tuple[int, int], dial: float, more: float) -> None:
    selector, inputs = make(*case), tokens(*case)
    selector.dial.fill_(dial)
    before = selector(*inputs)
    selector.dial.add_(more)
    assert (selector(*inputs) <= before).all()


@given(cases)
def test_free_experts_are_all_kept_and_dear_ones_are_not(case: tuple[int, int]) -> None:
    selector, inputs = make(*case), tokens(*case)
    selector.dial.fill_(-1)
    assert (selector(*inputs) == case[0]).all()
    selector.dial.fill_(1e9)
    assert (selector(*inputs) == 1).all()


@given(cases, st.floats(0.05, 20))
def test_a_dial_and_a_price_are_the_same(case: tuple[int, int], price: float) -> None:
    dialled, repriced, inputs = make(*case), make(*case), tokens(*case)
    dialled.dial.fill_(price - 1)
    repriced.reprice(price)
    # equal but for what rounding does to near ties
    assert (dialled(*inputs) == repriced(*inputs)).float().mean() >= 0.95


def test_scores_are_largest_for_what_is_kept_and_decisions_depend_on_the_token() -> None:
    selector, inputs = make(2), tokens(2)
    scores, kept = selector.scores(*inputs), selector(*inputs)
    assert scores.shape == (64, 2) and scores.dtype == torch.float32
    assert kept.dtype == torch.int64 and torch.equal(scores.argmax(-1) + 1, kept)
    assert len(kept.unique()) == 2


def test_until_it_is_trained_it_keeps_all() -> None:
    assert (Selector(HIDDEN, 4)(*tokens(4)) == 4).all()


def test_it_takes_any_scale_and_dtype_of_hidden_states() -> None:
    selector, (hidden, weights) = make(4), tokens(4)
    exact = selector.log_costs(hidden, weights)
    torch.testing.assert_close(selector.log_costs(hidden * 1000, weights), exact, rtol=1e-4, atol=1e-4)
    half = selector.log_costs(hidden.bfloat16(), weights)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)


def test_weights_of_zero_are_no_trouble() -> None:
    selector, (hidden, weights) = make(4), tokens(4)
    weights[:, 2:] = 0
    assert selector.scores(hidden, weights).isfinite().all()


def test_seeds_make_it_and_settings_make_it_again() -> None:
    first, again, other = Selector(HIDDEN, 3), Selector(**Selector(HIDDEN, 3).settings()), Selector(HIDDEN, 3)
    for selector, seed in ((first, 5), (again, 5), (other, 6)):
        selector.initialise(seed)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.projection, other.projection)


def test_a_layer_has_a_few_thousand_parameters() -> None:
    assert sum(parameter.numel() for parameter in Selector(576, 4).parameters()) < 6000


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PruningError, match="1 expert a token leaves nothing to drop"):
        Selector(HIDDEN, 1)
    with pytest.raises(PruningError, match=r"layer 3 has hidden size 48 and top-2, its selector is made for 48 and"):
        Selector(HIDDEN, 4).check("layer 3", HIDDEN, 2)
