# SPDX-License-Identifier: Apache-2.0
"""A router's definition against transformers' routers, to the bit, and what reaches the kernel's launch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.graph.families import family_of
from moepress.kernels.cuda import router as launcher
from moepress.kernels.cuda.compiler import SOURCES
from moepress.kernels.router.cuda import FEW, Selection, route_op, route_tokens
from moepress.kernels.router.reference import Routed, Routing, route
from moepress.pruning.rule import prune
from moepress.pruning.selector import Selector
from moepress.runtime.router import routing_of
from stand_in import Kernels, stand_in
from tiny import EXPERTS, GREEDY, ROUTED, tiny_model

HIDDEN, TOP_K = 64, 2
SETTINGS = [*itertools.product(ROUTED, ({"norm_topk_prob": False}, {"norm_topk_prob": True})), ("deepseek_v2", GREEDY)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return stand_in(monkeypatch)


def inputs(tokens: int = 9, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator) / 8
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), weight.to(dtype)


def equal(found: Routed, wanted: Routed) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_the_definition_is_transformers_own(family: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype, **settings)
    routing = routing_of(family_of(family), model.config)
    assert routing is not None and routing.top_k == TOP_K
    gate = model.model.layers[-1].mlp.gate
    x = torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        logits, weights, ids = gate(x)
        found = route(x, gate.weight, routing)
    if family == "deepseek_v2":  # which leaves the order of a token's choices open
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
    assert equal(found, (logits, weights, ids))


@pytest.mark.parametrize(
    ("family", "settings"), [("deepseek_v2", {}), ("deepseek_v3", {}), ("glm4_moe", {}), ("granitemoe", {})]
)
def test_other_routers_are_left_alone(family: str, settings: dict[str, Any]) -> None:
    assert routing_of(family_of(family), tiny_model(family, **settings).config) is None


def selection(hidden: int = HIDDEN, renormalises: bool = True) -> tuple[Selector, Selection]:
    rule, generator = Selector(hidden, EXPERTS).requires_grad_(False), torch.Generator().manual_seed(3)
    rule.initialise(4)
    rule.sensitivity.copy_(torch.randn(rule.sensitivity.shape, generator=generator))
    rule.offset.copy_(torch.randn(EXPERTS, generator=generator) + 2)
    return rule, Selection(rule.costs, rule.dial, renormalises)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, FEW, FEW + 1])
def test_few_tokens_are_one_launch_and_more_are_torchs_own(kernels: Kernels, tokens: int, gradients: bool) -> None:
    x, weight = inputs(tokens)
    routing, (rule, selected) = Routing(TOP_K, True), selection()
    with torch.set_grad_enabled(gradients):  # with them it is an operation that torch sees
        assert equal(route_tokens(x, weight, routing), route(x, weight, routing))
        assert kernels.calls == ["route"] * (0 < tokens <= FEW)
        kernels.calls.clear()
        logits, weights, ids = route_tokens(x, weight, routing, selected)
    assert kernels.calls == ([] if not tokens else ["route"] if tokens <= FEW else ["select"])
    plain = route(x, weight, routing)
    new_ids, new_weights = prune(rule, x, plain[2], plain[1], True, skips=True)
    assert equal((logits, weights, ids), (plain[0], new_weights, new_ids))
    assert tokens < FEW or 0 < (ids == -1).float().mean() < 0.5


@pytest.mark.parametrize(
    "routing",
    [Routing(1, False), Routing(2, True, float32_weights=True), Routing(3, False, 2.5, True, True),
     Routing(2, False, 0.5, False, True)],
)  # fmt: skip
@pytest.mark.parametrize("selected", [False, True])
def test_torch_knows_what_comes_out(kernels: Kernels, routing: Routing, selected: bool) -> None:
    x, weight = inputs()
    _, each = selection()
    arguments = x, weight, *routing, [*each.costs, each.dial] if selected else [], True
    torch.library.opcheck(route_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_unfit_inputs_are_made_fit(kernels: Kernels) -> None:
    (x, weight), routing = inputs(), Routing(TOP_K, True)
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.flatten()
    wanted = route(x, weight, routing)
    assert equal(route_tokens(flat[1:].view_as(x), weight, routing), wanted)
    assert equal(route_tokens(x.T.contiguous().T, weight.T.contiguous().T, routing), wanted)


@given(
    tokens=st.integers(1, FEW), columns=st.integers(1, 1024).map(lambda eighth: 8 * eighth),
    experts=st.integers(1, 512), projections=st.integers(0, 32),
)  # fmt: skip
def test_work_is_shared_completely(tokens: int, columns: int, experts: int, projections: int) -> None:
    shape = launcher.shape_of(tokens, columns, experts, projections)
    assert shape.each <= launcher.TOKENS and shape.blocks * 16 >= experts > shape.blocks * 16 - 16
    inverse = (1 << 16) // shape.blocks + 1
    tasks = {(warp * inverse >> 16, warp - (warp * inverse >> 16) * shape.blocks) for warp in range(launcher.WARPS)}
    assert all(share == warp // shape.blocks for warp in range(16) for share in [warp * inverse >> 16])
    blocks = range(min(shape.blocks, launcher.WARPS))  # those past 16 follow in the same warps
    assert {(share, block) for share in range(shape.shares) for block in blocks} <= tasks
    assert launcher.CLUSTER * shape.shares * shape.run * 32 >= columns
    # with few experts every warp has columns, where there are enough
    assert shape.blocks > 8 or shape.shares * shape.blocks > launcher.WARPS / 2
    assert 0 < shape.shared_bytes <= 227 * 1024 - 1024 - 32
    assert shape.each == min(tokens, launcher.TOKENS) or (experts > 448 and projections > 24 and shape.each == 7)


def test_the_launcher_counts_as_the_kernel_does() -> None:
    text = (SOURCES / launcher.SOURCE).read_text()
    warps = f"ROUTE_WARPS = {launcher.WARPS},", f"SELECTOR_WARPS = {launcher.SELECTOR_WARPS},"
    for words in (*warps, f"TOKENS = {launcher.TOKENS};", "SPAN = 32;"):
        assert words in text
    kinds = [launcher.route_instance(torch.bfloat16, launcher.Kind(each, 8, False)) for each in (1, 32, 33, 128, 512)]
    assert [kind.split(", ")[2] for kind in kinds] == ["1", "1", "2", "4", "16"]
