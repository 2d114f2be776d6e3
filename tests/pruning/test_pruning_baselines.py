# SPDX-License-Identifier: Apache-2.0
"""ODP, its threshold and chance, each beside loops that follow the paper word by word, and calibration's promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moepress.errors import PruningError
from moepress.pruning.attach import attach, counting, is_pruned
from moepress.pruning.baselines import (
    Chance,
    Odp,
    Threshold,
    attention_received,
    calibrate,
    chance_rules,
    threshold_for,
)
from moepress.pruning.sites import moe_sites
from tiny import VOCABULARY, tiny_model, tokens

TOP_K = 3
WINDOWS = torch.randint(3, VOCABULARY, (6, 1, 50), generator=torch.Generator().manual_seed(7))


def model_of(family: str = "mixtral", **overrides: Any) -> Any:
    return tiny_model(family, torch.float32, num_experts_per_tok=TOP_K, **overrides)


def dropped(model: Any, windows: torch.Tensor = WINDOWS) -> list[float]:
    """The share of activations that each layer drops on `windows`."""
    with torch.no_grad(), counting(model, windows.shape[-1]) as read:
        for ids in windows:
            model(ids, use_cache=False)
        return (1 - read().per_layer / read().top_k).tolist()


# ---------------------------------------------------------------------------------------------- threshold


@given(st.lists(st.tuples(st.floats(0.5, 1), st.floats(2**-6, 0.5)), min_size=1, max_size=9), st.floats(0, 1, width=32))
def test_two_experts_are_the_papers_rule(pairs: list[tuple[float, float]], mu: float) -> None:
    weights = torch.tensor(pairs)
    keep = Threshold(mu).count(torch.zeros(len(pairs), 4), weights)
    assert keep.dtype == torch.int64
    assert keep.tolist() == [1 if second / first < torch.tensor(mu) else 2 for first, second in weights]


def test_a_threshold_keeps_all_until_it_is_set() -> None:
    assert Threshold().count(torch.zeros(1, 4), torch.tensor([[1.0, 0.0]])).tolist() == [2]
    assert Threshold(0.5).count(torch.zeros(1, 4), torch.zeros(1, 2)).tolist() == [1]


@given(st.integers(1, 40), st.integers(1, 4), st.floats(0, 1), st.randoms(use_true_random=False))
def test_a_threshold_for_a_share(tokens: int, others: int, target: float, random: Any) -> None:
    ratios = torch.tensor([[random.random() for _ in range(others)] for _ in range(tokens)])
    ratios[random.randrange(tokens)] = math.inf
    offered = tokens * (others + 1)
    count = round(target * offered)
    if count > ratios.isfinite().sum():
        with pytest.raises(PruningError, match="this rule can drop 0 to"):
            threshold_for(ratios.flatten(), offered, target)
    else:
        mu = threshold_for(ratios.flatten(), offered, target)
        below = int((ratios < mu).sum())
        assert below <= count <= int((ratios <= mu).sum())
        assert below == count or len(set(ratios.flatten().tolist())) < ratios.numel()


def test_all_that_can_be_dropped() -> None:
    assert threshold_for(torch.tensor([0.5, 0.25, 1.0, 0.75]), 6, 2 / 3) == math.inf


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("target", [0.0, 0.2, 0.45])
def test_calibration_meets_the_target(per_layer: bool, target: float) -> None:
    model = model_of()
    rules = [Threshold() for _ in moe_sites(model)]
    calibrate(model, rules, WINDOWS, target, per_layer=per_layer)
    assert not is_pruned(model)
    attach(model, rules)
    shares = dropped(model)
    assert sum(shares) / len(shares) == pytest.approx(target, abs=0.01)
    assert (len({rule.mu.item() for rule in rules}) == 1) == (not per_layer)
    if per_layer:
        # what the first layer sees does not depend on any rule
        assert shares[0] == pytest.approx(target, abs=1 / WINDOWS.numel() / TOP_K)
        assert shares[1] == pytest.approx(target, abs=0.01)


def test_a_quarter_of_two_experts_is_the_papers_median() -> None:
    model = tiny_model("mixtral", torch.float32)
    rules = [Threshold() for _ in moe_sites(model)]
    calibrate(model, rules, WINDOWS, 0.25, passes=1)
    ratios: list[list[float]] = [[], []]
    for site, own in zip(moe_sites(model), ratios, strict=True):
        site.experts.register_forward_pre_hook(
            lambda _, args, own=own: own.extend((args[2].min(-1).values / args[2].max(-1).values).tolist())
        )
    with torch.no_grad():
        for ids in WINDOWS:
            model(ids, use_cache=False)
    for rule, own in zip(rules, ratios, strict=True):
        below = sum(ratio < rule.mu.item() for ratio in own)
        assert below == len(own) // 2 and rule.mu.item() >= median(own)


def test_a_share_that_cannot_be_dropped_is_refused() -> None:
    model = model_of()
    rules = [Threshold() for _ in moe_sites(model)]
    with pytest.raises(PruningError, match=r"a share of 0\.7 cannot be dropped here; this rule can drop 0 to 0\.6667"):
        calibrate(model, rules, WINDOWS, 0.7)
    assert not is_pruned(model)


# ---------------------------------------------------------------------------------------------- ODP


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe"])
def test_odp_protects_what_equation_6_says(family: str) -> None:
    model = model_of(family, attn_implementation="eager")
    sites, length, protected = moe_sites(model), 9, 3
    attach(model, [Odp(mu=2.0, protected=protected / length - 0.01) for _ in sites])  # all others keep one expert
    inputs: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for site in sites:
        site.block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        site.experts.register_forward_pre_hook(lambda _, args: kept.append((args[2] != 0).sum(-1).view(2, length)))
    with torch.no_grad():
        maps = model(tokens(), use_cache=False, output_attentions=True).attentions
    for site, hidden, found in zip(sites, inputs, kept, strict=True):
        attention = maps[int(site.name.split(".")[2])]
        for sequence in range(2):
            importance = []
            for j in range(length):
                column = sum(attention[sequence, :, i, j].mean().item() for i in range(j, length))
                importance.append(hidden[sequence, j].abs().sum().item() * column / (length - j))
            first = sorted(range(length), key=lambda j: -importance[j])[:protected]
            assert found[sequence].tolist() == [TOP_K if j in first else 1 for j in range(length)]


def test_what_a_token_receives_is_a_mean_over_those_that_see_it() -> None:
    uniform = torch.ones(1, 2, 4, 4).tril() / torch.arange(1, 5)[:, None]
    received = attention_received(uniform)
    assert received[0].tolist() == pytest.approx([sum(1 / (i + 1) for i in range(j, 4)) / (4 - j) for j in range(4)])
    with pytest.raises(PruningError, match="2 queries see 5 keys"):
        attention_received(torch.ones(1, 1, 2, 5))


def test_odp_decodes_by_the_ratio_alone() -> None:
    model = model_of(attn_implementation="eager")
    attach(model, [Odp(mu=2.0, protected=1.0) for _ in moe_sites(model)])
    with counting(model, 20) as read:
        model.generate(tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=4, min_new_tokens=4)
        counts = read()
    # the prompt is protected as a whole, what is written then is not
    assert counts.per_position[:12].tolist() == [TOP_K] * 9 + [1] * 3


def test_odp_meets_its_target_with_protection() -> None:
    model = model_of(attn_implementation="eager")
    rules = [Odp() for _ in moe_sites(model)]
    calibrate(model, rules, WINDOWS, 0.3)
    attach(model, rules)
    assert dropped(model) == pytest.approx([0.3, 0.3], abs=0.01)
    assert math.ceil(rules[0].protected * WINDOWS.shape[-1]) == 1


def test_odp_without_attention_maps_says_what_to_do() -> None:
    model = model_of(attn_implementation="sdpa")
    attach(model, [Odp() for _ in moe_sites(model)])
    with pytest.raises(PruningError, match="attn_implementation='eager', or use the threshold"):
        model(tokens())


# ---------------------------------------------------------------------------------------------- chance


@pytest.mark.parametrize("strongest", [False, True])
@pytest.mark.parametrize(("top_k", "share"), [(2, 0.3), (4, 0.3), (4, 0.75), (3, 0.0), (1, 0.0)])
def test_chance_drops_its_share(top_k: int, share: float, strongest: bool) -> None:
    rule = Chance(64, top_k, share, strongest)
    hidden = torch.randn(4000, 64, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(4000, top_k).sort(descending=True).values
    kept = rule.kept(hidden, weights)
    assert torch.equal(kept, rule(hidden, torch.zeros_like(weights), weights)) and kept.any(-1).all()
    assert 1 - kept.double().mean().item() == pytest.approx(share, abs=0.015)
    if strongest:
        assert torch.equal(kept, kept.cummin(-1).values)
    else:
        assert kept.double().mean(0).tolist() == pytest.approx([1 - share] * top_k, abs=0.03)


def test_chance_is_a_function_of_seed_and_token() -> None:
    hidden, weights = torch.randn(100, 64).bfloat16(), torch.rand(100, 4)
    first, again, other = (Chance(64, 4, 0.3, seed=seed).kept(hidden, weights) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    order = torch.randperm(100)
    assert torch.equal(Chance(64, 4, 0.3, seed=1).kept(hidden[order], weights), first[order])


def test_a_share_for_chance_that_leaves_no_expert_is_refused() -> None:
    with pytest.raises(PruningError, match=r"a share of 0\.6 cannot be dropped: 2 experts a token allow 0 to 0\.5"):
        Chance(64, 2, 0.6)


def test_chance_in_a_model(pressed: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pressed("mixtral", method="rtn"), dtype=torch.float32)
    rules = chance_rules(moe_sites(model), 0.25, seed=3)
    assert len({rule.seed for rule in rules}) == 2
    attach(model, rules)
    assert dropped(model) == pytest.approx([0.25, 0.25], abs=0.06)
