# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel once, on small layers: what compute-sanitizer is run on.

    compute-sanitizer --report-api-errors no --error-exitcode 1 python -m pytest -m gpu tests/kernels/test_cuda_all.py

The other files say whether results are right; here they only have to be numbers.
"""

from __future__ import annotations

import pytest
import torch

from moepress.bench.ours import factor_banks, make_bank, spec_of
from moepress.bench.problems import Problem
from moepress.format.spec import WeightSpec
from moepress.kernels.experts.cuda import packed_experts
from moepress.kernels.linear.cuda import packed_linear
from moepress.kernels.packing import pack_parts
from moepress.kernels.router.cuda import Selection, route_tokens
from moepress.kernels.router.reference import Routing
from moepress.pruning.rule import prune
from moepress.pruning.selector import Selector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
DEVICE = torch.device("cuda", 0)
TOKENS = (1, 3, 8, 9, 40, 130, 300)
"""One for each body of a layer of experts; of the dense layer tiles of 32 to 128 tokens, by clusters. The last shape of
experts has more row blocks at 8 tokens than wait for compensators at a time."""


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("shape", [(6, 2, 136, 40), (8, 4, 512, 640), (128, 8, 128, 896)])
def test_experts(shape: tuple[int, ...], rank: int) -> None:
    for tokens in TOKENS:
        problem = Problem("moe", shape, tokens, rank=rank if shape[2] % 64 == 0 else 0)
        banks = [make_bank(problem, matrix, 0, 0, DEVICE) for matrix in range(2)]
        factors = [factor_banks(problem, matrix, 0, 0, DEVICE) for matrix in range(2)]
        draw = problem.draw(0, DEVICE)
        assert draw.ids is not None and draw.weights is not None
        ids = draw.ids.clone()
        ids[0, 0] = -1
        with torch.no_grad():
            assert packed_experts(draw.x, ids, draw.weights, *banks, shape[3], *factors).isfinite().all()


@pytest.mark.parametrize("rank", [0, 16])
def test_linears(rank: int) -> None:
    # the second by one block each, into padded rows; the third in two launches
    for shape, tokens in (*(((1032, 4096), tokens) for tokens in TOKENS), ((2100, 4608), 520), ((9000, 2048), 500)):
        problem = Problem("dense", shape, tokens, rank=rank)
        (bank,), factors = [make_bank(problem, 0, 0, 0, DEVICE)], factor_banks(problem, 0, 0, 0, DEVICE)
        x, bias = problem.draw(0, DEVICE).x, torch.randn(shape[0], device=DEVICE)
        with torch.no_grad():
            assert packed_linear(x, bank, spec_of(problem), factors or {}, shape[0], bias).isfinite().all()


@pytest.mark.parametrize("experts", [6, 128])
def test_routers_and_selectors(experts: int) -> None:
    rule = Selector(576, experts).requires_grad_(False)
    rule.initialise(0)
    rule.offset.zero_()
    rule = rule.to(DEVICE)
    selection = Selection(rule.costs, rule.dial, True)
    weight = torch.randn(experts, 576, device=DEVICE).bfloat16()
    for tokens in TOKENS:
        x = torch.randn(tokens, 576, device=DEVICE).bfloat16()
        with torch.no_grad():
            for each in (None, selection):
                _, weights, ids = route_tokens(x, weight, Routing(2, True), each)
                assert weights.isfinite().all() and (ids < experts).all()
            ids, weights = prune(rule, x, ids.clamp(min=0), weights, True, skips=True)
            assert weights.isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_packing(bits: int) -> None:
    spec = WeightSpec(bits=bits, group_size=32)
    parts = {
        "packed": torch.randint(0, 256, (3, 20, -(-136 * bits // 8)), dtype=torch.uint8, device=DEVICE),
        "scale": torch.rand(3, 20, 5, device=DEVICE).half(),
        "zero": torch.rand(3, 20, 5, device=DEVICE).half(),
    }
    assert len(pack_parts(parts, spec, 20, 136)) == 3
