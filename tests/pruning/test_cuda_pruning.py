# SPDX-License-Identifier: Apache-2.0
"""Pruned models on a GPU: ids of -1 in the kernels, static caches, CUDA graphs, and the dial inside of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

import moepress
from moepress.kernels import registry
from moepress.pruning.attach import Counts, attach, counting, detach, disabled, rules_of
from moepress.pruning.baselines import Threshold
from moepress.pruning.rule import Rule
from moepress.pruning.selector import Selector
from moepress.pruning.sites import moe_sites
from moepress.pruning.stored import publish_pruned
from moepress.runtime.experts import ExpertBank
from moepress.runtime.router import routers_of
from tiny import NATIVE, ROUTED, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
MU = 0.6
COMPILED = ("qwen3_moe", "deepseek_v3")
"""Families that are compiled as well; each takes a minute."""


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)


def load(folder: Path, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)


def selectors(model: Any) -> list[Rule]:
    """Random ones, which keep one expert of some tokens and two of others."""
    made: list[Rule] = []
    for number, site in enumerate(moe_sites(model)):
        rule, generator = Selector(site.hidden_size, site.num_experts), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in rule.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.append(rule)
    return made


def thresholds(model: Any) -> list[Rule]:
    return [Threshold(MU) for _ in moe_sites(model)]


RULES = pytest.mark.parametrize("make", [thresholds, selectors])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens().to(model.device)).logits.double().cpu()


class Generated(NamedTuple):
    tokens: torch.Tensor
    """[2, 21]: nine given and twelve new."""
    logits: torch.Tensor
    """float32 [2, 12, vocabulary]."""
    counts: Counts


def generate(model: Any, **arguments: Any) -> Generated:
    ids = tokens().cuda()
    with counting(model, 32) as read:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **arguments,
        )  # fmt: skip
        return Generated(found.sequences.cpu(), torch.stack(found.logits, 1).float().cpu(), read())


def check_same(found: Generated, wanted: Generated) -> None:
    """The same tokens and decisions; a sequence may part where the two best tokens were as good as equal."""
    if torch.equal(found.tokens, wanted.tokens):
        assert torch.equal(found.counts.kept_at, wanted.counts.kept_at)
    assert torch.equal(found.counts.tokens_at, wanted.counts.tokens_at)
    for one, other, logits in zip(found.tokens[:, 9:], wanted.tokens[:, 9:], wanted.logits, strict=True):
        for step in (one != other).nonzero()[:1, 0].tolist():
            best = logits[step].topk(2).values
            assert best[0] - best[1] < 0.02 * logits[step].abs().max(), f"parted at step {step}"


@RULES
@pytest.mark.parametrize("family", NATIVE)
def test_kernels_skip_what_is_dropped(
    pressed: Callable[..., Path], family: str, make: Callable[[Any], list[Rule]]
) -> None:
    """The same routing through kernels as ids of -1 and as weights of 0 gives the same sums."""
    model = load(pressed(family, method="rtn", group_size=32))
    attach(model, make(model))
    site = moe_sites(model)[0]
    assert isinstance(site.experts, ExpertBank)
    x = torch.randn(7, site.hidden_size, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    ids = torch.stack([torch.randperm(site.num_experts, device="cuda")[: site.top_k] for _ in range(7)])
    weights = torch.rand(7, site.top_k, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    with torch.no_grad():
        new_ids, new_weights = site.experts.pruner(x, ids, weights)
        assert (new_ids == -1).any() and torch.equal(new_ids == -1, new_weights == 0)
        found = site.experts(x, ids, weights)
        detach(model)
        assert torch.equal(site.experts(x, new_ids, new_weights), found)
        wanted = site.experts(x, ids, new_weights)
    assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()


@RULES
def test_the_device_decides_as_the_cpu_does(pressed: Callable[..., Path], make: Callable[[Any], list[Rule]]) -> None:
    model = load(pressed("mixtral", method="rtn", group_size=32), "cpu", torch.float32)
    for rule in make(model):
        routed = torch.randn(500, 64), torch.rand(500, 4).argsort(-1)[:, :2], torch.rand(500, 2)
        on_cpu = rule(*routed)
        rule.cuda()
        assert (rule(*(each.cuda() for each in routed)).cpu() == on_cpu).double().mean() > 0.99


@pytest.mark.parametrize("family", ROUTED)
def test_the_routers_launch_decides_as_the_hook_does(pressed: Callable[..., Path], family: str) -> None:
    model = load(pressed(family, method="rtn", group_size=32))
    attach(model, selectors(model))
    found, _, counts = generate(model)
    for router in routers_of(model):
        router.select_by(None)
    wanted, _, others = generate(model)
    # sums in other orders, and a decision that is nearly tied changes all that follows in its sequence
    assert (found == wanted).float().mean() > 0.9
    assert (counts.tokens_by_kept - others.tokens_by_kept).abs().sum() <= 0.1 * counts.tokens_by_kept.sum()
    assert 0 < counts.dropped <= 0.5


def test_the_dial_in_a_captured_block_whose_router_decides(pressed: Callable[..., Path]) -> None:
    model = load(pressed("qwen3_moe", method="rtn", group_size=32))
    attach(model, selectors(model))
    site = moe_sites(model)[0]
    assert site.router is not None
    x = torch.randn(1, 5, 64, device="cuda").bfloat16()
    with torch.no_grad(), counting(model, 9) as read:
        pruned = site.block(x).clone()
        with disabled(model):
            whole = site.block(x).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = site.block(x)
        before = read().tokens_by_kept[0]
        graph.replay()
        assert torch.equal(y, pruned) and (read().tokens_by_kept[0] - before).sum() == 5
        moepress.set_pruning_dial(model, -1.0)
        graph.replay()
        assert torch.equal(y, whole) and not torch.equal(y, pruned)


def test_pruning_never_waits_for_the_device(pressed: Callable[..., Path]) -> None:
    model = load(pressed("qwen3_moe", method="rtn", group_size=32))
    attach(model, selectors(model))
    logits(model)  # settles the kernels
    ids = tokens().cuda()
    with torch.no_grad(), counting(model, 9):
        model(ids)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for site in moe_sites(model):
                x = torch.randn(4, 64, device="cuda").bfloat16()
                site.experts(x, torch.zeros(4, 2, device="cuda", dtype=torch.long), torch.rand(4, 2, device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@RULES
@pytest.mark.parametrize("family", NATIVE)
def test_generate_with_a_static_cache_and_graphs(
    pressed: Callable[..., Path], family: str, make: Callable[[Any], list[Rule]]
) -> None:
    torch._dynamo.reset()
    # in float16 graphs round closely enough to eager steps for the same tokens and the same decisions
    model = load(pressed(family, method="rtn", group_size=32), dtype=torch.float16)
    attach(model, make(model))
    eager = generate(model, cache_implementation="static", disable_compile=True)
    assert eager.tokens.shape == (2, 21) and 0 < eager.counts.dropped < 0.5
    assert eager.counts.tokens_at[0].tolist() == [2] * 20 + [0] * 12
    if family in COMPILED:
        check_same(generate(model, cache_implementation="static", disable_compile=False), eager)


def test_a_captured_graph_obeys_the_dial_and_counts(pressed: Callable[..., Path]) -> None:
    model = load(pressed("olmoe", method="rtn", group_size=32))
    attach(model, thresholds(model))
    site = moe_sites(model)[0]
    x = torch.randn(1, 5, 64, device="cuda").bfloat16()
    with torch.no_grad(), counting(model, 9) as read:
        whole, pruned = [], site.block(x).clone()
        with disabled(model):
            whole.append(site.block(x).clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = site.block(x)
        before = read().tokens_by_kept[0]
        graph.replay()
        assert torch.equal(y, pruned) and (read().tokens_by_kept[0] - before).sum() == 5
        moepress.set_pruning_dial(model, -9.0)
        graph.replay()
        assert torch.equal(y, whole[0]) and not torch.equal(y, pruned)


def test_a_pruned_folder_on_the_gpu(pressed: Callable[..., Path], tmp_path: Path) -> None:
    source = pressed("deepseek_v2", method="rtn", group_size=32)
    plain = load(source)
    rules = selectors(plain)
    publish_pruned(source, tmp_path / "pruned", {s.name: r for s, r in zip(moe_sites(plain), rules, strict=True)})
    model = load(tmp_path / "pruned")
    assert {t.device.type for rule in rules_of(model) for t in rule.state_dict().values()} == {"cuda"}
    assert model.hf_quantizer.is_compileable
    attach(plain, rules)
    assert torch.equal(logits(model), logits(plain))
    model.cpu()
    assert {t.device.type for rule in rules_of(model) for t in rule.state_dict().values()} == {"cpu"}
    moepress.warmup(model.cuda())
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
