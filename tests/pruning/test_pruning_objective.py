# SPDX-License-Identifier: Apache-2.0
"""What selectors are trained on, against the definitions: candidates, measured costs, drawn choices, divergence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import kl_div, one_hot

from moepress.pruning.attach import attach, detach
from moepress.pruning.objective import (
    candidates,
    cost_loss,
    divergence,
    draw_choice,
    measured_costs,
    mix,
    scores_of,
)
from moepress.pruning.rule import rescale
from moepress.pruning.sites import moe_sites
from tiny import VOCABULARY, tiny_model


def descending(top_k: int, seed: int, tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tokens, top_k, generator=generator) + 0.01).sort(dim=-1, descending=True).values


cases = st.tuples(st.integers(2, 8), st.integers(0, 100))


@given(cases, st.booleans())
def test_candidates_keep_the_first_and_their_sum(case: tuple[int, int], renormalises: bool) -> None:
    weights = descending(*case)
    rows = candidates(weights, renormalises)
    for j, row in enumerate(rows.unbind(1), start=1):
        assert (row[:, :j] > 0).all() and not row[:, j:].any()
        torch.testing.assert_close(row[:, :j] / row[:, :1], weights[:, :j] / weights[:, :1])
        if renormalises:
            torch.testing.assert_close(row.sum(-1), weights.sum(-1))
        else:
            assert torch.equal(row[:, :j], weights[:, :j])
    assert torch.equal(rows[:, -1], weights)


@given(cases, st.booleans())
def test_a_measured_cost_is_half_the_square_of_a_gradient_times_a_change(
    case: tuple[int, int], renormalises: bool
) -> None:
    top_k, seed = case
    weights, generator = descending(*case), torch.Generator().manual_seed(seed)
    outputs = torch.randn(5, top_k, 16, generator=generator)  # of each expert
    gradient = torch.randn(5, 16, generator=generator)
    slopes = torch.einsum("th,tkh->tk", gradient, outputs)
    costs = measured_costs(slopes, weights, renormalises)
    assert costs.shape == (5, top_k)
    for i in range(top_k):
        left = [m for m in range(top_k) if m != i]
        kept = torch.zeros_like(weights)
        kept[:, left] = weights[:, left]
        if renormalises:
            kept = kept * (weights.sum(-1) / kept.sum(-1)).unsqueeze(-1)
        change = torch.einsum("tk,tkh->th", kept - weights, outputs)
        torch.testing.assert_close(costs[:, i], 0.5 * (gradient * change).sum(-1) ** 2, rtol=1e-3, atol=1e-5)


def test_measured_costs_are_the_divergence_that_one_drop_causes() -> None:
    model, place, draws = tiny_model("mixtral", torch.float32, num_experts_per_tok=3), 3, 400
    sites = moe_sites(model)
    with torch.no_grad():
        for parameter in sites[-1].experts.parameters():
            parameter.mul_(0.3)  # small changes, of which the second order is all
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0)).expand(draws, -1)
    seen = []

    def tap(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(weights.detach().requires_grad_())
        return ids, seen[-1]

    attach(model, [lambda hidden, ids, weights: (ids, weights), tap])
    logits = model(ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    detach(model)
    drawn = torch.multinomial(logits.detach().exp(), 1, generator=torch.Generator().manual_seed(1))
    (slopes,) = torch.autograd.grad(-logits.gather(1, drawn).sum(), seen)
    weights, slopes = (each.view(draws, 6, 3)[:, place].detach() for each in (seen[0], slopes))
    predicted = measured_costs(slopes, weights, renormalises=True).mean(0)

    teacher = model(ids[:1], use_cache=False).logits
    for i in range(3):

        def drop(hidden: torch.Tensor, ids: torch.Tensor, own: torch.Tensor, i: int = i) -> tuple:
            kept = torch.ones_like(own)
            kept[place, i] = 0
            return ids, rescale(own, kept, renormalises=True)

        attach(model, [lambda hidden, ids, weights: (ids, weights), drop])
        found = divergence(teacher, model(ids[:1], use_cache=False).logits) * 6
        detach(model)
        # 400 draws of chi^2: a standard error of 7 %
        assert predicted[i] == pytest.approx(found.item(), rel=0.25)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_the_loss_of_costs_is_least_at_their_mean(costs: list[float]) -> None:
    values = torch.tensor(costs, dtype=torch.float64)
    z = values.mean().log().requires_grad_()
    least = cost_loss(z.expand(len(costs)), values)
    (gradient,) = torch.autograd.grad(least, z)
    assert abs(gradient) < 1e-6
    for other in (-1.0, 0.5):
        assert cost_loss((z + other).expand(len(costs)), values) > least


@given(cases)
def test_scores_add_up_what_is_left_out_and_what_is_run(case: tuple[int, int]) -> None:
    top_k, seed = case
    z = torch.randn(5, top_k, generator=torch.Generator().manual_seed(seed)).mul(3).sort(descending=True).values
    for own, found in zip(z.double().exp().tolist(), scores_of(z).tolist(), strict=True):
        assert found == pytest.approx([-(sum(own[j:]) + j) for j in range(1, top_k + 1)], rel=1e-5)
    assert scores_of(torch.full((1, top_k), 1e4)).isfinite().all()


def test_choices_are_drawn_by_their_scores_and_the_softmax_has_the_gradient() -> None:
    scores = torch.tensor([-1.0, -1.5, -0.2, -3.0]).expand(20000, -1).clone().requires_grad_()
    choice = draw_choice(scores, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(choice.detach(), one_hot(choice.argmax(-1), 4).float())
    torch.testing.assert_close(choice.detach().mean(0), scores[0].detach().softmax(-1), rtol=0.05, atol=0.01)
    (gradient,) = torch.autograd.grad(choice[:, 2].sum(), scores)
    assert (gradient[:, 2] >= 0).all() and (gradient[:, [0, 1, 3]] <= 0).all() and gradient.any()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(20000), atol=1e-5, rtol=0)


def test_choices_become_the_likeliest_as_the_temperature_falls_and_repeat_by_seed() -> None:
    scores = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    agree = [
        (draw_choice(scores, temperature, torch.Generator().manual_seed(2)).argmax(-1) == scores.argmax(-1))
        .float().mean().item()
        for temperature in (4.0, 1.0, 0.1, 0.001)
    ]  # fmt: skip
    assert agree == sorted(agree) and agree[-1] > 0.99
    first, again, other = (draw_choice(scores, 1.0, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert draw_choice(torch.tensor([[-torch.inf, 0.0]]), 1.0, torch.Generator()).isfinite().all()


@given(cases, st.booleans())
def test_mixing_gives_the_chosen_candidate_and_the_slope_along_each(case: tuple[int, int], renormalises: bool) -> None:
    top_k, seed = case
    weights, generator = descending(*case), torch.Generator().manual_seed(seed)
    kept = torch.randint(top_k, (5,), generator=generator)
    choice = one_hot(kept, top_k).float().requires_grad_()
    mixed, rows = mix(choice, weights, renormalises), candidates(weights, renormalises)
    torch.testing.assert_close(mixed, rows[torch.arange(5), kept])
    slopes = torch.randn(5, top_k, generator=generator)
    (gradient,) = torch.autograd.grad((mixed * slopes).sum(), choice)
    torch.testing.assert_close(gradient, (rows @ slopes.unsqueeze(-1)).squeeze(-1))


def test_divergence_is_that_of_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 3, 11, generator=generator) for _ in range(2))
    wanted = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(divergence(teacher, student), wanted)
    torch.testing.assert_close(divergence(teacher, teacher + 5), torch.tensor(0.0), atol=1e-6, rtol=0)
