# SPDX-License-Identifier: Apache-2.0
"""Dense layers on the CUDA kernels against float64 truth; the yardstick is torch with the dequantised matrix."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest
import torch
from test_linear import random_parts

from moepress.errors import KernelError
from moepress.format.manifest import LinearEntry
from moepress.format.spec import BITS, GROUP_SIZES, WeightSpec
from moepress.format.weight import affine
from moepress.kernels import registry
from moepress.kernels.records import RecordLayout, pack_records
from moepress.runtime.linear import CompressedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
TOKENS = (1, 2, 7, 8, 9, 33, 80, 130, 520, 600)
# 80 rows of few groups: a scale's rounding is one error for all tokens, and 16 rows have too few to compare maxima
SHAPES = cycle([(48, 512), (70, 136), (200, 384), (80, 72), (333, 1000), (1, 256)])
CASES = [
    *((bits, group_size, torch.bfloat16, *next(SHAPES)) for group_size in GROUP_SIZES for bits in BITS),
    *((bits, 64, torch.float16, *next(SHAPES)) for bits in BITS),
    *((3, 64, dtype, 1000, k) for dtype in (torch.bfloat16, torch.float16) for k in (200, 640, 2048)),
    (4, 128, torch.bfloat16, 24, 8), (2, 32, torch.float16, 4096, 1024), (3, 64, torch.bfloat16, 2100, 4608),
    (3, 64, torch.bfloat16, 8500, 4096),  # at 520 tokens two launches, one of clusters
]  # fmt: skip
by_case = pytest.mark.parametrize(("bits", "group_size", "dtype", "n", "k"), CASES)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels of this file side by side, which takes a fraction of the time that they take one by one."""
    from moepress.kernels.cuda import run

    for dtype in (torch.bfloat16, torch.float16):
        layouts = {(RecordLayout(n, k, bits, group_size),) for bits, group_size, own, n, k in CASES if own == dtype}
        run.warm(sorted(layouts, key=repr), [], dtype, torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)


def random_bank(bits: int, group_size: int, n: int, k: int) -> tuple[object, torch.Tensor]:
    """A bank of one matrix, every code in it, each group with its own scale and zero; and the float64 matrix."""
    from moepress.kernels.cuda import run

    generator = torch.Generator().manual_seed(n + k + bits)
    layout = RecordLayout(n, k, bits, group_size)
    codes = torch.randint(0, 2**bits, (1, n, k), generator=generator, dtype=torch.uint8)
    uniform = torch.rand(2, 1, n, layout.groups, generator=generator)
    scale, zero = (0.1 / 2**bits * (0.5 + uniform[0])).half(), (2**bits * (0.2 + 0.6 * uniform[1])).half()
    codes, scale, zero = codes.cuda(), scale.cuda(), zero.cuda()
    bank = run.RecordBank.build((pack_records(codes, scale, zero, layout),), (layout,), ((0, 0),))
    return bank, affine(codes, scale, zero, group_size)[0].double()


def inputs(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """At most twice the error of torch in x's dtype."""
    linear = torch.nn.functional.linear
    truth = linear(x.double(), weight, None if bias is None else bias.double())
    plain = linear(x, weight.to(x.dtype), bias)
    assert y.dtype == x.dtype and y.shape == truth.shape and y.isfinite().all()
    error, yardstick = ((found.double() - truth).abs() for found in (y, plain))
    eps = 1e-6 * truth.abs().max()
    assert error.square().mean().sqrt() <= 2 * yardstick.square().mean().sqrt() + eps, f"M = {len(x)}: root mean square"
    spread = 2 if truth.numel() > 64 else 6  # the largest of a few errors is a matter of luck
    assert error.max() <= spread * yardstick.max() + eps, f"M = {len(x)}: max {error.max():.3g} {yardstick.max():.3g}"


@by_case
def test_against_float64(bits: int, group_size: int, dtype: torch.dtype, n: int, k: int) -> None:
    from moepress.kernels.cuda import run

    bank, weight = random_bank(bits, group_size, n, k)
    bias = 3 * inputs(n, dtype=dtype, seed=2)
    for tokens in TOKENS:
        x = inputs(tokens, k, dtype=dtype)
        y = run.linear(x, bank, None, n)
        check(y, x, weight)
        assert torch.equal(run.linear(x, bank, None, n), y), f"M = {tokens}: not bitwise repeatable"
        check(run.linear(x, bank, bias, n), x, weight, bias)


def test_rows_of_a_result_do_not_depend_on_each_other() -> None:
    from moepress.kernels.cuda import run

    bank, _ = random_bank(3, 64, 200, 384)
    x = inputs(600, 384, dtype=torch.bfloat16)
    whole = run.linear(x, bank, None, 200)
    changed = x.clone()
    changed[300:] = float("nan")
    assert torch.equal(run.linear(changed, bank, None, 200)[:300], whole[:300])


# ---------------------------------------------------------------------------------------------- the module

SPEC, RANKED = WeightSpec(bits=3, group_size=64), WeightSpec(bits=4, group_size=64, rank=8, factor_bits=3)
ALIKE = WeightSpec(bits=3, group_size=64, rank=32, factor_bits=3)
"""Factors of W's width, so that v is multiplied in W's loop."""


def layer(spec: WeightSpec = SPEC, n: int = 200, k: int = 384, bias: bool = True) -> CompressedLinear:
    """On the CPU, in bf16."""
    own = torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(4)), requires_grad=False)
    made = CompressedLinear(LinearEntry(spec, (n, k)), own if bias else None)
    for name, tensor in random_parts(spec, n, k, "cpu").items():
        made.get_buffer(name).copy_(tensor)
    return made.bfloat16()


@pytest.mark.parametrize(("n", "tokens"), [(1036, 9), (1036, 40), (1036, 130), (8500, 520), (8500, 600)])
def test_compensators_in_clusters(n: int, tokens: int) -> None:
    """One block of each cluster adds u t, in a second launch if n is large; rows that end in the middle of a tile."""
    from moepress.kernels.cuda import choose
    from moepress.kernels.cuda.functions import processors_of

    made = layer(RANKED, n, 4096, bias=False)
    weight, processors = made.dequantize().double().cuda(), processors_of(0)
    made.cuda()
    x = inputs(tokens, 4096, dtype=torch.bfloat16)
    with torch.no_grad():
        check(made(x), x, weight)
    bank = choose.Bank((RecordLayout(n, 4096, 4, 64),))
    tile = choose.dense_tiles(bank, tokens, processors)[0]
    assert any(part.splits > 1 for part in choose.dense_parts(bank, tile, tokens, processors)), "these are to be tested"


@pytest.mark.parametrize("n", [200, 13000])  # tiles of one and of two warpgroups along the rows
@pytest.mark.parametrize("spec", [RANKED, ALIKE], ids=lambda spec: spec.tag)
def test_a_t_of_zeros_is_there(spec: WeightSpec, n: int) -> None:
    """In memory 0 stands for what nobody has made yet."""
    made = layer(spec, n).cuda()
    x = inputs(5, 384, dtype=torch.bfloat16)
    with torch.no_grad():
        whole = made(x)
        x[::2] = 0
        y, one = made(x), made(x[:1])
    assert made.is_packed and torch.equal(y[1::2], whole[1::2])
    assert made.bias is not None and torch.equal(y[::2], made.bias.expand(3, -1)) and torch.equal(one, y[:1])


@pytest.mark.parametrize("n", [200, 203])
@pytest.mark.parametrize("spec", [SPEC, RANKED, ALIKE], ids=lambda spec: spec.tag)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (5, 1, 7), (0,), (130,)])
def test_the_module(spec: WeightSpec, lead: tuple[int, ...], n: int) -> None:
    made = layer(spec, n)
    weight = made.dequantize().double().cuda()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.cuda()
    x = inputs(*lead, 384, dtype=torch.bfloat16)
    with torch.no_grad():
        y = made(x)
    assert made.is_packed and "packed" not in dict(made.named_buffers())
    assert y.shape == (*lead, n) and y.is_contiguous()
    if x.numel():
        wanted = torch.nn.functional.linear(x.double(), weight, made.bias.double())
        assert (y - wanted).norm() <= 0.01 * wanted.norm()
    after = made.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name].cpu(), before[name]) for name in before)
    made.cpu()
    assert not made.is_packed and made.packed.device.type == "cpu"
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def test_input_that_begins_anywhere() -> None:
    made = layer().cuda()
    with torch.no_grad():
        for tokens in (1, 9, 130):
            x = inputs(tokens * 384 + 1, dtype=torch.bfloat16)[1:].view(tokens, 384)
            assert torch.equal(made(x), made(x.clone()))


def test_input_that_is_not_contiguous() -> None:
    made = layer().cuda()
    x = inputs(384, 10, dtype=torch.bfloat16).T
    with torch.no_grad():
        assert torch.equal(made(x), made(x.contiguous()))


def test_packing_frees_the_parts() -> None:
    made = layer(n=4096, k=4096, bias=False).cuda()
    before = torch.cuda.memory_allocated()
    made.pack()
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_float32_runs_the_reference_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", set())
    made = layer(bias=False).cuda()
    x = inputs(3, 384, dtype=torch.float32)
    with torch.no_grad(), pytest.warns(UserWarning, match="many times slower"):
        y = made(x)
    assert not made.is_packed
    with torch.no_grad():
        made(x.bfloat16())
        assert made.is_packed and torch.equal(made(x), y)


def test_graphs_replay_with_new_inputs() -> None:
    made, x = layer().cuda(), inputs(5, 384, dtype=torch.bfloat16)
    with torch.no_grad():
        made(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        for seed in (7, 8):
            x.copy_(inputs(5, 384, dtype=torch.bfloat16, seed=seed))
            graph.replay()
            assert torch.equal(y, made(x))


def test_a_graph_is_not_the_place_to_pack() -> None:
    made, x = layer().cuda(), inputs(1, 384, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), pytest.raises(KernelError, match="run the model once"), torch.cuda.graph(graph):
        made(x)
    assert not made.is_packed
    with torch.no_grad():
        assert made(x).isfinite().all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("spec", [SPEC, RANKED], ids=lambda spec: spec.tag)
def test_compiled_code_keeps_the_kernel(spec: WeightSpec, mode: str) -> None:
    torch._dynamo.reset()
    model = torch.nn.Sequential(layer(spec), torch.nn.SiLU(), layer(SPEC, 203, 200)).cuda()
    x = inputs(4, 384, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for seed in range(1, 5):
            x.copy_(inputs(4, 384, dtype=torch.bfloat16, seed=seed))
            y, wanted = compiled(x).clone(), model(x)
            assert (y - wanted).norm() <= 0.01 * wanted.norm()


def test_compiled_code_that_meets_an_unsettled_layer() -> None:
    torch._dynamo.reset()
    model, x = torch.nn.Sequential(layer()).cuda(), inputs(4, 384, dtype=torch.bfloat16)
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"moepress\.warmup"):
            torch.compile(model, fullgraph=True)(x)
        torch._dynamo.reset()
        y = torch.compile(model)(x)
        assert model[0].is_packed and (y - model(x)).norm() <= 0.01 * y.norm()


def test_copies_and_moves_keep_the_result() -> None:
    made, x = layer().cuda(), inputs(3, 384, dtype=torch.bfloat16)
    with torch.no_grad():
        y = made(x)
        twin = copy.deepcopy(made)
        made.records.zero_()
        assert twin.is_packed and torch.equal(twin(x), y)
        twin.cpu().cuda()
        assert torch.equal(twin(x), y)
        made.load_state_dict(twin.state_dict())
        assert torch.equal(made(x), y)


def test_a_backward_pass_says_that_there_is_none() -> None:
    x = inputs(3, 384, dtype=torch.bfloat16).requires_grad_()
    with pytest.raises(KernelError, match="no gradients"):
        layer().cuda()(x).sum().backward()
