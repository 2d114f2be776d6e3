# SPDX-License-Identifier: Apache-2.0
"""The router's CUDA kernel: logits against float64, choices and weights against the definition on the kernel's own
logits, and with a selector against the router and the selector one after the other."""

from __future__ import annotations

import math

import pytest
import torch

from moepress.kernels.router.cuda import FEW, Selection, route_tokens
from moepress.kernels.router.reference import Routed, Routing, route
from moepress.kernels.selector.cuda import select_experts
from moepress.kernels.selector.reference import Costs, log_costs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
SHAPES = (
    (4, 64, 1), (4, 136, 2), (8, 136, 2), (8, 4096, 2), (16, 576, 4), (60, 2048, 4), (64, 64, 6), (64, 2048, 6),
    (64, 2048, 8), (128, 2048, 8), (128, 4096, 1), (256, 7168, 8), (160, 1024, 6), (300, 576, 32), (512, 2048, 10),
)  # fmt: skip
"""Experts, hidden, chosen for a token."""
TOKENS = (1, 2, 7, 8, 9, 16, 64, 65, 200)
FAMILIES = {
    "mixtral": {"renormalises": True, "float32_weights": True},
    "qwen3_moe": {"renormalises": True},
    "olmoe": {"renormalises": False},
    "deepseek_v2": {"renormalises": False, "scaling": 16.0, "float32_weights": True, "float32_logits": True},
}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TIE = 1e-4
"""A cost this near the price may fall on either side."""


def inputs(experts: int, hidden: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of size 2."""
    generator = torch.Generator().manual_seed(tokens + experts)
    weight = 2 * torch.randn(experts, hidden, generator=generator) / math.sqrt(hidden)
    return torch.randn(tokens, hidden, generator=generator).to("cuda", dtype), weight.to("cuda", dtype)


def selection(experts: int, hidden: int, projections: int = 8, renormalises: bool = True) -> Selection:
    generator = torch.Generator().manual_seed(hidden)
    made = (
        torch.randn(projections, hidden, generator=generator) / math.sqrt(hidden),
        torch.randn(experts, projections, generator=generator) / 2,
        torch.randn(experts, generator=generator) + 2,
        torch.tensor(1.0),
    )
    return Selection(Costs(*(each.cuda() for each in made)), torch.tensor(0.25, device="cuda"), renormalises)


def equal(a: Routed, b: Routed) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(logits: torch.Tensor, routing: Routing, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, the lower first of equal logits, and weights in float64 but for their last rounding."""
    probabilities = logits.double().softmax(-1)
    ids = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = probabilities.gather(-1, ids)
    if routing.renormalises:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * routing.scaling
    return ids, weights.to(torch.float32 if routing.float32_weights or routing.float32_logits else dtype)


@HALVES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_routes_as_its_definition(shape: tuple[int, int, int], family: str, dtype: torch.dtype) -> None:
    experts, hidden, top_k = shape
    routing = Routing(top_k, **FAMILIES[family])
    for tokens in TOKENS:
        x, weight = inputs(experts, hidden, tokens, dtype)
        with torch.no_grad():
            logits, weights, ids = found = route_tokens(x, weight, routing)
            wanted = route(x, weight, routing)
            assert equal(route_tokens(x, weight, routing), found)
        assert [each.dtype for each in found] == [each.dtype for each in wanted]
        exact = x.double() @ weight.double().T
        error, yardstick = ((each.double() - exact).abs().max() for each in (logits, wanted[0]))
        # torch adds products of float32 on other units, which round less
        assert error <= (1e-4 if routing.float32_logits else 1.5 * yardstick), f"{error:.3g} against {yardstick:.3g}"
        if tokens > FEW:
            assert equal(found, wanted)
            continue
        own_ids, own_weights = by_hand(logits, routing, dtype)
        assert torch.equal(ids, own_ids)
        rtol = 1e-5 if weights.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(weights, own_weights, rtol=rtol, atol=1e-7)
        # the same experts as torch's but where the last one is nearly tied with the next
        ranked = exact.sort(dim=-1, descending=True).values
        gap = ranked[:, top_k - 1] - ranked[:, top_k] if top_k < experts else torch.full_like(ranked[:, 0], 9)
        clear = gap > 2 * (error + yardstick)
        assert torch.equal(ids.sort(-1).values[clear], wanted[2].sort(-1).values[clear])


@HALVES
def test_equal_logits_are_taken_in_the_order_of_ids(dtype: torch.dtype) -> None:
    x, weight = inputs(128, 2048, 5, dtype)
    weight[[5, 40, 72, 127]] = 3 * x[0] / x[0].float().norm().to(dtype)
    for wide in (False, True):
        with torch.no_grad():
            ids = route_tokens(x, weight, Routing(4, True, float32_logits=wide))[2]
        assert ids[0].tolist() == [5, 40, 72, 127]


def test_a_token_is_routed_alike_in_any_company() -> None:
    x, weight = inputs(128, 2048, 64, torch.bfloat16)
    routing, selected = Routing(8, True), selection(128, 2048)
    with torch.no_grad():
        together = route_tokens(x, weight, routing, selected)
        for at in (0, 7, 8, 63):
            alone = route_tokens(x[at : at + 1], weight, routing, selected)
            assert equal(alone, tuple(each[at : at + 1] for each in together))


@HALVES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(8, 4096, 2), (60, 2048, 4), (128, 2048, 8), (256, 7168, 8), (512, 136, 10)])
def test_with_a_selector_it_decides_as_both_do(shape: tuple[int, int, int], family: str, dtype: torch.dtype) -> None:
    experts, hidden, top_k = shape
    routing, seen = Routing(top_k, **FAMILIES[family]), []
    for tokens in TOKENS:
        for rescales in (False, True):
            x, weight = inputs(experts, hidden, tokens, dtype)
            selected = selection(experts, hidden, renormalises=rescales)
            with torch.no_grad():
                logits, weights, ids = found = route_tokens(x, weight, routing, selected)
                plain = route_tokens(x, weight, routing)
                wanted_ids, wanted_weights = select_experts(x, plain[2], plain[1], *selected)
                assert equal(route_tokens(x, weight, routing, selected), found)
            assert torch.equal(logits, plain[0]) and torch.equal(ids == -1, weights == 0)
            exact = log_costs(x.double(), plain[2], plain[1].double(), Costs(*(c.double() for c in selected.costs)))
            clear = ((exact.exp() - 1.25).abs() > TIE * exact.exp().clamp(min=1)).all(-1)
            clear &= exact.sort(dim=-1).values.diff(dim=-1).abs()[:, -1] > TIE
            seen.append(torch.stack([(ids >= 0).float().mean(-1), clear.float()]))
            assert torch.equal(ids[clear], wanted_ids[clear])
            rtol = 1e-5 if weights.dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(weights[clear], wanted_weights[clear], rtol=rtol, atol=0)
    kept_share, clear_share = torch.cat(seen, dim=1).mean(1).tolist()
    assert 0 < kept_share < 1 and clear_share > 0.9


@pytest.mark.parametrize("projections", [1, 3, 9, 16, 17, 32])
def test_other_numbers_of_projections(projections: int) -> None:
    x, weight = inputs(64, 2048, 20, torch.bfloat16)
    routing, selected = Routing(6, True), selection(64, 2048, projections)
    with torch.no_grad():
        ids, plain = route_tokens(x, weight, routing, selected)[2], route_tokens(x, weight, routing)
        wanted = select_experts(x, plain[2], plain[1], *selected)[0]
    assert ((ids == wanted).float().mean() > 0.97) and 0 < (ids == -1).float().mean() < 1


def test_a_captured_graph_obeys_the_dial_and_what_follows_sees_the_results() -> None:
    x, weight = inputs(128, 2048, 3, torch.bfloat16)
    routing, selected = Routing(8, True, float32_weights=True), selection(128, 2048)
    with torch.no_grad():
        route_tokens(x, weight, routing, selected)  # loads the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = x * 1.0
            logits, weights, ids = route_tokens(doubled, weight, routing, selected)
            total, copied = weights.sum(), logits.clone()
        plain = route_tokens(x, weight, routing)
    for dial, wanted in ((-1.0, 24), (1e30, 3)):
        selected.dial.fill_(dial)
        graph.replay()
        assert int((ids >= 0).sum()) == wanted and torch.equal(copied, plain[0])
        assert total.item() == pytest.approx(3, rel=1e-5)


def test_many_launches_in_a_row_keep_their_order() -> None:
    """Each reads what a kernel just before it wrote, while it may start early."""
    x, weight = inputs(128, 2048, 4, torch.bfloat16)
    routing, selected = Routing(8, True), selection(128, 2048)
    with torch.no_grad():
        wanted = [route_tokens(x * factor, weight, routing, selected) for factor in range(1, 4)]
        torch.cuda.synchronize()
        for _ in range(50):
            found = []
            for factor in range(1, 4):
                y = x * factor
                found.append(route_tokens(y, weight, routing, selected))
                y.zero_()
            assert all(equal(a, b) for a, b in zip(found, wanted, strict=True))
