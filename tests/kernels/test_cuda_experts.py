# SPDX-License-Identifier: Apache-2.0
"""Routed experts on the CUDA kernels against float64 truth; the yardstick is torch with dequantised matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from moepress.format.manifest import BankEntry
from moepress.format.packing import pack_codes
from moepress.format.spec import BITS, GROUP_SIZES, WeightSpec
from moepress.kernels import registry
from moepress.kernels.cuda import choose
from moepress.kernels.experts.reference import run_experts
from moepress.kernels.factors import stored_rank
from moepress.kernels.records import RecordLayout
from moepress.runtime.experts import ExpertBank
from moepress.runtime.stored import StoredParts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
TOKENS = (1, 2, 4, 7, 8, 9, 33, 130, 600)
SHAPES = {"ragged": (6, 2, 136, 40), "many": (64, 8, 256, 72), "wide": (8, 4, 512, 640), "one": (4, 1, 64, 200),
          "long": (128, 8, 128, 896), "low": (16, 2, 128, 192), "tall": (6, 4, 5120, 640),
          "deep": (4, 2, 256, 1600), "square": (8, 2, 4096, 2048), "flat": (4, 2, 1536, 256),
          "high": (4, 4, 128, 8704)}  # fmt: skip
"""Experts, chosen for a token, hidden, intermediate. "wide" is large enough at 7 and 8 tokens to pass on bytes of h;
"long" and, without passing on, "tall" have more row blocks a group of warps at 8 than may wait for u t, "high" at one;
"low" has teams of 32, 16 and 8 warps at 2, 4 and 7 tokens, and "tall" those of 24, where inputs take much of the
memory; in "deep" and "square" v is multiplied in parts at 33 tokens, and in "flat" gate and up alone make their own t
there."""
MIXED = "mixed"
IN_TURN = 32, 0
"""Ranks."""
CASES = [
    *((shape, bits, 64, torch.bfloat16) for shape in ("ragged", "wide") for bits in BITS),
    *(("many", bits, group_size, torch.bfloat16) for group_size in (32, 128) for bits in (2, 3)),
    *(("ragged", bits, 32, torch.float16) for bits in BITS),
    *((shape, MIXED, group_size, torch.bfloat16) for group_size in GROUP_SIZES for shape in ("ragged", "wide")),
    ("many", MIXED, 64, torch.float16), ("one", 3, 64, torch.bfloat16), ("one", MIXED, 128, torch.float16),
]  # fmt: skip
by_case = pytest.mark.parametrize(("shape", "bits", "group_size", "dtype"), CASES)

Routing = Callable[[torch.Generator, int, int, int], torch.Tensor]
ROUTINGS: dict[str, Routing] = {
    "usual": lambda g, t, k, e: torch.rand(t, e, generator=g).topk(k).indices,
    "skewed": lambda g, t, k, e: (torch.rand(t, e, generator=g) + torch.arange(e) ** 2 / e).topk(k).indices,
    "the same for all": lambda g, t, k, e: torch.randperm(e, generator=g)[:k].repeat(t, 1),
    "half to nobody": lambda g, t, k, e: torch.where(
        torch.rand(t, k, generator=g) < 0.5, -1, torch.rand(t, e, generator=g).topk(k).indices
    ),
    "all to nobody": lambda g, t, k, e: torch.tensor([-1, e, 10**6]).repeat(t * k)[: t * k].view(t, k),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """The kernels of all cases that run, side by side: a fraction of the time that they take one by one."""
    from moepress.kernels.cuda import run

    own = [item.callspec.params for item in request.session.items if item.path == request.path and has_shape(item)]
    for dtype in (torch.bfloat16, torch.float16):
        cases = {case_of(params) for params in own if params.get("dtype", torch.bfloat16) == dtype}
        banks = {bank(*case).kernel_layouts(SHAPES[case[0]][1]) for case in cases}
        run.warm([], sorted(banks, key=repr), dtype, torch.device("cuda", 0))


def has_shape(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and "shape" in item.callspec.params


def case_of(params: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of `bank` for a test of these; in those of shapes alone experts have compensators in turn."""
    shape, bits = params["shape"], params.get("bits", 3)
    if "group_size" in params:
        return shape, bits, params["group_size"]
    return shape, bits, 64, params.get("ranks", IN_TURN), params.get("factor_bits", 3)


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)


def bank(
    shape: str,
    bits: int | str,
    group_size: int,
    ranks: Sequence[int] = (0,),
    factor_bits: int = 4,
    halves: tuple[int, int] = (1, 1),
) -> ExpertBank:
    """On the CPU: random codes, a scale and a zero of its own for each group; ranks, and mixed widths, in turn.

    A 0 in `halves` takes compensators from gate and up, or from down.
    """
    experts, _, hidden, inner = SHAPES[shape]
    widths = [BITS[e % len(BITS)] if bits == MIXED else int(bits) for e in range(experts)]
    every = [ranks[e % len(ranks)] for e in range(experts)]
    gate_up, down = (
        tuple(
            WeightSpec(bits=b, group_size=group_size, rank=half * rank, factor_bits=factor_bits if half * rank else 0)
            for b, rank in zip(widths, every, strict=True)
        )
        for half in halves
    )
    entry = BankEntry((inner, hidden), (hidden, inner), gate_up, down[::-1])
    made = ExpertBank(entry, torch.nn.functional.silu)
    generator = torch.Generator().manual_seed(6)
    for each in made.modules():
        if isinstance(each, StoredParts):
            full = 2**each.spec.bits
            size = (each.count, each.out_features, each.in_features)
            codes = torch.randint(0, full, size, generator=generator, dtype=torch.uint8)
            each.packed.copy_(pack_codes(codes, each.spec.bits))
            each.scale.copy_(
                3.5 / each.in_features**0.5 / full * (0.5 + torch.rand(each.scale.shape, generator=generator))
            )
            each.zero.copy_(full * (0.3 + 0.4 * torch.rand(each.zero.shape, generator=generator)))
            for name, columns in (("u", each.spec.rank), ("v", each.in_features)) if each.spec.rank else ():
                fill_factor(each, name, columns, generator)
    return made


def fill_factor(parts: StoredParts, name: str, columns: int, generator: torch.Generator) -> None:
    """Random codes, with scales that make the compensator about as large as the weight."""
    packed, scale = getattr(parts, f"{name}_packed"), getattr(parts, f"{name}_scale")
    packed.copy_(torch.randint(0, 256, packed.shape, generator=generator, dtype=torch.uint8))
    scale.copy_(3.5 * (0.5 + torch.rand(scale.shape, generator=generator)) / columns**0.5 / 2**parts.spec.factor_bits)


def dense(made: ExpertBank, dtype: torch.dtype) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The same experts as plain matrices of that dtype."""
    matrices = [[getattr(made, p).dequantize(e).to(dtype) for p in ("gate", "up", "down")] for e in range(len(made))]

    def expert(e: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = matrices[e]
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    return expert


def routed(shape: str, tokens: int, routing: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    experts, chosen, hidden, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(tokens)
    ids = ROUTINGS[routing](generator, tokens, chosen, experts)
    x = torch.randn(tokens, hidden, generator=generator)
    weights = 0.1 + torch.rand(tokens, chosen, generator=generator)
    return x.to("cuda", dtype), ids.cuda(), weights.to("cuda", dtype)


def check(y: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, what: str) -> None:
    """At most twice the error of torch in the same dtype."""
    assert y.shape == truth.shape and y.dtype == plain.dtype and y.isfinite().all(), what
    error, yardstick = ((found.double() - truth).abs() for found in (y, plain))
    eps = 1e-6 * truth.abs().max()
    rms, bound = error.square().mean().sqrt(), 2 * yardstick.square().mean().sqrt() + eps
    assert rms <= bound, f"{what}: rms {rms:.3g}, at most {bound:.3g}"
    assert error.max() <= 2 * yardstick.max() + eps, f"{what}: max {error.max():.3g}, torch {yardstick.max():.3g}"


@by_case
def test_against_float64(shape: str, bits: int | str, group_size: int, dtype: torch.dtype) -> None:
    made = bank(shape, bits, group_size).cuda()
    exact, rounded = dense(made, torch.float64), dense(made, dtype)
    with torch.no_grad():
        for tokens in TOKENS:
            for routing in ROUTINGS:
                x, ids, weights = routed(shape, tokens, routing, dtype)
                what = f"{tokens} tokens, {routing}"
                y = made(x, ids, weights)
                truth = run_experts(x.double(), ids, weights.double(), len(made), exact)
                check(y, truth, run_experts(x, ids, weights, len(made), rounded), what)
                assert torch.equal(made(x, ids, weights), y), f"{what}: not bitwise repeatable"
                assert torch.equal(made(x, ids.int(), weights), y), f"{what}: ids as int32"
                check(made(x, ids, weights.float()), truth, run_experts(x, ids, weights, len(made), rounded), what)
    assert made.is_packed


@pytest.mark.parametrize(
    ("shape", "bits", "ranks", "factor_bits", "dtype"),
    [
        ("wide", 3, (32,), 4, torch.bfloat16), ("wide", 2, (0, 16, 64), 3, torch.float16),
        ("wide", MIXED, (8, 0), 8, torch.bfloat16), ("long", 3, (32,), 3, torch.bfloat16),
        ("long", 2, (0, 16), 3, torch.bfloat16), ("low", 3, (32, 0), 8, torch.bfloat16),
        ("low", 4, (32, 16), 3, torch.float16), ("tall", 3, (32,), 4, torch.float16),
        ("wide", 3, (0, 8), 3, torch.bfloat16), ("low", 4, (0, 32), 4, torch.float16),
        ("deep", 3, (32, 0), 3, torch.bfloat16), ("wide", 3, (192, 0), 4, torch.bfloat16),
        ("square", 3, (32, 0, 96), 3, torch.bfloat16), ("square", 1, (16,), 8, torch.bfloat16),
        ("flat", 3, (32, 0), 3, torch.bfloat16), ("high", 3, (32, 0), 3, torch.bfloat16),
    ],
)  # fmt: skip
def test_compensators_against_float64(
    shape: str,
    bits: int | str,
    ranks: tuple[int, ...],
    factor_bits: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(registry.OVERRIDE, "cuda")  # or another implementation could run in the kernels' place
    if shape in ("long", "tall", "high"):
        least = 1 if shape == "high" else 8
        assert row_blocks_of_a_group(shape, int(bits), least) > choose.PENDING, "these are to be tested"
    if shape in ("deep", "square"):
        assert parts_of_v(shape, int(bits), max(ranks), 33) > 1, "these are to be tested"
    made = bank(shape, bits, 64, ranks, factor_bits).cuda()
    exact, rounded = dense(made, torch.float64), dense(made, dtype)
    with torch.no_grad():
        for tokens in TOKENS:
            # the last has experts of 33 tokens, which are two tiles of 24
            for routing in ("usual", "half to nobody", *(["the same for all"] if tokens == 33 else [])):
                x, ids, weights = routed(shape, tokens, routing, dtype)
                y, what = made(x, ids, weights), f"{tokens} tokens, {routing}"
                truth = run_experts(x.double(), ids, weights.double(), len(made), exact)
                check(y, truth, run_experts(x, ids, weights, len(made), rounded), what)
                assert torch.equal(made(x, ids, weights), y), f"{what}: not bitwise repeatable"
    assert made.is_packed


@pytest.mark.parametrize("halves", [(1, 0), (0, 1)])
def test_compensators_of_one_half(halves: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves set each other's t to 0, so one without compensators has to as well: a second call would not wait."""
    monkeypatch.setenv(registry.OVERRIDE, "cuda")
    made = bank("wide", 3, 64, (32,), 3, halves).cuda()
    exact, rounded = dense(made, torch.float64), dense(made, torch.bfloat16)
    with torch.no_grad():
        for tokens in (1, 4, 8, 9, 18, 33, 1):  # 18 in tiles of 24
            for turn in range(3):
                x, ids, weights = routed("wide", tokens, "usual", torch.bfloat16)
                x = x.roll(turn, 1)  # what an earlier call left of t would be wrong
                truth = run_experts(x.double(), ids, weights.double(), len(made), exact)
                plain = run_experts(x, ids, weights, len(made), rounded)
                check(made(x, ids, weights), truth, plain, f"{tokens} tokens, call {turn}")


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("shape", ["wide", "low", "tall"])
def test_a_t_of_zeros_is_there(shape: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory 0 stands for what nobody has made yet. What one call left there is no other number of tokens'."""
    monkeypatch.setenv(registry.OVERRIDE, "cuda")
    made = bank(shape, 3, 64, IN_TURN, 3).cuda()
    x, ids, weights = routed(shape, tokens, "usual", torch.bfloat16)
    with torch.no_grad():
        whole, x = made(x, ids, weights), x.clone()
        x[::2] = 0
        y = made(x, ids, weights)
        assert not y[::2].any() and torch.equal(y[1::2], whole[1::2])
        one = made(x[-1:], ids[-1:], weights[-1:])
        assert torch.equal(made(x, ids, weights), y) and torch.equal(made(x[-1:], ids[-1:], weights[-1:]), one)


@pytest.mark.parametrize("tokens", [1, 6, 8])
@pytest.mark.parametrize("shape", ["wide", "long"])
def test_equal_ids_of_a_token_come_back(shape: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever warms up with zeros has them. Results mean nothing, but blocks may not wait for different rows of t."""
    monkeypatch.setenv(registry.OVERRIDE, "cuda")
    made = bank(shape, 3, 64, IN_TURN, 3).cuda()
    x, ids, weights = routed(shape, tokens, "usual", torch.bfloat16)
    with torch.no_grad():
        for same in (ids * 0, ids // 4 * 4, torch.full_like(ids, len(made) - 1)):
            assert made(x, same, weights).shape == x.shape
        torch.cuda.synchronize()
        assert made(x, ids, weights).isfinite().all()


def row_blocks_of_a_group(shape: str, bits: int, tokens: int) -> float:
    """Of gate and up in `gemv`, on average; an expert is run once for each four of its tokens."""
    from moepress.kernels.cuda.functions import processors_of, shared_bytes_of

    _, chosen, hidden, inner = SHAPES[shape]
    counts = routed(shape, tokens, "usual", torch.bfloat16)[1].flatten().bincount()
    gate_up, down = (choose.Bank((RecordLayout(*each, bits, 64),)) for each in ((2 * inner, hidden), (hidden, inner)))
    given = None, tokens, chosen, processors_of(0), shared_bytes_of(0) - choose.GEMV_STATIC
    team = choose.gemv_candidates("GATE_UP", gate_up, *given)[0]
    assert choose.gemv_candidates("DOWN", down, *given), "else another kernel runs"
    return int((-(-counts // 4)).sum()) * gate_up.row_blocks / (processors_of(0) * team.groups)


def parts_of_v(shape: str, bits: int, rank: int, tokens: int) -> int:
    """Of down, in `grouped`."""
    from moepress.kernels.cuda.functions import processors_of

    experts, chosen, hidden, inner = SHAPES[shape]
    down, v = (
        choose.Bank((RecordLayout(hidden, inner, bits, 64),)),
        choose.Bank((RecordLayout(stored_rank(rank), inner, 4, 64),)),
    )
    tile = choose.expert_tiles(down, tokens * chosen / experts)[0]
    assert tile.multiplies_v and not tile.takes_bytes
    return choose.v_split(tile, down, v, experts, tokens * chosen, processors_of(0)).splits


@pytest.mark.parametrize("tokens", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_of_very_different_sizes(tokens: int, dtype: torch.dtype) -> None:
    """x becomes integers below the largest of each segment: an outlier must not cost more than it does torch."""
    made = bank("wide", 3, 64).cuda()
    exact, rounded = dense(made, torch.float64), dense(made, dtype)
    x, ids, weights = routed("wide", tokens, "usual", dtype)
    x = x * torch.logspace(-4, 0, x.shape[1], device="cuda").to(dtype)  # segments of all sizes
    x[:, 5::97] *= 30
    with torch.no_grad():
        truth = run_experts(x.double(), ids, weights.double(), len(made), exact)
        check(made(x, ids, weights), truth, run_experts(x, ids, weights, len(made), rounded), f"{tokens} tokens")
        assert not made(torch.zeros_like(x), ids, weights).any()
        for bad in (float("inf"), float("nan")):
            spoilt = x.clone()
            spoilt[0, 70] = bad
            y = made(spoilt, ids, weights)
            assert y[0].isnan().all() and torch.equal(y[1:], made(x, ids, weights)[1:])


def test_tokens_do_not_depend_on_each_other() -> None:
    made = bank("many", 3, 32).cuda()
    x, ids, weights = routed("many", 600, "usual", torch.bfloat16)
    with torch.no_grad():
        y = made(x, ids, weights)
        x[300:] = float("nan")
        ids[300:] = -1
        again = made(x, ids, weights)
    torch.testing.assert_close(again[:300], y[:300], atol=0.02, rtol=0.02)  # tiles differ, and so may the order of sums
    assert not again[300:].any()


@pytest.mark.parametrize("ranks", [(8,), (0, 32)])
@pytest.mark.usefixtures("_new_memory_is_nan")
def test_compensators_of_tokens_do_not_depend_on_each_other(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products have columns without a token, which read a row of t that may never have been written."""
    monkeypatch.setenv(registry.OVERRIDE, "cuda")
    made = bank("wide", 3, 64, ranks, 3).cuda()
    with torch.no_grad():
        for tokens in (2, 3, 5, 8, 9, 18):  # the last in tiles of 24
            x, ids, weights = routed("wide", tokens, "usual", torch.bfloat16)
            ids[0] = -1
            y = made(x, ids, weights)
            assert y.isfinite().all() and not y[0].any(), f"{tokens} tokens"
            x[1] = float("nan")
            again = made(x, ids, weights)
            assert torch.equal(again[2:], y[2:]) and not again[0].any(), f"{tokens} tokens, the second NaN"


@pytest.fixture
def _new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_stored_tensors_survive() -> None:
    made = bank("ragged", MIXED, 64)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    one = made.run_expert(2, torch.ones(1, 136))
    made.cuda()
    x, ids, weights = routed("ragged", 3, "usual", torch.bfloat16)
    with torch.no_grad():
        y = made(x, ids, weights)
        assert made.is_packed
        torch.testing.assert_close(made[2](torch.ones(1, 136).cuda()).cpu(), one, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in made.state_dict().items())
    made.cpu()
    assert not made.is_packed and all(torch.equal(t, before[name]) for name, t in made.state_dict().items())
    made.cuda()
    with torch.no_grad():
        assert torch.equal(made(x, ids, weights), y)


def test_packing_frees_the_parts() -> None:
    def requested() -> int:
        """Not what is allocated: a block of a megabyte or more may be larger than what was asked for."""
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    made = bank("wide", 4, 64).cuda()
    before = requested()
    made.pack()
    assert requested() - before < 1 << 16


@pytest.mark.parametrize("tokens", [1, 5, 8, 40, 180])
@pytest.mark.parametrize(("shape", "width", "rank"), [("ragged", MIXED, 0), ("wide", 3, 32)])
def test_graphs_replay_with_new_inputs_and_routing(shape: str, width: int | str, rank: int, tokens: int) -> None:
    """Launches of a replay overlap: one that asked for the route too early would find that of the replay before."""
    made = bank(shape, width, 64, (rank,)).cuda()
    x, ids, weights = routed(shape, tokens, "usual", torch.bfloat16)
    with torch.no_grad():
        made(x, ids, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x, ids, weights)
        for routing in ("skewed", "half to nobody", "the same for all", "all to nobody"):
            for target, new in zip((x, ids, weights), routed(shape, tokens, routing, torch.bfloat16), strict=True):
                target.copy_(new)
            x.mul_(2)
            graph.replay()
            assert torch.equal(y, made(x, ids, weights)), routing


class Layer(torch.nn.Module):
    """A router and its experts."""

    def __init__(self, made: ExpertBank, chosen: int, hidden: int) -> None:
        super().__init__()
        self.experts, self.chosen = made, chosen
        self.router = torch.nn.Linear(hidden, len(made), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = torch.softmax(self.router(x), -1, dtype=torch.float32).topk(self.chosen)
        return x + self.experts(x, top.indices, top.values)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_keeps_the_kernels(mode: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = Layer(bank("ragged", MIXED, 64), 2, 136).bfloat16().cuda()
    with torch.no_grad():
        x = torch.randn(4, 136, device="cuda").bfloat16()
        model(x)
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(4):
            x.copy_(torch.randn(4, 136))
            y, wanted = compiled(x).clone(), model(x)
            assert (y - wanted).norm() <= 0.02 * wanted.norm()


def test_a_bank_with_compensators_of_16_bits_runs_the_reference_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", set())
    specs = (WeightSpec(bits=3, group_size=64, rank=2, factor_bits=16), WeightSpec(bits=3, group_size=64))
    made = ExpertBank(BankEntry((72, 64), (64, 72), specs, specs), torch.nn.functional.silu).cuda()
    for buffer in made.buffers():
        buffer.zero_()
    x, ids = torch.ones(2, 64, device="cuda").bfloat16(), torch.zeros(2, 1, dtype=torch.long, device="cuda")
    with torch.no_grad(), pytest.warns(UserWarning, match="factors of 16 bits have no records"):
        made(x, ids, torch.ones(2, 1, device="cuda").bfloat16())
    assert not made.is_packed
