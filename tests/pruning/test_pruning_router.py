# SPDX-License-Identifier: Apache-2.0
"""A learned selector in the router's launch (a stand-in, here): the same decisions as behind it, counted and undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moepress
from moepress.kernels import registry
from moepress.kernels.cuda.router import Kind
from moepress.pruning.attach import attach, counting, detach, disabled
from moepress.pruning.baselines import Threshold
from moepress.pruning.rule import Rule
from moepress.pruning.selector import Selector
from moepress.pruning.sites import moe_sites
from moepress.pruning.stored import publish_pruned
from moepress.runtime.router import routers_of
from stand_in import Kernels, stand_in
from tiny import EXPERTS, ROUTED, tokens

Folders = Callable[..., Path]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    return stand_in(monkeypatch)


def selectors(model: Any) -> list[Rule]:
    made: list[Rule] = []
    for number, site in enumerate(moe_sites(model)):
        rule, generator = Selector(site.hidden_size, site.num_experts), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in rule.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            rule.projection.div_(8)
            rule.power.fill_(0.5)
            rule.offset.add_(2)
        made.append(rule.requires_grad_(False))
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def run(model: Any, kernels: Kernels) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits, tokens by how many experts they ran, and launches of routers and selectors."""
    kernels.calls.clear()
    with counting(model, 9) as read:
        found, counts = logits(model), read()
    assert counts.tokens_at.sum() == 18 * len(counts.names)
    return found, counts.tokens_by_kept, [name for name in kernels.calls if name in ("route", "select")]


@pytest.fixture
def model(pressed: Folders, kernels: Kernels, request: pytest.FixtureRequest) -> Any:
    family = getattr(request, "param", "mixtral")
    folder = pressed(family, method="rtn", group_size=32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("own", [None, False, True])
@pytest.mark.parametrize("model", ROUTED, indirect=True)
def test_the_launch_decides_as_the_hook_does(model: Any, kernels: Kernels, own: bool | None) -> None:
    whole, rules = logits(model), selectors(model)
    for rule in rules:
        rule.renormalises = own
    attach(model, rules)
    found, counts, launches = run(model, kernels)
    assert launches == ["route"] * len(rules)
    for router in routers_of(model):
        router.select_by(None)
    wanted, wanted_counts, launches = run(model, kernels)
    assert launches == ["route", "select"] * len(rules)
    assert torch.equal(found, wanted) and torch.equal(counts, wanted_counts)
    assert not torch.equal(found, whole) and 0 < counts[:, 1].sum() < counts.sum()


def test_it_is_switched_turned_and_undone(model: Any, kernels: Kernels) -> None:
    whole = logits(model)
    attach(model, selectors(model))
    pruned = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), whole)
    assert torch.equal(logits(model), pruned)
    for dial, kept in ((-1.0, 2), (1e30, 1)):
        moepress.set_pruning_dial(model, dial)
        found, counts, launches = run(model, kernels)
        assert launches == ["route", "route"] and counts[:, kept].sum() == counts.sum()
        assert torch.equal(found, whole) == (kept == 2)
    rules = detach(model)
    kernels.calls.clear()
    assert torch.equal(logits(model), whole) and "select" not in kernels.calls
    attach(model, [Threshold(0.9) for _ in rules])
    assert not torch.equal(logits(model), whole) and "select" not in kernels.calls


def test_experts_and_routers_on_their_own(model: Any, kernels: Kernels) -> None:
    attach(model, selectors(model))
    site = moe_sites(model)[0]
    x = torch.randn(7, site.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        wanted = site.block(x[None])[0]
        _, weights, ids = site.router(x)
        assert (ids == -1).any() and torch.equal(ids == -1, weights == 0) and site.experts.pruner.decided
        assert torch.equal(site.experts(x, ids, weights), wanted) and not site.experts.pruner.decided
        with disabled(model):
            _, weights, ids = site.router(x)
        assert (ids >= 0).all()
        kernels.calls.clear()
        assert torch.equal(site.experts(x, ids, weights), wanted) and kernels.calls[0] == "select"


def test_a_router_that_has_a_gradient_leaves_it_to_the_hook(model: Any, kernels: Kernels) -> None:
    attach(model, selectors(model))
    wanted = logits(model)
    kernels.calls.clear()
    assert torch.equal(model(tokens()).logits, wanted) and "route" not in kernels.calls and "select" in kernels.calls


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_decides_by_its_own_rule(model: Any, how: Callable[[Any], Any], kernels: Kernels) -> None:
    attach(model, selectors(model))
    wanted, twin = logits(model), how(model)
    moepress.set_pruning_dial(twin, -1.0)
    assert torch.equal(logits(model), wanted) and not torch.equal(logits(twin), wanted)
    for site in moe_sites(twin):
        assert site.router._selecting == (site.experts.pruner,)


def test_warmup_compiles_both(model: Any, kernels: Kernels) -> None:
    attach(model, selectors(model))
    moepress.warmup(model)
    assert {kind for kind, _ in kernels.compiled["route"]} == {Kind(EXPERTS, 0, False), Kind(EXPERTS, 8, False)}
    assert kernels.compiled["select"] == {(8, torch.device("cpu"))}


def test_a_pruned_folder(pressed: Folders, model: Any, kernels: Kernels, tmp_path: Path) -> None:
    source, rules = pressed("mixtral", method="rtn", group_size=32), selectors(model)
    publish_pruned(source, tmp_path / "pruned", {s.name: r for s, r in zip(moe_sites(model), rules, strict=True)})
    whole = logits(model)
    attach(model, rules)
    for pruning, wanted in ((None, logits(model)), (False, whole)):
        chosen = {} if pruning is None else {"pruning": pruning}
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.bfloat16, **chosen)
        kernels.calls.clear()
        assert torch.equal(logits(found), wanted)
        assert kernels.calls.count("route") == 2 and "select" not in kernels.calls


def test_a_compiled_block_sees_one_operation(model: Any, kernels: Kernels) -> None:
    attach(model, selectors(model))
    site = moe_sites(model)[0]
    x = torch.randn(1, 7, site.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        wanted = site.block(x)
        compiled = torch.compile(site.block, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), wanted) and torch.equal(compiled(x), wanted)
    assert len(graphs) == 1 and "moepress.route" in graphs[0].code and "moepress.select" not in graphs[0].code
