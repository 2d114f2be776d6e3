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
from moepress.pruning.sites import moe_sites
from tiny import tiny_model

HIDDEN, EXPERTS = 48, 9
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(seed: int = 0) -> Selector:
    """One whose costs lie about the price of an expert and differ from token to token and expert to expert."""
    selector = Selector(HIDDEN, EXPERTS)
    selector.initialise(seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed + 1)
        selector.sensitivity.copy_(torch.randn(selector.sensitivity.shape, generator=generator) / 2)
        selector.offset.copy_(torch.randn(EXPERTS, generator=generator) + 3)
    return selector


def tokens(top_k: int, seed: int = 0, count: int = 64) -> Inputs:
    generator = torch.Generator().manual_seed(seed + 2)
    weights = torch.rand(count, top_k, generator=generator)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(-1)[:, :top_k]
    return torch.randn(count, HIDDEN, generator=generator) * 7, ids, weights / weights.sum(-1, keepdim=True)


cases = st.tuples(st.integers(2, 8), st.integers(0, 100))


@given(cases, st.floats(-1, 8, width=32))
def test_it_is_what_its_docstring_says(case: tuple[int, int], dial: float) -> None:
    top_k, seed = case
    selector, inputs = make(seed).requires_grad_(False), tokens(top_k, seed, count=3)
    selector.dial.fill_(dial)
    own = {name: parameter.double() for name, parameter in selector.named_parameters()}
    for x, ids, weights, kept in zip(*inputs, selector(*inputs), strict=True):
        f = own["projection"] @ x.double() / x.double().square().mean().sqrt()
        costs = [
            math.exp(own["offset"][e] + own["sensitivity"][e] @ f) * w.item() ** own["power"].item()
            for e, w in zip(ids.tolist(), weights.double(), strict=True)
        ]
        assert kept[costs.index(max(costs))]
        for cost, found in zip(costs, kept.tolist(), strict=True):
            near = abs(cost - (1 + dial)) < 1e-4 * (1 + dial) + 1e-6
            assert near or cost == max(costs) or found == (cost >= 1 + dial)


@given(cases, st.floats(-1, 8, width=32), st.floats(0, 8, width=32))
def test_more_dial_never_keeps_more(case: tuple[int, int], dial: float, more: float) -> None:
    selector, inputs = make(case[1]), tokens(*case)
    selector.dial.fill_(dial)
    before = selector(*inputs)
    selector.dial.add_(more)
    assert (selector(*inputs) <= before).all()


@given(cases)
def test_free_experts_are_all_kept_and_dear_ones_are_not(case: tuple[int, int]) -> None:
    selector, inputs = make(case[1]), tokens(*case)
    selector.dial.fill_(-1)
    assert selector(*inputs).all()
    selector.dial.fill_(1e9)
    assert (selector(*inputs).sum(-1) == 1).all()


@given(cases, st.floats(0.05, 20))
def test_a_dial_and_a_price_are_the_same(case: tuple[int, int], price: float) -> None:
    dialled, repriced, inputs = make(case[1]), make(case[1]), tokens(*case)
    dialled.dial.fill_(price - 1)
    repriced.reprice(price)
    # equal but for what rounding does to near ties
    assert (dialled(*inputs) == repriced(*inputs)).float().mean() >= 0.95


def test_decisions_depend_on_the_token_the_expert_and_the_weight() -> None:
    selector, (hidden, ids, weights) = make(), tokens(4)
    kept = selector(hidden, ids, weights)
    assert kept.dtype == torch.bool and kept.shape == (64, 4) and len(kept.sum(-1).unique()) > 2
    for others in ((hidden.flip(0), ids, weights), (hidden, (ids + 1) % EXPERTS, weights), (hidden, ids, weights**2)):
        assert not torch.equal(selector(*others), kept)


def test_the_routers_order_plays_no_part() -> None:
    selector, (hidden, ids, weights) = make(), tokens(4)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(selector(hidden, ids[:, order], weights[:, order]), selector(hidden, ids, weights)[:, order])


def test_until_it_is_trained_it_keeps_all() -> None:
    assert Selector(HIDDEN, EXPERTS)(*tokens(4)).all()


def test_it_takes_any_scale_and_dtype_of_hidden_states_and_ids() -> None:
    selector, (hidden, ids, weights) = make(), tokens(4)
    exact = selector.log_costs(hidden, ids, weights)
    torch.testing.assert_close(selector.log_costs(hidden * 1000, ids, weights), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(selector.log_costs(hidden, ids.int(), weights), exact)
    half = selector.log_costs(hidden.bfloat16(), ids, weights)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)


def test_weights_of_zero_are_no_trouble() -> None:
    selector, (hidden, ids, weights) = make(), tokens(4)
    weights[:, 2:] = 0
    assert selector.log_costs(hidden, ids, weights).isfinite().all()
    assert not selector(hidden, ids, weights)[:, 2:].any()


def test_it_begins_at_each_experts_mean_as_far_as_it_is_known() -> None:
    selector, sizes = make(), torch.linspace(0.5, 5, EXPERTS)
    ids = torch.arange(EXPERTS - 1).repeat(4000).view(-1, 4)  # the last expert is never seen
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    costs = sizes[ids] * weights**2
    selector.begin_at(ids, weights, costs)
    torch.testing.assert_close(selector.offset[:-1].exp().detach(), sizes[:-1], rtol=0.1, atol=0.0)
    assert selector.offset[-1].exp().item() == pytest.approx((costs.sum() / (weights**2).sum()).item(), rel=1e-4)
    selector.begin_at(ids, weights, torch.zeros_like(costs))
    assert selector.offset.isfinite().all()


def test_seeds_make_it_and_settings_make_it_again() -> None:
    first, other = Selector(HIDDEN, EXPERTS), Selector(HIDDEN, EXPERTS)
    again = Selector(**first.settings())
    for selector, seed in ((first, 5), (again, 5), (other, 6)):
        selector.initialise(seed)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.projection, other.projection)


def test_a_layer_has_a_few_thousand_parameters() -> None:
    assert sum(parameter.numel() for parameter in Selector(576, 8).parameters()) < 5000


def test_what_does_not_fit_is_refused() -> None:
    site = moe_sites(tiny_model("mixtral"))[0]
    Selector(site.hidden_size, site.num_experts).check(site)
    message = rf"hidden size {site.hidden_size} and {site.num_experts} experts, its selector is made for 48 and 9"
    with pytest.raises(PruningError, match=message):
        Selector(HIDDEN, EXPERTS).check(site)
