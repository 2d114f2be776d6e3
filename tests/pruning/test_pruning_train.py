# SPDX-License-Identifier: Apache-2.0
"""Training on tiny models: it meets its target, lowers what it costs, repeats by seed, resumes to the same bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import PruningError
from moepress.kernels.selector.reference import worth_running
from moepress.pruning.attach import attach, counting, detach, pruners_of
from moepress.pruning.baselines import Threshold, calibrate, chance_rules
from moepress.pruning.objective import divergence
from moepress.pruning.sites import moe_sites
from moepress.pruning.train import State, Trained, TrainingSettings, price_for, train
from tiny import VOCABULARY, tiny_model

LENGTH = 32
SETTINGS = TrainingSettings(target=0.3, measure_steps=24, distil_steps=12, batch=4, held=256)
SHORT = dataclasses.replace(SETTINGS, measure_steps=3, distil_steps=3, batch=2, held=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe", torch.float32, num_experts_per_tok=3, mlp_only_layers=[]).requires_grad_(False)


def windows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def measured(model: Any, rules: list, ids: torch.Tensor) -> tuple[float, float]:
    """Share dropped and divergence of rules on windows."""
    with torch.no_grad():
        teacher = model(ids, use_cache=False).logits
        attach(model, rules)
        with counting(model, LENGTH) as read:
            student = model(ids, use_cache=False).logits
            dropped = read().dropped
        detach(model)
    return dropped, divergence(teacher, student).item()


def tensors(trained: Trained) -> list[torch.Tensor]:
    return [tensor for selector in trained.selectors for tensor in selector.state_dict().values()]


@pytest.fixture(scope="module")
def trained(model: Any) -> Trained:
    return train(model, windows(SETTINGS.windows), SETTINGS)


def test_the_target_is_met_on_text_that_was_not_trained_on(model: Any, trained: Trained) -> None:
    assert trained.dropped == pytest.approx(SETTINGS.target, abs=0.002)
    dropped, _ = measured(model, trained.selectors, windows(128, seed=2))
    assert dropped == pytest.approx(SETTINGS.target, abs=0.01)


def test_it_costs_less_than_chance_than_the_weights_alone_and_than_less_training(model: Any, trained: Trained) -> None:
    fresh = windows(64, seed=2)
    _, found = measured(model, trained.selectors, fresh)
    _, chance = measured(model, chance_rules(moe_sites(model), SETTINGS.target, strongest=True), fresh)
    assert found < 0.6 * chance
    thresholds = [Threshold() for _ in moe_sites(model)]
    calibrate(model, thresholds, windows(64, seed=3)[:, None], SETTINGS.target, per_layer=False)
    assert found < 0.95 * measured(model, thresholds, fresh)[1]
    # the first step sets each expert's mean cost, and most of what a random model has to tell is in that
    brief, long = (
        train(model, windows(settings.windows), settings).divergence
        for settings in (
            dataclasses.replace(SETTINGS, measure_steps=measure, distil_steps=distil)
            for measure, distil in ((1, 0), (96, 48))
        )
    )
    assert long < 0.95 * brief


@pytest.mark.parametrize("renormalise", [False, True])
def test_weights_take_over_the_sum_or_stay_as_asked(model: Any, renormalise: bool) -> None:
    settings = dataclasses.replace(SHORT, renormalise=renormalise)
    states: list[State] = []
    trained = train(model, windows(settings.windows), settings, save=states.append, save_every=1)
    assert trained.renormalises is renormalise
    assert all(selector.renormalises is renormalise for selector in trained.selectors)
    order = torch.randperm(settings.windows, generator=torch.Generator().manual_seed(settings.seed))
    held = windows(settings.windows)[order[: settings.held]]
    assert measured(model, trained.selectors, held) == pytest.approx((trained.dropped, trained.divergence), rel=1e-4)
    resumed = train(model, windows(settings.windows), settings, state=states[1])
    assert all(torch.equal(a, b) for a, b in zip(tensors(trained), tensors(resumed), strict=True))
    assert resumed.renormalises is renormalise


@pytest.mark.parametrize("slices", [False, True])
def test_what_loses_less_is_taken(slices: bool) -> None:
    """Experts that are one expert are best with the whole sum; those that point apart best with their own shares."""
    torch.manual_seed(0)
    model = tiny_model(
        "qwen3_moe", torch.float32, num_experts_per_tok=3, mlp_only_layers=[], norm_topk_prob=True
    ).requires_grad_(False)
    for site in moe_sites(model):
        down = site.experts.down_proj.data
        down.mul_(20)
        if slices:
            for expert in range(site.num_experts):  # each writes to channels of its own
                down[expert] *= (torch.arange(down.shape[1]) % site.num_experts == expert).unsqueeze(1)
        else:
            down.copy_(down[:1].expand_as(down))
            site.experts.gate_up_proj.data.copy_(
                site.experts.gate_up_proj.data[:1].expand_as(site.experts.gate_up_proj)
            )
    trained = train(model, windows(SHORT.windows), SHORT)
    assert trained.renormalises == (not slices)
    assert all(selector.renormalises == (not slices) for selector in trained.selectors)


def test_a_family_that_does_not_renormalise_is_left_alone(model: Any, trained: Trained) -> None:
    assert not any(site.renormalises for site in moe_sites(model)) and trained.renormalises is None


def test_the_report_is_what_the_rules_do(model: Any, trained: Trained) -> None:
    order = torch.randperm(SETTINGS.windows, generator=torch.Generator().manual_seed(SETTINGS.seed))
    held = windows(SETTINGS.windows)[order[: SETTINGS.held]]
    dropped, cost = measured(model, trained.selectors, held)
    assert (dropped, cost) == pytest.approx((trained.dropped, trained.divergence), rel=1e-4)
    assert trained.parameters == sum(tensor.numel() for tensor in tensors(trained)) - len(trained.selectors)  # dials


def test_the_model_is_left_as_it_was(model: Any, trained: Trained) -> None:
    assert not pruners_of(model)
    assert not any(parameter.requires_grad for selector in trained.selectors for parameter in selector.parameters())


@pytest.mark.parametrize("distil_steps", [0, SHORT.distil_steps])
def test_seeds_decide_everything(model: Any, distil_steps: int) -> None:
    settings = dataclasses.replace(SHORT, distil_steps=distil_steps)
    first, again, other = (
        tensors(train(model, windows(settings.windows), dataclasses.replace(settings, seed=seed))) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_run_continued_from_any_state_ends_in_the_same_bytes(model: Any) -> None:
    states: list[State] = []
    ids = windows(SHORT.windows)
    whole = tensors(train(model, ids, SHORT, save=states.append, save_every=1))
    assert [state["step"] for state in states] == list(range(1, SHORT.steps + 1))
    for state in states:
        resumed = tensors(train(model, ids, SHORT, state=state))
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)), state["step"]


def test_states_are_saved_as_often_as_asked_and_at_the_ends_of_phases(model: Any) -> None:
    states: list[State] = []
    train(model, windows(SHORT.windows), SHORT, save=states.append, save_every=2)
    assert [state["step"] for state in states] == [2, 3, 4, 6]


@given(
    st.lists(st.integers(2, 5), min_size=1, max_size=4),
    st.floats(0.02, 0.45),
    st.floats(-30, 30),
    st.integers(0, 1000),
)
def test_the_price_meets_the_target(top_ks: list[int], target: float, level: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    records = [torch.randn(200, top_k, generator=generator) * 3 + level for top_k in top_ks]
    price = price_for(records, target)
    kept = sum(int(worth_running(z, price).sum()) for z in records)
    offered = sum(200 * top_k for top_k in top_ks)
    assert 1 - kept / offered == pytest.approx(target, abs=2 * max(top_ks) / offered)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 0.0}, "a target of 0 is no share"),
        ({"target": 1.0}, "a target of 1 is no share"),
        ({"measure_steps": 0}, "measure_steps is 0; the least is 1"),
        ({"distil_steps": -1}, "distil_steps is -1; the least is 0"),
        ({"held": 0}, "held is 0; the least is 1"),
        ({"batch": 0}, "batch is 0; the least is 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_what_cannot_be_trained_is_refused(model: Any) -> None:
    with pytest.raises(PruningError, match=r"a target of 0.7 cannot be met: .* less than 0.6667"):
        train(model, windows(SHORT.windows), dataclasses.replace(SHORT, target=0.7))
    with pytest.raises(PruningError, match=r"needs 16 windows of 2 tokens or more, not token ids of shape \(15, 32\)"):
        train(model, windows(15), SHORT)
    with pytest.raises(PruningError, match="leaves nothing to drop"):
        train(tiny_model("mixtral", num_experts_per_tok=1), windows(SHORT.windows), dataclasses.replace(SHORT))
    broken = tiny_model("mixtral", torch.float32)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises((PruningError, RuntimeError)):
        train(broken, windows(SHORT.windows), SHORT)
    with pytest.raises(PruningError, match="the model is in training mode"):
        train(tiny_model("mixtral").train(), windows(SHORT.windows), SHORT)
