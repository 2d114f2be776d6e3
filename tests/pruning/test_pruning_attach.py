# SPDX-License-Identifier: Apache-2.0
"""Pruned models of every family, compressed or not: the logits, what is counted, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import moepress
from moepress.errors import CheckpointError, PruningError
from moepress.pruning.attach import attach, counting, detach, disabled, is_pruned, pruners_of, rules_of
from moepress.pruning.baselines import Chance, Threshold
from moepress.pruning.rule import Rule, WeightRule, prune
from moepress.pruning.sites import moe_sites
from moepress.runtime.experts import ExpertBank
from tiny import EXPERTS, NATIVE, tiny_model, tokens

TOP_K = 3
MU = 0.6
"""Keeps all three degrees of these models' tokens: 1, 2 and 3 experts."""
RENORMALISES = {"mixtral": True, "granitemoe": True, "deepseek_v2": False}
"""Families in which norm_topk_prob plays no part."""


def wider(family: str) -> dict[str, int]:
    """For a tiny model with three experts a token; deepseek_v2 takes them from both groups then."""
    return {"num_experts_per_tok": TOP_K} | ({"topk_group": 2} if family == "deepseek_v2" else {})


class Fixed(WeightRule):
    """Keeps `keep` of every token."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def count(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.full((len(weights),), self.keep)


def load(folder: Path, cls: Any = AutoModelForCausalLM) -> Any:
    return cls.from_pretrained(folder, dtype=torch.float32)


def thresholds(model: Any, mu: float = MU) -> list[Rule]:
    return [Threshold(mu) for _ in moe_sites(model)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens())[0]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def by_hand(weights: list[float], mu: float, renormalises: bool) -> list[float]:
    """A token's routing weights as the threshold rule leaves them."""
    kept = [weight if weight >= mu * max(weights) else 0.0 for weight in weights]
    return [weight * sum(weights) / sum(kept) for weight in kept] if renormalises else kept


@contextmanager
def zeroed(model: Any, mu: float, renormalises: bool) -> Iterator[list[int]]:
    """The model with routing weights changed by `by_hand`, ids as they are; yields how many of each token are left."""
    left: list[int] = []

    def change(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        new = [by_hand(row, mu, renormalises) for row in args[2].tolist()]
        left.extend(sum(weight > 0 for weight in row) for row in new)
        return *args[:2], torch.tensor(new, dtype=args[2].dtype)

    handles = [site.experts.register_forward_pre_hook(change) for site in moe_sites(model)]
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """ids and weights [T, k] that each experts module gets."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        site.experts.register_forward_pre_hook(lambda _, args: seen.append((args[1].clone(), args[2].clone())))
        for site in moe_sites(model)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def folders(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """folders(family, compressed) -> a checkpoint with three experts a token. Never write into it."""
    made: dict[str, Path] = {}

    def get(family: str, compressed: bool) -> Path:
        source = tiny(family, **wider(family))
        if not compressed:
            return source
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "pressed"
            moepress.compress_checkpoint(source, made[family], moepress.Settings(method="rtn", group_size=32))
        return made[family]

    return get


Folders = Callable[[str, bool], Path]


# ---------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("family", NATIVE)
def test_sites_are_what_the_routers_do(family: str, norm_topk_prob: bool) -> None:
    model = tiny_model(family, torch.float32, norm_topk_prob=norm_topk_prob, **wider(family))
    sites = moe_sites(model)
    assert len(sites) == sum(hasattr(module, "experts") for module in model.modules())
    assert [site.name for site in sites] == sorted(site.name for site in sites)
    with watched(model) as seen:
        logits(model)
    for site, (ids, weights) in zip(sites, seen, strict=True):
        assert (site.top_k, site.num_experts, site.hidden_size) == (ids.shape[1], EXPERTS, 64)
        assert site.block.experts is site.experts and site.block in site.layer.children() and not site.skips
        sums = weights.sum(-1)
        assert site.renormalises == bool(((sums - sums[0]).abs() < 1e-5).all()), sums
        assert site.renormalises == RENORMALISES.get(family, norm_topk_prob)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_names_are_those_of_the_files(folders: Folders, family: str) -> None:
    names = [site.name for site in moe_sites(load(folders(family, True)))]
    config = AutoConfig.from_pretrained(folders(family, True)).quantization_config
    assert names == list(config["banks"])
    assert [site.name for site in moe_sites(load(folders(family, True), AutoModel))] == names


def test_a_model_without_experts_has_no_site() -> None:
    with pytest.raises(PruningError, match="no layer with routed experts"):
        moe_sites(tiny_model("qwen3_moe", mlp_only_layers=[0, 1]))
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        moe_sites(AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
        )))  # fmt: skip


# ---------------------------------------------------------------------------------------------- what runs


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("family", NATIVE)
def test_the_logits_are_those_of_zeroed_weights(folders: Folders, family: str, compressed: bool) -> None:
    model = load(folders(family, compressed))
    whole = logits(model)
    renormalises = moe_sites(model)[0].renormalises
    with zeroed(model, MU, renormalises) as left:
        wanted = logits(model)
    assert len(set(left)) > 1 and not close(wanted, whole, 1e-3)
    attach(model, thresholds(model))
    with watched(model) as seen, counting(model, 9) as read:
        found = logits(model)
        counts = read()
    assert close(found, wanted)
    assert torch.bincount(torch.tensor(left), minlength=TOP_K + 1).tolist() == counts.tokens_by_kept.sum(0).tolist()
    for site, (ids, weights) in zip(moe_sites(model), seen, strict=True):
        assert isinstance(site.experts, ExpertBank) == compressed == site.skips
        assert torch.equal(ids == -1, weights == 0) if compressed else bool((ids >= 0).all())
    detach(model)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_a_rule_may_differ_from_its_family(folders: Folders, family: str, renormalises: bool) -> None:
    model = load(folders(family, True))
    with zeroed(model, MU, renormalises):
        wanted = logits(model)
    rules = thresholds(model)
    for rule in rules:
        rule.renormalises = renormalises
    attach(model, rules)
    assert close(logits(model), wanted)
    if moe_sites(model)[0].renormalises != renormalises:
        for rule in rules:
            rule.renormalises = None
        assert not close(logits(model), wanted, 1e-3)


@pytest.mark.parametrize("family", NATIVE)
def test_scaled_sums_stay(folders: Folders, family: str) -> None:
    """The routed scaling factor, 1.5 in tiny deepseek_v3, is part of the sum."""
    model = load(folders(family, True))
    with watched(model) as before:
        logits(model)
    attach(model, [Fixed(1) for _ in moe_sites(model)])
    with watched(model) as after:
        logits(model)
    # the first layer's routing is that of the unpruned model
    (_, whole), (_, one) = before[0], after[0]
    largest = whole.max(-1).values
    wanted = whole.sum(-1) if moe_sites(model)[0].renormalises else largest
    torch.testing.assert_close(one.sum(-1), wanted)
    assert family != "deepseek_v3" or torch.allclose(wanted, torch.tensor(1.5))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_one_expert_a_token_cannot_be_pruned(family: str) -> None:
    model = tiny_model(family, torch.float32, num_experts_per_tok=1)
    whole = logits(model)
    attach(model, thresholds(model, 9.0))
    assert torch.equal(logits(model), whole)


def test_a_function_can_stand_for_a_rule(folders: Folders) -> None:
    model = load(folders("qwen2_moe", True))
    rules = thresholds(model)
    sites = moe_sites(model)
    functions = [
        lambda *args, rule=rule, site=site: prune(rule, *args, renormalises=site.renormalises, skips=site.skips)
        for rule, site in zip(rules, sites, strict=True)
    ]
    attach(model, functions)
    found = logits(model)
    assert detach(model) == functions and rules_of(model) == []
    attach(model, rules)
    assert torch.equal(logits(model), found)


def test_a_gradient_reaches_a_function(folders: Folders) -> None:
    model = load(folders("mixtral", False)).requires_grad_(False)
    scale = torch.ones((), requires_grad=True)
    attach(model, [lambda hidden, ids, weights: (ids, weights * scale)] * 2)
    model(tokens(), labels=tokens()).loss.backward()
    assert scale.grad is not None and scale.grad.abs() > 0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "granitemoe"])
def test_generate_with_a_static_cache(folders: Folders, family: str) -> None:
    model = load(folders(family, True))
    attach(model, thresholds(model))
    arguments = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 8, "min_new_tokens": 8,
                 "do_sample": False}  # fmt: skip
    with counting(model, 99) as read:
        wanted = model.generate(tokens(), **arguments)
        first = read()
    with counting(model, 99) as read:
        found = model.generate(tokens(), **arguments, cache_implementation="static")
        second = read()
    assert torch.equal(found, wanted) and found.shape == (2, 17)
    assert torch.equal(first.kept_at, second.kept_at) and torch.equal(first.tokens_at, second.tokens_at)
    # the last token that is written is not run
    assert first.tokens_at.tolist() == [[2] * 16 + [0] * 83] * len(first.names)
    whole = model.generate(tokens(), **arguments, use_cache=False)
    assert torch.equal(whole, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_compiled_blocks_give_the_same(folders: Folders, compressed: bool) -> None:
    torch._dynamo.reset()
    model = load(folders("olmoe", compressed))
    attach(model, thresholds(model))
    block = moe_sites(model)[0].block
    compiled = torch.compile(block, backend="aot_eager")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
        pruned = block(x)
        with disabled(model):
            assert torch.equal(compiled(x), block(x)) and not torch.equal(block(x), pruned)
        moepress.set_pruning_dial(model, 9.0)
        assert torch.equal(compiled(x), block(x)) and not torch.equal(block(x), pruned)
        moepress.set_pruning_dial(model, 0.0)
        with counting(model, 9) as read:
            compiled(x)
            once = read().tokens_by_kept
            block(x)
            assert torch.equal(read().tokens_by_kept, 2 * once) and once[0].sum() == 10


def test_pruning_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    rule = Threshold(MU)
    hidden, weights = torch.randn(5, 64), torch.rand(5, TOP_K, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(EXPERTS, (5, TOP_K))
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(rule, hidden, ids, weights, True, True), prune(rule, hidden, ids, weights, True, True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---------------------------------------------------------------------------------------------- counting


def test_counts_by_layer_and_by_position(folders: Folders) -> None:
    model = load(folders("mixtral", True))
    attach(model, thresholds(model))
    with watched(model) as seen, counting(model, 6) as read:
        logits(model)
        counts = read()
        logits(model)
        assert torch.equal(read().kept_at, 2 * counts.kept_at)
    ran = [(ids >= 0).sum(-1).view(2, 9) for ids, _ in seen[:2]]
    assert counts.names == tuple(site.name for site in moe_sites(model)) and counts.top_k == TOP_K
    assert counts.per_layer.tolist() == pytest.approx([each.double().mean().item() for each in ran])
    assert counts.kept_at.tolist() == [each.sum(0)[:6].tolist() for each in ran]  # the rest is beyond
    assert counts.tokens_at.tolist() == [[2] * 6] * 2
    assert counts.per_position.tolist() == pytest.approx(torch.stack(ran).double().mean((0, 1))[:6].tolist())
    assert counts.per_token == pytest.approx(torch.stack(ran).double().mean().item())
    assert counts.dropped == pytest.approx(1 - counts.per_token / TOP_K)
    assert all(not dict(pruner.named_buffers()) for pruner in pruners_of(model).values())


def test_what_is_left_padded_keeps_its_positions(folders: Folders) -> None:
    model = load(folders("qwen2_moe", True))
    attach(model, thresholds(model))
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    with counting(model, 9) as read:
        model.generate(tokens(), attention_mask=mask, max_new_tokens=1, do_sample=False)
        counts = read()
    assert counts.tokens_at.sum() == 18 and counts.tokens_at[0, 6:].tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize("compressed", [False, True])
def test_the_model_itself_is_not_disturbed(folders: Folders, compressed: bool) -> None:
    model = load(folders("granitemoe", compressed))
    before, parameters = model.state_dict(), [name for name, _ in model.named_parameters()]
    attach(model, thresholds(model))
    after = model.state_dict()
    assert list(after) == list(before) and [name for name, _ in model.named_parameters()] == parameters
    assert model.load_state_dict(after).missing_keys == []
    assert is_pruned(model) and len(rules_of(model)) == len(moe_sites(model))
    detach(model)
    assert not is_pruned(model) and detach(model) == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rules_keep_their_dtype(folders: Folders) -> None:
    model = load(folders("mixtral", True))
    attach(model, [Chance(64, TOP_K, 0.3) for _ in moe_sites(model)])
    model.bfloat16()
    assert {buffer.dtype for rule in rules_of(model) for buffer in rule.buffers()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_rules_are_where_offloaded_experts_run(folders: Folders) -> None:
    model = load(folders("olmoe", False))
    attach(model, thresholds(model))
    wanted = logits(model)
    detach(model)
    cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"), offload_buffers=True)
    experts = moe_sites(model)[1].experts
    assert next(chain(experts.parameters(), experts.buffers())).is_meta
    attach(model, thresholds(model))
    assert torch.equal(logits(model), wanted)


def test_copies_have_rules_of_their_own(folders: Folders) -> None:
    model = load(folders("qwen3_moe", True))
    whole = logits(model)
    attach(model, thresholds(model))
    pruned = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        moepress.set_pruning_dial(other, -1.0)
        assert torch.equal(logits(other), whole) and torch.equal(logits(model), pruned)
        moepress.set_pruning_dial(other, 0.0)
        assert torch.equal(logits(other), pruned)
        detach(other)
        assert torch.equal(logits(other), whole) and torch.equal(logits(model), pruned)


def test_the_dial_and_the_switch(folders: Folders) -> None:
    model = load(folders("mixtral", True))
    whole = logits(model)
    attach(model, thresholds(model))
    pruned, ran = logits(model), []
    for dial in (-1.0, -0.2, 0.0, 0.2, 1.0):
        moepress.set_pruning_dial(model, dial)
        with counting(model, 9) as read:
            logits(model)
            ran.append(read().per_token)
    assert ran == sorted(ran, reverse=True) and ran[0] == TOP_K and ran[-1] == 1
    moepress.set_pruning_dial(model, 0.0)
    with disabled(model):
        assert torch.equal(logits(model), whole)
        with disabled(model):
            pass
        assert torch.equal(logits(model), whole)
    assert torch.equal(logits(model), pruned)


# ---------------------------------------------------------------------------------------------- refusals


def test_what_is_refused(folders: Folders) -> None:
    model = load(folders("mixtral", True))
    with pytest.raises(PruningError, match="1 rules for a model with 2 layers"):
        attach(model, [Threshold()])
    with pytest.raises(PruningError, match="hidden size 64 and top-3, its rule is made for 32 and top-3"):
        attach(model, [Threshold(), Chance(32, TOP_K, 0.1)])
    assert not is_pruned(model)
    for refused in (lambda: moepress.set_pruning_dial(model, 1.0), lambda: counting(model, 9).__enter__()):
        with pytest.raises(PruningError, match="has no rules"):
            refused()
    attach(model, thresholds(model))
    with pytest.raises(PruningError, match="pruned already"):
        attach(model, thresholds(model))
    with torch.device("meta"):
        skeleton = tiny_model("mixtral")
    with pytest.raises(PruningError, match="on the meta device; load the model"):
        attach(skeleton, thresholds(model))
