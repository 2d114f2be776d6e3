# SPDX-License-Identifier: Apache-2.0
"""The selector's CUDA kernel against its definition in float64: the same decisions but for costs next to the price."""

from __future__ import annotations

import pytest
import torch

from moepress.kernels import registry
from moepress.kernels.cuda import select as launcher
from moepress.kernels.selector.reference import Costs, log_costs, worth_running
from moepress.pruning.rule import prune, rescale
from moepress.pruning.selector import Selector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
SHAPES = ((64, 4, 2), (136, 16, 3), (576, 8, 4), (2048, 128, 8), (4096, 8, 2), (7168, 256, 8), (512, 64, 32))
"""Hidden, experts, chosen for a token."""
TOKENS = (1, 2, 7, 16, 64, 65, 130, 1000)
TIE = 1e-4
"""A cost this near the price may fall on either side."""


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)


def selector(hidden: int, experts: int, projections: int = 8) -> Selector:
    made, generator = Selector(hidden, experts, projections), torch.Generator().manual_seed(3)
    made.requires_grad_(False).initialise(4)
    made.sensitivity.copy_(torch.randn(made.sensitivity.shape, generator=generator) / 2)
    made.offset.copy_(torch.randn(experts, generator=generator) + 3)
    made.dial.fill_(0.25)
    return made.cuda()


def routed(
    hidden: int, experts: int, top_k: int, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].contiguous()
    weights = 0.02 + torch.rand(tokens, top_k, generator=generator)
    return (3 * torch.randn(tokens, hidden, generator=generator)).to("cuda", dtype), ids.cuda(), weights.cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_decides_as_its_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rule, seen = selector(*shape[:2]), []
    for tokens in TOKENS:
        for ids_type, weights_type in ((torch.int64, torch.float32), (torch.int32, dtype)):
            x, ids, weights = routed(*shape, tokens, dtype)
            ids, weights = ids.to(ids_type), weights.to(weights_type)
            exact = log_costs(x.double(), ids, weights.double(), Costs(*(each.double() for each in rule.costs)))
            kept = worth_running(exact, 1.25)
            clear = ((exact.exp() - 1.25).abs() > TIE).all(-1)
            seen.append(torch.stack([kept.float().mean(-1), clear.float()]))
            for renormalises in (False, True):
                new_ids, new_weights = prune(rule, x, ids, weights, renormalises, skips=True)
                assert new_ids.dtype == ids_type and new_weights.dtype == weights_type
                assert torch.equal(new_ids[clear], ids.where(kept, -1)[clear])
                wanted = rescale(weights, kept, renormalises)
                torch.testing.assert_close(
                    new_weights[clear], wanted[clear], rtol=1e-5 if dtype != weights_type else 1e-2, atol=0
                )
                again = prune(rule, x, ids, weights, renormalises, skips=True)
                assert torch.equal(again[0], new_ids) and torch.equal(again[1], new_weights)
    kept_share, clear_share = torch.cat(seen, dim=1).mean(1).tolist()
    assert 0 < kept_share < 1 and clear_share > 0.9


@pytest.mark.parametrize("projections", [1, 3, 9, 32])
def test_other_numbers_of_projections(projections: int) -> None:
    rule, inputs = selector(2048, 16, projections), routed(2048, 16, 4, 9, torch.bfloat16)
    found, wanted = prune(rule, *inputs, True, skips=True)[0], rule(*inputs)
    assert ((found >= 0) == wanted).float().mean() > 0.97


def test_a_captured_graph_obeys_the_dial_and_what_follows_sees_the_results() -> None:
    rule, (x, ids, weights) = selector(4096, 8), routed(4096, 8, 2, 4, torch.bfloat16)
    prune(rule, x, ids, weights, True, skips=True)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = x * 1.0
        new_ids, new_weights = prune(rule, doubled, ids, weights, True, skips=True)
        total = new_weights.sum()
    for dial, wanted in ((-1.0, 8), (1e9, 4)):
        rule.dial.fill_(dial)
        graph.replay()
        assert int((new_ids >= 0).sum()) == wanted
        assert total.item() == pytest.approx(weights.sum().item(), rel=1e-5)


def test_both_ways_of_sharing_work_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, inputs = selector(4096, 64), routed(4096, 64, 6, 60, torch.bfloat16)
    clusters = prune(rule, *inputs, False, skips=True)
    monkeypatch.setattr(launcher, "FEW", 0)
    blocks = prune(rule, *inputs, False, skips=True)
    # other orders of the same sums
    assert (clusters[0] == blocks[0]).float().mean() > 0.99
