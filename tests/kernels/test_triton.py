# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against float64 truth, with torch's own error in the same dtype as the yardstick.

On a GPU, or with TRITON_INTERPRET=1 on the CPU, where NumPy does what a GPU would do. Where Triton is installed and the
variable is not set, one test runs this file again in a process of its own that has it set.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_linear import inputs, random_parts

from moepress.errors import KernelError
from moepress.format.manifest import BankEntry
from moepress.format.spec import BITS, GROUP_SIZES, WeightSpec
from moepress.format.weight import dequantize, dequantize_base, dequantize_factors
from moepress.kernels.experts import triton as experts
from moepress.kernels.linear import triton as linear
from moepress.runtime.experts import ExpertBank, Projection
from moepress.runtime.stored import StoredParts

CPU = torch.device("cpu")
NOT_HERE = linear.why_not(CPU, torch.float32, 3)
INTERPRETED = NOT_HERE is None
GPU = torch.device("cuda", 0)
NO_GPU = linear.why_not(GPU, torch.float16, 3) if torch.cuda.is_available() else "no CUDA device here"
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason=f"needs TRITON_INTERPRET=1: {NOT_HERE}"))
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))])
on_devices = pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
RANKED = [
    WeightSpec(bits=3, group_size=64, rank=16, factor_bits=3),
    WeightSpec(bits=2, group_size=32, rank=7, factor_bits=3),
    WeightSpec(bits=1, group_size=128, rank=33, factor_bits=4),
    WeightSpec(bits=4, group_size=64, rank=5, factor_bits=8),
    WeightSpec(bits=8, group_size=64, rank=1, factor_bits=16),
]


@pytest.fixture(autouse=True)
def _bf16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as bit patterns, multiplies these, and cuts off where a GPU rounds."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    handle, cast_impl = interpreter.TensorHandle, interpreter.InterpreterBuilder.cast_impl

    def values(x: Any) -> Any:
        return (
            torch.from_numpy(x.data).view(torch.bfloat16).float().numpy() if x.dtype.scalar == tl.bfloat16 else x.data
        )

    def create_dot(self: Any, a: Any, b: Any, sums: Any, *others: Any) -> Any:
        return handle(values(a) @ values(b).astype("float32") + sums.data, sums.dtype.scalar)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, source, target)
        rounded = torch.tensor(source.data).bfloat16().view(torch.uint16)
        return handle(rounded.numpy(), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)


@pytest.fixture(autouse=True)
def _a_gpu_takes_16_bits(request: pytest.FixtureRequest) -> None:
    chosen = getattr(getattr(request.node, "callspec", None), "params", {})
    if chosen.get("device") == "cuda" and chosen.get("dtype") == torch.float32:
        pytest.skip("on a GPU the Triton kernels take 16-bit types")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.skipif(linear.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_this_file_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def check(y: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, what: str = "") -> None:
    """At most twice the error of torch in the same dtype."""
    assert y.dtype == plain.dtype and y.shape == truth.shape and y.isfinite().all(), what
    error, yardstick = ((found.double() - truth).abs() for found in (y, plain))
    eps = 1e-6 * truth.abs().max()
    rms, bound = error.square().mean().sqrt(), 2 * yardstick.square().mean().sqrt() + eps
    assert rms <= bound, f"{what}: rms {rms:.3g}, at most {bound:.3g}"
    spread = 2 if truth.numel() > 64 else 6  # the largest of a few errors is a matter of luck
    assert error.max() <= spread * yardstick.max() + eps, f"{what}: max {error.max():.3g}, torch {yardstick.max():.3g}"


# ---------------------------------------------------------------------------------------------- one matrix


def check_linear(
    x: torch.Tensor, parts: dict[str, torch.Tensor], spec: WeightSpec, n: int, k: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs the kernel, checks it and that it repeats; torch has the matrices of the format, in x's dtype."""
    product = torch.nn.functional.linear
    y = linear.triton_linear(x, parts, spec, n, k, bias)
    truth = product(x.double(), dequantize(parts, spec, n, k).double(), None if bias is None else bias.double())
    plain = product(x, dequantize_base(parts, spec, k).to(x.dtype), bias)
    if spec.rank:
        u, v = (factor.to(x.dtype) for factor in dequantize_factors(parts, spec, n, k))
        plain = plain + product(product(x, v), u)
    check(y, truth, plain, f"{spec.tag}, {list(x.shape)} x {n}")
    assert torch.equal(linear.triton_linear(x, parts, spec, n, k, bias), y), "not bitwise repeatable"
    return y


def shapes(device: str, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """Tokens, N, K. A GPU has time for large ones; the interpreter takes the ragged one only, but for float32."""
    small = [(5, 70, 131), (1, 33, 96), (20, 16, 64)]
    if device == "cpu":
        return small if dtype == torch.float32 else small[:1]
    return [*small, (1, 1000, 2048), (33, 333, 1000), (130, 512, 640), (600, 48, 4096)]


@on_devices
@in_dtypes
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_against_float64(bits: int, group_size: int, dtype: torch.dtype, device: str) -> None:
    spec = WeightSpec(bits=bits, group_size=group_size)
    for tokens, n, k in shapes(device, dtype):
        check_linear(inputs(tokens, k, dtype=dtype, device=device), random_parts(spec, n, k, device), spec, n, k)


@on_devices
@in_dtypes
@pytest.mark.parametrize("spec", RANKED, ids=lambda spec: spec.tag)
def test_a_compensator_against_float64(spec: WeightSpec, dtype: torch.dtype, device: str) -> None:
    for tokens, n, k in shapes(device, dtype):
        check_linear(inputs(tokens, k, dtype=dtype, device=device), random_parts(spec, n, k, device), spec, n, k)


@on_devices
@in_dtypes
@pytest.mark.parametrize("spec", [WeightSpec(bits=3), RANKED[0]], ids=lambda spec: spec.tag)
def test_a_bias_is_added_once(spec: WeightSpec, dtype: torch.dtype, device: str) -> None:
    n, k = 40, 128
    x, parts = inputs(9, k, dtype=dtype, device=device), random_parts(spec, n, k, device)
    bias = 3 * inputs(n, dtype=dtype, device=device, seed=2)
    with_bias = check_linear(x, parts, spec, n, k, bias)
    assert (with_bias - check_linear(x, parts, spec, n, k)).abs().max() > 1


@on_devices
@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3)])
def test_any_leading_dimensions_and_strides(lead: tuple[int, ...], device: str) -> None:
    spec, n, k = RANKED[0], 24, 128
    parts, x = random_parts(spec, n, k, device), inputs(*lead, 2 * k, dtype=torch.float32, device=device)[..., ::2]
    y = linear.triton_linear(x, parts, spec, n, k)
    assert y.shape == (*lead, n)
    flat = linear.triton_linear(x.reshape(-1, k).contiguous(), parts, spec, n, k)
    assert torch.equal(y.reshape(-1, n), flat)


@on_devices
def test_rows_do_not_depend_on_each_other(device: str) -> None:
    spec, n, k = RANKED[0], 24, 100
    parts, x = random_parts(spec, n, k, device), inputs(20, k, dtype=torch.float16, device=device)
    y = linear.triton_linear(x, parts, spec, n, k)
    x[5:] = float("nan")
    again = linear.triton_linear(x, parts, spec, n, k)
    assert torch.equal(again[:5], y[:5]) and again[5:].isnan().all()


TILES = sorted({linear.tile_for(rows, torch.float16) for rows in range(1, 300)})
by_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile)))


@on_devices
@by_tile
def test_every_tile(tile: linear.Tile, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(linear, "tile_for", lambda rows, dtype: tile)
    spec, (n, k) = RANKED[2], (70, 131)  # groups of 128, where steps are 64 to 256
    x = inputs(tile.rows + 2, k, dtype=torch.float16, device=device)
    check_linear(x, random_parts(spec, n, k, device), spec, n, k)


def at_the_end_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where a page begins that may not be read."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    whole = torch.frombuffer(area, dtype=torch.uint8, count=size)
    page = ctypes.c_void_p(whole.data_ptr() + size)
    assert ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = whole[size - tensor.nbytes :].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.skipif(not INTERPRETED or sys.platform != "linux", reason="needs TRITON_INTERPRET=1 and Linux")
@pytest.mark.parametrize("spec", [*(WeightSpec(bits=b, group_size=32) for b in BITS), *RANKED], ids=lambda s: s.tag)
def test_nothing_is_read_beyond_a_tensor(spec: WeightSpec) -> None:
    for k in (128, 131):  # the last code ends with its byte, or within it; reading further would end the process
        parts = {name: at_the_end_of_memory(part) for name, part in random_parts(spec, 33, k, "cpu").items()}
        x = at_the_end_of_memory(inputs(3, k, dtype=torch.float32, device="cpu"))
        check_linear(x, parts, spec, 33, k, at_the_end_of_memory(inputs(33, dtype=torch.float32, device="cpu")))


# ---------------------------------------------------------------------------------------------- experts

KINDS = {
    "alike": RANKED[:1],
    "all widths": [WeightSpec(bits=bits, group_size=32) for bits in BITS],
    "mixed": [*RANKED[:2], WeightSpec(bits=5, group_size=128), *RANKED[3:]],
}
SMALL, LARGE = (7, 40, 33), (16, 512, 200)
"""Experts, hidden, intermediate."""
Routing = Callable[[torch.Generator, int], torch.Tensor]
ROUTINGS: dict[str, Routing] = {
    "usual": lambda g, e: torch.rand(18, e, generator=g).topk(2).indices,
    "few tokens": lambda g, e: torch.rand(3, e, generator=g).topk(2).indices,
    "one token": lambda g, e: torch.tensor([[e - 1, 0]]),
    "all to one": lambda g, e: torch.full((72, 1), 4),  # of 18 tokens' errors the largest is luck
    "one expert twice": lambda g, e: torch.tensor([[3, 3], [2, 3], [3, 2], [5, 5], [0, 0]]),
    "some to nobody": lambda g, e: torch.tensor([[-1, 2], [e, 0], [5, -1], [10**6, -7], [3, 4]]),
    "one, some to nobody": lambda g, e: torch.tensor([[-(10**9), 10**9, 2]]),
    "all to nobody": lambda g, e: torch.tensor([[-1, e]] * 6),
    "no token": lambda g, e: torch.empty(0, 2, dtype=torch.long),
}


def bank(kind: str, size: tuple[int, int, int], device: str) -> ExpertBank:
    """Random stored tensors; experts take their specs in turn, those of down the other way round."""
    count, hidden, inner = size
    specs = [KINDS[kind][e % len(KINDS[kind])] for e in range(count)]
    made = ExpertBank(BankEntry((inner, hidden), (hidden, inner), (*specs,), (*specs[::-1],)), torch.nn.functional.silu)
    for seed, each in enumerate(module for module in made.modules() if isinstance(module, StoredParts)):
        for slot in range(each.count):
            made_parts = random_parts(each.spec, each.out_features, each.in_features, "cpu", seed=100 * seed + slot)
            for name, part in each.parts(slot).items():
                part.copy_(made_parts[name])
    return made.to(device)


def buckets(side: Projection) -> list[experts.Bucket]:
    return [experts.Bucket(bucket.spec, bucket.parts()) for bucket in side.values()]


def run(made: ExpertBank, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tables = [experts.slot_table(side.places(), x.device) for side in (made.gate, made.down)]
    return experts.triton_experts(
        x, ids, weights, buckets(made.gate), buckets(made.up), tables[0], buckets(made.down), tables[1],
        made.intermediate,
    )  # fmt: skip


def routed(routing: str, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Sequence[torch.Tensor]:
    """Hidden states, ids and weights."""
    generator = torch.Generator().manual_seed(1)
    ids = ROUTINGS[routing](generator, size[0])
    x = torch.randn(len(ids), size[1], generator=generator)
    weights = 0.1 + torch.rand(ids.shape, generator=generator)
    return x.to(device, dtype), ids.to(device), weights.to(device, dtype)


def expected(made: ExpertBank, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Expert by expert in x's dtype, with matrices and factors of that dtype; in float64 the truth."""

    def times(x: torch.Tensor, side: Projection, e: int) -> torch.Tensor:
        bucket, slot = side._find(e)
        parts, shape = bucket.parts(slot), (bucket.out_features, bucket.in_features)
        y = x @ dequantize_base(parts, bucket.spec, shape[1]).to(x.dtype).T
        if bucket.spec.rank:
            u, v = (factor.to(x.dtype) for factor in dequantize_factors(parts, bucket.spec, *shape))
            y = y + (x @ v.T) @ u.T
        return y

    y = torch.zeros_like(x)
    for slot in range(ids.shape[1]):
        for e in range(len(made)):
            own = (ids[:, slot] == e).nonzero().flatten()
            h = torch.nn.functional.silu(times(x[own], made.gate, e)) * times(x[own], made.up, e)
            y[own] += weights[own, slot, None].to(x.dtype) * times(h, made.down, e)
    return y


@pytest.fixture(scope="module")
def banks() -> dict[Any, ExpertBank]:
    return {}


@on_devices
@in_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_experts_against_float64(kind: str, dtype: torch.dtype, device: str, banks: dict[Any, ExpertBank]) -> None:
    for size in (SMALL,) if device == "cpu" else (SMALL, LARGE):
        made = banks.setdefault((kind, size, device), bank(kind, size, device))
        for routing in ROUTINGS if device == "cuda" or dtype == torch.float32 else ("usual",):
            x, ids, weights = routed(routing, size, dtype, device)
            before = x.clone()
            y = run(made, x, ids, weights)
            assert y.shape == x.shape and y.dtype == dtype and torch.equal(x, before)
            assert not y[((ids < 0) | (ids >= size[0])).all(1)].any(), "tokens of nobody get zeros"
            if len(x):
                truth = expected(made, x.double(), ids, weights.double())
                check(y, truth, expected(made, x, ids, weights), f"{routing}, {size}")
            if device == "cuda" or routing in ("few tokens", "some to nobody"):
                assert torch.equal(run(made, x, ids.int(), weights), y), f"{routing}: not bitwise repeatable"


@on_devices
def test_weights_of_another_dtype_are_used_as_they_are(device: str) -> None:
    made = bank("alike", SMALL, device)
    x, ids, weights = routed("usual", SMALL, torch.float16, device)
    exact = weights.float() + 1e-5
    y = run(made, x, ids, exact)
    assert y.dtype == torch.float16
    check(y, expected(made, x.double(), ids, exact.double()), expected(made, x, ids, exact))


@on_devices
@by_tile
def test_experts_in_every_tile(tile: linear.Tile, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(experts, "tile_for", lambda rows, dtype: tile)
    made = bank("alike", SMALL, device)
    x, ids, weights = routed("usual", SMALL, torch.float16, device)
    truth, plain = expected(made, x.double(), ids, weights.double()), expected(made, x, ids, weights)
    check(run(made, x, ids, weights), truth, plain)


@on_devices
def test_tokens_in_turns(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    made = bank("alike", SMALL, device)
    x, ids, weights = routed("usual", SMALL, torch.float16, device)
    truth, plain = expected(made, x.double(), ids, weights.double()), expected(made, x, ids, weights)
    monkeypatch.setattr(experts, "MAX_PAIRS", 15)
    check(run(made, x, ids, weights), truth, plain)


@on_devices
@pytest.mark.parametrize("routing", ["usual", "few tokens"])
def test_tokens_do_not_depend_on_each_other(routing: str, device: str) -> None:
    made = bank("alike", SMALL, device)
    x, ids, weights = routed(routing, SMALL, torch.float16, device)
    y = run(made, x, ids, weights)
    x[1] = float("nan")
    again = run(made, x, ids, weights)
    others = torch.arange(len(x), device=x.device) != 1
    assert torch.equal(again[others], y[others]) and again[1].isnan().all()


@given(
    ids=st.integers(1, 4).flatmap(
        lambda k: st.lists(st.lists(st.integers(-2, 7), min_size=k, max_size=k), min_size=1, max_size=40)
    ),
    count=st.integers(1, 6),
    rows=st.sampled_from([1, 2, 16]),
)
def test_blocks_hold_every_pair_once(ids: list[list[int]], count: int, rows: int) -> None:
    given_ids = torch.tensor(ids)
    for blocks in (experts.sorted_blocks(given_ids, count, rows), experts.few_blocks(given_ids)):
        seen = []
        for expert, first, last in zip(*(each.tolist() for each in blocks[1:]), strict=True):
            if 0 <= expert < count:
                own = blocks.pairs[first : min(last, first + rows)].tolist()
                assert own and all(given_ids.flatten()[pair] == expert for pair in own)
                seen += own
        assert sorted(seen) == [i for i, e in enumerate(given_ids.flatten().tolist()) if 0 <= e < count]


def test_a_slot_table_says_where_experts_are() -> None:
    table = experts.slot_table([(0, 0), (1, 0), (0, 1), (1, 1)], "cpu")
    assert table.dtype == torch.int32 and table.tolist() == [[0, -1, 1, -1], [-1, 0, -1, 1]]


# ---------------------------------------------------------------------------------------------- as torch sees them


@on_devices
def test_the_operations_are_what_they_stand_for(device: str) -> None:
    made, (x, ids, weights) = bank("mixed", SMALL, device), routed("usual", SMALL, torch.float32, device)
    spec, parts = RANKED[0], random_parts(RANKED[0], 24, SMALL[1], device)
    alone, routed_alone = linear.triton_linear(x, parts, spec, 24, SMALL[1]), run(made, x, ids, weights)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y, routed_y = linear.triton_linear(x, parts, spec, 24, SMALL[1]), run(made, x, ids, weights)
        assert torch.equal(y, alone) and torch.equal(routed_y, routed_alone)
        for each in (y, routed_y):
            with pytest.raises(KernelError, match="have no gradients"):
                each.sum().backward()


@on_devices
def test_compiled_code_keeps_the_operations(device: str) -> None:
    made, (x, ids, weights) = bank("mixed", SMALL, device), routed("usual", SMALL, torch.float32, device)
    spec, parts = RANKED[0], random_parts(RANKED[0], 24, SMALL[1], device)
    tables = [experts.slot_table(side.places(), x.device) for side in (made.gate, made.down)]
    sides = [buckets(side) for side in (made.gate, made.up, made.down)]

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = experts.triton_experts(
            x, ids, weights, *sides[:2], tables[0], sides[2], tables[1], made.intermediate
        )  # fmt: skip
        return y, linear.triton_linear(x, parts, spec, 24, SMALL[1])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), both(x), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("routing", ["usual", "one token"])
def test_graphs_replay_with_new_inputs_and_routing(routing: str) -> None:
    made, (x, ids, weights) = bank("mixed", LARGE, "cuda"), routed(routing, LARGE, torch.bfloat16, "cuda")
    tables = [experts.slot_table(side.places(), x.device) for side in (made.gate, made.down)]
    sides = [buckets(side) for side in (made.gate, made.up, made.down)]
    arguments = (x, ids, weights, *sides[:2], tables[0], sides[2], tables[1], made.intermediate)
    experts.triton_experts(*arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # an error if anything waits for the GPU
        y = experts.triton_experts(*arguments)
    for shift in (1, 5):
        x.mul_(0.7)
        ids.add_(shift).remainder_(LARGE[0] + 1)
        graph.replay()
        assert torch.equal(y, experts.triton_experts(*arguments))


# ---------------------------------------------------------------------------------------------- where they cannot run


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "triton", None)
    assert linear.why_not(CPU, torch.bfloat16, 3) == "Triton is not installed"
    assert experts.why_not(CPU, torch.bfloat16, (3, 4)) == "Triton is not installed"


@pytest.mark.skipif(linear.triton is None, reason="Triton is not installed")
def test_what_the_kernels_do_not_take() -> None:
    assert "not 7" in linear.why_not(CPU, torch.float16, 7)
    assert "not 7" in experts.why_not(CPU, torch.float16, (7, 3))
    assert "not float64" in linear.why_not(CPU, torch.float64, 3)
    assert "not gelu" in experts.why_not(CPU, torch.float16, (3,), "gelu")
    if INTERPRETED:
        assert "does not know bfloat16" in linear.why_not(CPU, torch.bfloat16, 3)
    else:
        assert "this layer is on cpu" in linear.why_not(CPU, torch.bfloat16, 3)


def test_gpus_that_triton_does_not_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = linear._why_not_gpu.__wrapped__
    monkeypatch.setattr(linear.shutil, "which", lambda name: name == "clang" or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and cuda:0 has 7.5" in why_not(GPU)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert why_not(GPU) is None
    monkeypatch.setattr(linear.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in why_not(GPU)
