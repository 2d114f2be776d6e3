# SPDX-License-Identifier: Apache-2.0
"""A selector's kernel as rules call it: what reaches the launch, in which types, and through torch's operation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moepress.kernels import registry
from moepress.kernels.cuda import select as launcher
from moepress.pruning.rule import prune, rescale
from moepress.pruning.selector import Selector
from stand_in import launch_select, stand_in

HIDDEN, EXPERTS, TOP_K = 64, 6, 3
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel by its definition, on any device; the dtypes of what each launch was given."""
    seen: list[str] = []

    def launch(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *others: Any) -> Any:
        seen.append(f"{x.dtype} {ids.dtype} {weights.dtype}".replace("torch.", ""))
        return launch_select(x, ids, weights, *others)

    stand_in(monkeypatch)
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    monkeypatch.setattr(launcher, "launch_select", launch)
    return seen


def selector() -> Selector:
    made, generator = Selector(HIDDEN, EXPERTS).requires_grad_(False), torch.Generator().manual_seed(3)
    made.initialise(4)
    made.sensitivity.copy_(torch.randn(made.sensitivity.shape, generator=generator))
    made.offset.copy_(torch.randn(EXPERTS, generator=generator) + 3)
    return made


def routed(dtype: torch.dtype = torch.bfloat16, tokens: int = 40, **kinds: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
    weights = torch.rand(tokens, TOP_K, generator=generator).to(kinds.get("weights", torch.float32))
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), ids.to(kinds.get("ids", torch.int64)), weights


def equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("renormalises", [False, True])
def test_one_launch_does_what_the_rule_says(launches: list[str], renormalises: bool, gradients: bool) -> None:
    rule = selector()
    rule.dial.fill_(0.5)
    for weights, ids in itertools.product((torch.float32, torch.bfloat16), (torch.int64, torch.int32)):
        inputs = routed(weights=weights, ids=ids)
        with torch.set_grad_enabled(gradients):  # with them it is an operation that torch sees
            found = prune(rule, *inputs, renormalises, skips=True)
        assert launches == [f"bfloat16 {ids} {weights}".replace("torch.", "")]
        launches.clear()
        kept = rule(inputs[0], inputs[1], inputs[2].float())
        assert equal(found, (inputs[1].where(kept, -1), rescale(inputs[2], kept, renormalises)))
        assert 0 < (found[0] == -1).float().mean() < 0.6


def test_experts_that_do_not_skip_and_other_types_are_left_to_torch(launches: list[str]) -> None:
    rule = selector()
    ids, weights = prune(rule, *routed(), False, skips=False)
    assert not launches and (ids >= 0).all() and (weights == 0).any()
    inputs = routed(torch.float32)
    assert equal(
        prune(rule, *inputs, False, skips=True), (inputs[1].where(rule(*inputs), -1), inputs[2] * rule(*inputs))
    )
    assert not launches


def test_inputs_are_made_fit_for_the_kernel(launches: list[str]) -> None:
    rule, (x, ids, weights) = selector(), routed(tokens=9)
    wanted = prune(rule, x, ids, weights, True, skips=True)
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.flatten()
    assert equal(prune(rule, flat[1:].view_as(x), ids, weights, True, skips=True), wanted)
    strided = prune(rule, x.T.contiguous().T, ids.T.contiguous().T, weights.T.contiguous().T, True, skips=True)
    assert equal(strided, wanted)
    half = prune(rule, x, ids, weights.half(), True, skips=True)
    assert half[1].dtype == torch.float16 and launches[-1] == "bfloat16 int64 float32"
    launches.clear()
    empty = prune(rule, x[:0], ids[:0], weights[:0], True, skips=True)
    assert empty[0].shape == empty[1].shape == (0, TOP_K) and not launches


def test_the_choice_is_made_once_for_a_device_and_dtype(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rule, asked = selector(), []
    inner = registry.explain
    monkeypatch.setattr(registry, "explain", lambda problem: asked.append(problem) or inner(problem))
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        prune(rule, *routed(dtype), False, skips=True)
    assert [(each.dtype, each.columns, each.top_k) for each in asked] == [
        (torch.bfloat16, HIDDEN, TOP_K), (torch.float16, HIDDEN, TOP_K)
    ]  # fmt: skip


def test_a_compiled_model_sees_one_operation(launches: list[str]) -> None:
    rule, inputs = selector(), routed()
    wanted = prune(rule, *inputs, True, skips=True)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *each: prune(rule, *each, True, skips=True), backend=backend, fullgraph=True)
    with torch.no_grad():
        assert equal(compiled(*inputs), wanted)
    assert "moepress.select" in graphs[0].code
