# SPDX-License-Identifier: Apache-2.0
"""Packed layers are still what the checkpoint stored, and run on kernels where there are some (stand-ins, here)."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import moepress
from moepress.errors import KernelError
from moepress.format.manifest import BankEntry, LinearEntry
from moepress.format.packing import pack_codes
from moepress.format.spec import BITS, GROUP_SIZES, WeightSpec
from moepress.format.weight import dequantize
from moepress.kernels import registry
from moepress.kernels.banks import factor_arguments
from moepress.kernels.experts.cuda import experts_op
from moepress.kernels.factors import FactorShape
from moepress.kernels.linear.cuda import linear_op
from moepress.kernels.linear.reference import compressed_linear
from moepress.runtime.experts import ExpertBank
from moepress.runtime.linear import CompressedLinear
from moepress.runtime.packable import MADE, Packable
from moepress.runtime.stored import BASE, StoredParts
from stand_in import Kernels, stand_in
from tiny import EXPERTS, NATIVE, ROUTED, read_all, tokens

PLAIN = [WeightSpec(bits=bits, group_size=32) for bits in BITS]
NO_RECORDS = [WeightSpec(bits=3, group_size=32, rank=4, factor_bits=3), PLAIN[2]]
RANKS = (0, 16, 8, 0, 64, 20, 16)
"""Of seven experts' compensators; the second and the last have one spec, and so one bucket."""
specs = st.builds(
    WeightSpec, bits=st.sampled_from(BITS), group_size=st.sampled_from(GROUP_SIZES),
    rank=st.sampled_from((0, 0, 3)), factor_bits=st.just(0),
)  # fmt: skip


def spec_of(bits: int, group_size: int, rank: int) -> WeightSpec:
    return WeightSpec(bits=bits, group_size=group_size, rank=rank, factor_bits=8 if rank else 0)


def fill(module: torch.nn.Module, seed: int = 0) -> Any:
    """Random codes, scales, zeros and factors; spare bits of the last byte of a row are zero, as the format says."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.modules():
        if isinstance(each, StoredParts):
            lead = () if each.count is None else (each.count,)
            for name, part in each.parts().items():
                if name == "packed":
                    shape = (*lead, each.out_features, each.in_features)
                    codes = torch.randint(0, 2**each.spec.bits, shape, generator=generator, dtype=torch.uint8)
                    part.copy_(pack_codes(codes, each.spec.bits))
                elif part.dtype == torch.uint8:
                    part.copy_(torch.randint(0, 256, part.shape, generator=generator))
                else:
                    middle = 2.0 ** (each.spec.bits - 1) if name == "zero" else 0.1 / 2**each.spec.bits
                    part.copy_(middle * (0.5 + torch.rand(part.shape, generator=generator)))
    return module


def linear(spec: WeightSpec = PLAIN[2], n: int = 24, k: int = 72, bias: bool = True) -> CompressedLinear:
    own = torch.nn.Parameter(torch.linspace(-1, 1, n), requires_grad=False) if bias else None
    return fill(CompressedLinear(LinearEntry(spec, (n, k)), own))


def bank(gate_up: list[WeightSpec], down: list[WeightSpec], inner: int = 40, hidden: int = 72) -> ExpertBank:
    entry = BankEntry((inner, hidden), (hidden, inner), tuple(gate_up), tuple(down))
    return fill(ExpertBank(entry, torch.nn.functional.silu))


def mixed() -> ExpertBank:
    """Seven widths, in another order down than up."""
    return bank(PLAIN, PLAIN[::-1])


def compensated() -> ExpertBank:
    """Two widths, and ranks in another order down than up, some of them 0."""
    gate_up = [spec_of(3 if rank == 16 else 2, 32, rank) for rank in RANKS]
    down = [spec_of(4 if rank else 3, 32, rank) for rank in RANKS[::-1]]
    return weaker(bank(gate_up, down, inner=64, hidden=128))


def weaker(module: Any) -> Any:
    """With factors that do not drown what they are added to."""
    for each in module.modules():
        if isinstance(each, StoredParts):
            for part in each.factors().values():
                if part.dtype == torch.float16:
                    part.mul_(0.04 * (8 / each.spec.rank) ** 0.5)
    return module


def contents(module: torch.nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in module.state_dict().items()
    }


def routed(
    count: int = 5, experts: int = 7, dtype: torch.dtype = torch.bfloat16, hidden: int = 72
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(count, experts, generator=generator)
    top = scores.topk(2, dim=1)
    x = torch.randn(count, hidden, generator=generator).to(dtype)
    return x, top.indices, torch.softmax(top.values, 1).to(dtype)


def inputs_of(layer: Packable, **others: Any) -> tuple[torch.Tensor, ...]:
    """What `layer` takes: x and, for a bank, the routing."""
    if isinstance(layer, ExpertBank):
        return routed(hidden=layer.gate[next(iter(layer.gate))].in_features, **others)
    return routed(**others)[:1]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    return stand_in(monkeypatch)


# ---------------------------------------------------------------------------------------------- stored tensors


@settings(max_examples=60)
@given(
    bits=st.sampled_from(BITS), group_size=st.sampled_from(GROUP_SIZES), rank=st.sampled_from((0, 0, 2)),
    n=st.integers(3, 70), k=st.integers(3, 300), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_packed_linear_stores_the_same_bytes(
    bits: int, group_size: int, rank: int, n: int, k: int, seed: int
) -> None:
    layer = fill(CompressedLinear(LinearEntry(spec_of(bits, group_size, rank), (n, k)), None), seed)
    before, weight, names = contents(layer), layer.dequantize(), [name for name, _ in layer.named_buffers()]
    layer.pack()
    assert layer.is_packed and not set(BASE) & {name for name, _ in layer.named_buffers()}
    assert list(contents(layer)) == list(before) and contents(layer) == before
    assert torch.equal(layer.dequantize(), weight)
    layer.pack()
    layer.unpack()
    layer.unpack()
    assert not layer.is_packed and contents(layer) == before
    assert [name for name, _ in layer.named_buffers()] == names


@settings(max_examples=30)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.sampled_from((0, 0, 2))),
                   min_size=1, max_size=5),
    inner=st.integers(3, 40), hidden=st.integers(3, 140),
)  # fmt: skip
def test_a_packed_bank_stores_the_same_bytes(kinds: list[tuple[int, int, int]], inner: int, hidden: int) -> None:
    chosen = [spec_of(*kind) for kind in kinds]
    made = bank(chosen, chosen[::-1], inner, hidden)
    before = contents(made)
    dense = [made.gate.dequantize(e) for e in range(len(kinds))] + [made.up.dequantize(e) for e in range(len(kinds))]
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(1))
    y = [made[e](x) for e in range(len(kinds))]
    made.pack()
    assert made.is_packed and list(contents(made)) == list(before) and contents(made) == before
    again = [made.gate.dequantize(e) for e in range(len(kinds))] + [made.up.dequantize(e) for e in range(len(kinds))]
    assert all(torch.equal(a, b) for a, b in zip(again, dense, strict=True))
    assert all(torch.equal(made[e](x), y[e]) for e in range(len(kinds)))
    made.unpack()
    assert not made.is_packed and contents(made) == before


def test_records_replace_the_parts_in_memory() -> None:
    made = bank([PLAIN[2]] * 4, [PLAIN[3]] * 4, inner=128, hidden=256)
    before = sum(buffer.numel() * buffer.element_size() for buffer in made.buffers())
    made.pack()
    names = {name.rpartition(".")[2] for name, _ in made.named_buffers()}
    after = sum(buffer.numel() * buffer.element_size() for buffer in made.buffers())
    assert names == {"records"} and after == before
    assert "in records" in repr(made)


def test_packing_inside_inference_mode_leaves_ordinary_tensors() -> None:
    layer = linear()
    with torch.inference_mode():
        layer.pack()
    assert not layer.records.is_inference()
    with torch.inference_mode():
        layer.unpack()
    assert not layer.packed.is_inference()


# ---------------------------------------------------------------------------------------------- moves, loads, copies


@pytest.mark.parametrize("make", [linear, mixed, compensated])
def test_casts_never_round_a_packed_layer(make: Callable[[], Packable]) -> None:
    layer = make()
    stored = {name: value for name, value in contents(layer).items() if name != "bias"}
    layer.pack()
    for cast in (layer.bfloat16, layer.half, layer.double, lambda: layer.to(torch.float32)):
        cast()
        assert layer.is_packed
        assert {name: value for name, value in contents(layer).items() if name != "bias"} == stored


@pytest.mark.parametrize("make", [linear, mixed, compensated])
def test_loading_a_state_dict_unpacks(make: Callable[[], Packable]) -> None:
    layer, other = make(), fill(make(), seed=5)
    assert contents(layer) != contents(other)
    layer.pack()
    layer.load_state_dict(other.state_dict())
    assert not layer.is_packed and contents(layer) == contents(other)
    other.pack()
    layer.load_state_dict(other.state_dict())
    assert contents(layer) == contents(other)


def test_loading_into_a_part_of_a_packed_bank_is_refused() -> None:
    made = mixed()
    state = made.gate.state_dict()
    made.pack()
    with pytest.raises(KernelError, match="load into the whole layer"):
        made.gate.load_state_dict(state)


@pytest.mark.parametrize("make", [linear, mixed, compensated])
@pytest.mark.parametrize("pickled", [True, False])
def test_a_copy_makes_its_own_tables(make: Callable[[], Packable], pickled: bool, kernels: Kernels) -> None:
    layer = make()
    arguments = inputs_of(layer)
    with torch.no_grad():
        y = layer(*arguments)
        if pickled:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(layer)
        for buffer in layer.buffers():
            buffer.zero_()
        del layer
        assert twin.is_packed and torch.equal(twin(*arguments), y)
    assert len(kernels.calls) == 2


# ---------------------------------------------------------------------------------------------- choice and calls


def test_without_a_gpu_nothing_is_packed() -> None:
    layer, made = linear(), mixed()
    assert not layer.settle(torch.bfloat16) and not made.settle(torch.bfloat16, 2)
    layer(torch.randn(2, 72))
    made(*routed())
    assert not layer.is_packed and not made.is_packed


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("spec", [PLAIN[2], NO_RECORDS[0]], ids=lambda spec: spec.tag)
def test_a_linear_runs_on_the_kernel(lead: tuple[int, ...], spec: WeightSpec, kernels: Kernels) -> None:
    layer = linear(spec)
    x = torch.randn(*lead, 72, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = layer(x)  # float32: the reference
        found = layer.bfloat16()(x.bfloat16())
    assert layer.is_packed and kernels.calls == (["linear"] if math.prod(lead) else [])
    assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
    torch.testing.assert_close(found.float(), wanted, atol=0.1, rtol=0.02)


@pytest.mark.parametrize(
    ("rank", "bits", "call"),
    [
        (16, 4, "linear with factors"),
        (64, 3, "linear with factors"),
        (16, 16, "linear"),
        (24, 4, "linear with factors"),
    ],
    ids=["r16f4", "r64f3", "16 bits", "odd"],
)
def test_compensators_run_on_the_kernel_too(rank: int, bits: int, call: str, kernels: Kernels) -> None:
    """y = (W + u v) x in one call, where the factors can be records; as in the reference anyhow."""
    spec = WeightSpec(bits=3, group_size=64, rank=rank, factor_bits=bits)
    layer = fill(CompressedLinear(LinearEntry(spec, (72, 128)), torch.nn.Parameter(torch.randn(72))))
    for name in ("u", "v"):  # or they would drown the base
        layer.get_buffer(f"{name}_scale" if bits < 16 else name).mul_(0.1)
    before = contents(layer)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = layer(x)
        found = layer.bfloat16()(x.bfloat16())
        assert kernels.calls == [call]
        torch.testing.assert_close(found.float(), wanted, atol=0.02 * float(wanted.abs().max()), rtol=0.02)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x.bfloat16()), found)
        assert torch.equal(copy.deepcopy(layer)(x.bfloat16()), found)
    moepress.warmup(torch.nn.Sequential(layer), torch.bfloat16)
    assert kernels.warmed == [(1, [], torch.bfloat16, "cpu")]
    del before["bias"]
    assert {name: each for name, each in contents(layer).items() if name != "bias"} == before


def test_triton_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored parts go to Triton's functions as they are; their arithmetic has tests of its own."""
    from moepress.kernels.experts import triton as experts_triton
    from moepress.kernels.linear import triton as linear_triton
    from moepress.runtime import experts as experts_module
    from moepress.runtime import linear as linear_module

    calls = []

    def experts(x, ids, weights, gate, up, gate_up_slots, down, down_slots, intermediate):  # type: ignore[no-untyped-def]
        calls.append("experts")
        assert [each.spec for each in gate] == [each.spec for each in up] and intermediate == made.intermediate
        for buckets, slots, side in ((gate, gate_up_slots, made.gate), (down, down_slots, made.down)):
            for number, (expert, (bucket, slot)) in enumerate(enumerate(side.places())):
                assert slots[bucket, expert] == slot and number == expert
                part, own = buckets[bucket], side.dequantize(expert)
                parts = {name: tensor[slot] for name, tensor in part.parts.items()}
                assert torch.equal(dequantize(parts, part.spec, *own.shape), own)
        return torch.zeros_like(x)

    def dense(*arguments):  # type: ignore[no-untyped-def]
        calls.append("linear")
        return compressed_linear(*arguments)

    monkeypatch.setenv(registry.OVERRIDE, registry.TRITON)
    monkeypatch.setattr(linear_triton, "why_not", lambda device, dtype, bits: None)
    monkeypatch.setattr(experts_triton, "why_not", lambda device, dtype, bits, activation: None)
    monkeypatch.setattr(linear_module, "triton_linear", dense)
    monkeypatch.setattr(experts_module, "triton_experts", experts)
    layer, made, (x, ids, weights) = linear().bfloat16(), mixed(), routed()
    with torch.no_grad():
        assert layer(x).shape == (len(x), layer.out_features) and not layer.is_packed
        assert not made(x, ids, weights).any() and not made.is_packed
        made(x, ids, weights)
    assert calls == ["linear", "experts", "experts"]


def test_inputs_may_begin_anywhere(kernels: Kernels) -> None:
    layer, made, (x, ids, weights) = linear().bfloat16(), mixed(), routed()
    odd = torch.cat([torch.zeros(1), x.flatten()]).bfloat16()[1:].view_as(x)
    with torch.no_grad():
        assert torch.equal(layer(odd), layer(x)) and torch.equal(made(odd, ids, weights), made(x, ids, weights))


def test_a_mixed_bank_runs_on_the_kernels(kernels: Kernels) -> None:
    made = mixed()
    x, ids, weights = routed(6)
    ids[2, 1] = -1
    with torch.no_grad():
        wanted = made(x.float(), ids, weights)
        for given_ids in (ids, ids.int(), ids.to(torch.int16)):
            for given_weights in (weights, weights.float(), weights.double()):
                found = made(x.view(2, 3, 72), given_ids, given_weights)
                torch.testing.assert_close(found.view(6, 72).float(), wanted, atol=0.1, rtol=0.02)
    assert made.is_packed and kernels.calls == ["experts"] * 9
    assert made(x[:0], ids[:0], weights[:0]).shape == (0, 72)


def test_a_compensated_bank_runs_on_the_kernels(kernels: Kernels) -> None:
    made = compensated()
    before, plain = contents(made), compensated()
    x, ids, weights = routed(40, hidden=128)
    assert set(ids.flatten().tolist()) == set(range(7))
    ids[2, 1] = -1
    with torch.no_grad():
        wanted = made(x.float(), ids, weights)
        found = made(x, ids, weights)
        for each in plain.modules():
            if isinstance(each, StoredParts):
                for name, part in each.factors().items():
                    part.zero_() if name.endswith("scale") else None
        without = plain(x.float(), ids, weights)
    assert made.is_packed and kernels.calls == ["experts"]
    error, part = (found - wanted).norm() / wanted.norm(), (without - wanted).norm() / wanted.norm()
    assert error < 0.01 and part > 10 * error, f"error {error:.3g}, and {part:.3g} without compensators"
    assert contents(made) == before and list(contents(made)) == list(before)
    names = {name for name, _ in made.named_buffers() if name.endswith(MADE)}
    assert names == {f"{side}_{name}" for side in ("gate_up", "down") for name in MADE}
    assert made.gate_up_v_records.shape[0] == made.down_u_records.shape[0] == 5  # experts that have one


@pytest.mark.parametrize("side", ["gate_up", "down"])
def test_one_side_may_have_compensators_alone(side: str, kernels: Kernels) -> None:
    plain, ranked = [spec_of(3, 32, 0)] * 4, [spec_of(3, 32, 16)] * 4
    made = weaker(bank(*((ranked, plain) if side == "gate_up" else (plain, ranked)), inner=64, hidden=128))
    arguments = routed(experts=4, hidden=128)
    with torch.no_grad():
        wanted = made(*(each.float() if each.is_floating_point() else each for each in arguments))
        found = made(*arguments)
    assert kernels.calls == ["experts"] and (found - wanted).norm() < 0.01 * wanted.norm()
    assert {name for name, _ in made.named_buffers() if name.endswith("_records")} == {
        f"{side}_v_records", f"{side}_u_records"
    }  # fmt: skip


@pytest.mark.parametrize("make", [compensated])
def test_factors_in_records_go_with_the_tables(make: Callable[[], Packable], kernels: Kernels) -> None:
    """Unpacked, loaded into or moved, a layer has none, and makes them of what it then holds."""
    layer, other = make(), weaker(fill(make(), seed=5))
    arguments = inputs_of(layer)
    with torch.no_grad():
        first, second = layer(*arguments), other(*arguments)
        layer.load_state_dict(other.state_dict())
        assert not layer.is_packed and not any(name.endswith(MADE) for name, _ in layer.named_buffers())
        assert torch.equal(layer(*arguments), second) and not torch.equal(first, second)
        layer.unpack()
        assert not any(name.endswith(MADE) for name, _ in layer.named_buffers())
        assert torch.equal(layer(*arguments), second)


def test_a_bank_that_could_not_be_finished_is_made_again(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    made, arguments = compensated(), routed(hidden=128)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(FactorShape, "pack", lambda *_: torch.empty(1 << 60))
        with pytest.raises(RuntimeError):
            made(*arguments)
    assert not made.banks() and not made.factor_banks()
    with torch.no_grad():
        assert torch.equal(made(*arguments), compensated()(*arguments))


@pytest.mark.parametrize(
    "gate_up", [NO_RECORDS, [PLAIN[2], WeightSpec(bits=3, group_size=64)]], ids=["factors", "groups"]
)
def test_banks_without_a_kernel_stay_as_they_are(gate_up: list[WeightSpec], kernels: Kernels) -> None:
    made = bank(gate_up, [PLAIN[2]] * 2)
    with torch.no_grad():
        made(*routed(experts=2))
    assert not made.is_packed and not kernels.calls


def test_a_packed_layer_that_gets_float32_runs_the_reference(kernels: Kernels) -> None:
    layer, made = linear(), mixed()
    x, ids, weights = routed(dtype=torch.float32)
    with torch.no_grad():
        wanted = layer(x), made(x, ids, weights)
        layer(x.bfloat16()), made(x.bfloat16(), ids, weights)
        assert layer.is_packed and made.is_packed
        assert torch.equal(layer(x), wanted[0]) and torch.equal(made(x, ids, weights), wanted[1])
    assert kernels.calls == ["linear", "experts"]


@pytest.mark.parametrize("make", [linear, mixed, compensated])
def test_a_move_makes_new_tables(make: Callable[[], Packable], kernels: Kernels) -> None:
    layer = make()
    arguments = inputs_of(layer)
    with torch.no_grad():
        y = layer(*arguments)
        layer._apply(torch.clone)  # as .to() does: the records lie elsewhere
        assert not any(name.endswith(MADE) for name, _ in layer.named_buffers())
        assert torch.equal(layer(*arguments), y)


def test_the_override_holds_for_layers(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.OVERRIDE, "reference")
    layer = linear()
    layer.bfloat16()(routed()[0])
    assert not layer.is_packed and not kernels.calls
    monkeypatch.setenv(registry.OVERRIDE, "cuda")
    with pytest.raises(KernelError, match=r"cannot run linear here: inputs are torch\.float32"):
        linear(bias=False)(routed()[0].float())


def test_offloaded_layers_are_not_packed(kernels: Kernels) -> None:
    x, plain = routed()[0], linear().bfloat16()
    with torch.no_grad():
        wanted = plain(x)
        kernels.calls.clear()
        layer = torch.nn.Sequential(linear().bfloat16())
        cpu_offload(layer, execution_device=torch.device("cpu"), offload_buffers=True)
        for _ in range(2):
            torch.testing.assert_close(layer(x), wanted, atol=0.1, rtol=0.02)
    assert not kernels.calls and layer[0].holder().is_meta


@pytest.mark.parametrize("make", [mixed, compensated])
def test_offloaded_experts_compute_with_their_weights(make: Callable[[], ExpertBank], kernels: Kernels) -> None:
    arguments = inputs_of(make().bfloat16())
    with torch.no_grad():
        wanted = make().bfloat16()(*arguments)
        kernels.calls.clear()
        bank = make().bfloat16()
        cpu_offload(bank, execution_device=torch.device("cpu"), offload_buffers=True)
        for _ in range(2):
            torch.testing.assert_close(bank(*arguments), wanted, atol=0.1, rtol=0.02)
    assert not kernels.calls and bank.device.type == "meta"


# ---------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [linear, mixed, compensated])
def test_compiled_code_keeps_the_operation_whole(make: Callable[[], Packable], backend: str, kernels: Kernels) -> None:
    torch._dynamo.reset()
    layer = make().bfloat16()
    arguments = inputs_of(layer)
    layer.settle(torch.bfloat16, 2 if isinstance(layer, ExpertBank) else 1)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), layer(*arguments))
        assert torch.equal(compiled(*(tensor[:3] for tensor in arguments)), layer(*(t[:3] for t in arguments)))


@pytest.mark.parametrize("make", [linear, mixed, compensated])
def test_compiled_code_on_the_cpu_needs_no_settling(make: Callable[[], Packable]) -> None:
    torch._dynamo.reset()
    layer = make()
    arguments = inputs_of(layer, dtype=torch.float32)
    compiled = torch.compile(layer, backend="eager", fullgraph=isinstance(layer, CompressedLinear))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))


def test_the_operations_are_what_torch_expects(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stand_in.CHECKS_ADDRESSES", False)
    layer, made = linear().bfloat16(), mixed().bfloat16()
    layer.settle(torch.bfloat16)
    made.settle(torch.bfloat16, 2)
    x, ids, weights = routed()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    (own,), banks, no_factors = layer.banks(), made.banks(), ([], "")
    for bias in (None, layer.bias):
        torch.library.opcheck(linear_op, (x, *own[:3], bias, 24, *no_factors), test_utils=checks)
    torch.library.opcheck(
        experts_op, (x, ids, weights, *banks[0][:3], *banks[1][:3], made.intermediate, *no_factors, *no_factors),
        test_utils=checks,
    )  # fmt: skip
    ranked, arguments = compensated(), routed(hidden=128)
    ranked.settle(torch.bfloat16, 2)
    banks, factors = ranked.banks(), [each for both in ranked.factor_banks() for each in factor_arguments(both)]
    torch.library.opcheck(
        experts_op, (*arguments, *banks[0][:3], *banks[1][:3], ranked.intermediate, *factors), test_utils=checks
    )


def test_without_gradients_calls_go_past_the_operation(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear().bfloat16(), routed()[0]
    seen = []
    rebuilt = moepress.kernels.linear.cuda.rebuild
    monkeypatch.setattr(
        moepress.kernels.linear.cuda, "rebuild", lambda *arguments: seen.append(1) or rebuilt(*arguments)
    )
    with torch.no_grad():
        y = layer(x)
    assert not seen and torch.equal(layer(x), y) and seen


def test_a_backward_pass_says_that_there_is_none(kernels: Kernels) -> None:
    x, ids, weights = routed()
    x.requires_grad_()
    wide = routed(hidden=128)[0].requires_grad_()
    for y in (linear()(x), mixed()(x, ids, weights), compensated()(wide, ids, weights)):
        with pytest.raises(KernelError, match=r"no gradients: call the model under torch.no_grad\(\), or"):
            y.sum().backward()


# ---------------------------------------------------------------------------------------------- whole models


def layers_of(model: Any) -> list[Packable]:
    return [module for module in model.modules() if isinstance(module, Packable)]


@pytest.mark.parametrize("family", NATIVE)
def test_a_packed_model_saves_what_it_was_loaded_from(
    pressed: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = pressed(family, method="milo", group_size=32, ranks="dense-4+sparse-2", iterations=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(tokens()).logits
    for layer in layers_of(model):
        layer.pack()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, wanted)
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    before, after = read_all(folder), read_all(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("family", NATIVE)
def test_a_model_where_there_are_kernels(pressed: Callable[..., Path], family: str, kernels: Kernels) -> None:
    folder = pressed(family, method="rtn", group_size=32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(layer.is_packed for layer in layers_of(model))
    assert model.hf_quantizer.is_compileable
    with torch.no_grad():
        found = model(tokens()).logits.float()
    assert {"linear", "experts", *(("route",) if family in ROUTED else ())} == set(kernels.calls)
    for layer in layers_of(model):
        layer.unpack()
    assert not any(layer.is_packed for layer in layers_of(model))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        exact = wanted(tokens()).logits
    assert (found - exact).norm() < 0.05 * exact.norm()
    new = model.generate(tokens(), max_new_tokens=4, min_new_tokens=4, cache_implementation="static", do_sample=False)
    assert new.shape == (2, 13) and all(layer.is_packed for layer in layers_of(model))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_model_with_compensators_where_there_are_kernels(
    pressed: Callable[..., Path], tmp_path: Path, family: str, kernels: Kernels
) -> None:
    folder = pressed(family, method="milo", group_size=32, ranks="dense-8+sparse-16", iterations=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(layer.is_packed for layer in layers_of(model)) and model.hf_quantizer.is_compileable
    bank = next(layer for layer in layers_of(model) if isinstance(layer, ExpertBank))
    assert bank.gate_up_u_records.shape[0] == bank.down_v_records.shape[0] == EXPERTS
    with torch.no_grad():
        found = model(tokens()).logits.float()
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens()).logits
    assert "experts" in kernels.calls and (found - exact).norm() < 0.05 * exact.norm()
    model.save_pretrained(tmp_path / "again")
    before, after = read_all(folder), read_all(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    moepress.warmup(model)
    (warmed,) = kernels.warmed
    assert warmed[1:] == ([2], torch.bfloat16, "cpu")


def test_warmup_packs_and_compiles(
    pressed: Callable[..., Path], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(registry.OVERRIDE, "reference")
    model = AutoModelForCausalLM.from_pretrained(pressed("olmoe", method="rtn"), dtype=torch.bfloat16)
    assert not any(layer.is_packed for layer in layers_of(model)) and not model.hf_quantizer.is_compileable
    moepress.warmup(model)
    assert not kernels.warmed
    monkeypatch.delenv(registry.OVERRIDE)
    for layer in layers_of(model):
        layer._forget()
    moepress.warmup(model)
    assert all(layer.is_packed for layer in layers_of(model)) and model.hf_quantizer.is_compileable
    assert kernels.warmed == [(2, [2], torch.bfloat16, "cpu")]  # two shapes in attention; both layers are alike
    moepress.warmup(torch.nn.Sequential(linear(bias=False)), torch.float16)
    assert kernels.warmed[1:] == [(1, [], torch.float16, "cpu")]


@pytest.mark.parametrize(("chosen", "compileable"), [
    ({"method": "rtn"}, True),
    ({"method": "rtn", "keep": ("expert",)}, False),
    ({"method": "rtn", "keep": ("attn",)}, True),
    ({"method": "milo", "ranks": "dense-4", "iterations": 0}, True),
    ({"method": "milo", "ranks": "sparse-2", "iterations": 0}, True),
    ({"method": "milo", "ranks": "sparse-2", "iterations": 0, "factor_bits": 16}, False),
])  # fmt: skip
def test_generate_may_compile_where_no_expert_needs_a_loop(
    pressed: Callable[..., Path], chosen: dict[str, Any], compileable: bool, kernels: Kernels
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pressed("olmoe", **chosen), dtype=torch.bfloat16)
    assert model.hf_quantizer.is_compileable == compileable


def test_on_the_cpu_generate_does_not_compile(pressed: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pressed("olmoe", method="rtn"), dtype=torch.bfloat16)
    assert not model.hf_quantizer.is_compileable
    moepress.warmup(model)
    assert not any(layer.is_packed for layer in layers_of(model))
