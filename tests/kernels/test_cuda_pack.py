# SPDX-License-Identifier: Apache-2.0
"""The packing kernel makes the bytes that torch's operations make, and is what layers are packed by on a GPU."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
from pack_cases import SHAPES, Case, check_codes, check_parts, random_bytes

from moepress.format.manifest import LinearEntry
from moepress.format.spec import BITS, GROUP_SIZES, WeightSpec
from moepress.kernels import packing, records, registry
from moepress.kernels.cuda import pack as launcher
from moepress.kernels.cuda.pack import launch_pack
from moepress.runtime.linear import CompressedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
N, K = 100, 320


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)


def forbidden(*_: object) -> NoReturn:
    raise AssertionError("this should not run")


def some_parts(spec: WeightSpec, *lead: int, seed: int = 0) -> dict[str, torch.Tensor]:
    groups = -(-K // spec.group_size)
    scale, zero = torch.randn((2, *lead, N, groups), generator=torch.Generator().manual_seed(seed)).half().cuda()
    packed = random_bytes(*lead, N, K * spec.bits // 8, seed=seed, device="cuda")
    return {"packed": packed, "scale": scale, "zero": zero}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_it_packs_as_torch_does(bits: int, group_size: int) -> None:
    for number, (rows, columns) in enumerate(SHAPES):
        for gate_up in (False, True):
            for shift in (0, 1, 4, 8):
                check_parts(launch_pack, Case(bits, group_size, rows, columns, 1 + number % 3, gate_up, shift), "cuda")
        check_codes(launch_pack, Case(bits, group_size, rows, columns, 1 + number % 3), "cuda")


@pytest.mark.parametrize("bits", BITS)
def test_matrices_of_models(bits: int) -> None:
    for rows, columns, experts, gate_up in ((14336, 4096, 2, True), (2048, 768, 9, False), (2880, 2880, 3, True)):
        check_parts(launch_pack, Case(bits, 64, rows, columns, experts, gate_up), "cuda")


def test_banks_beyond_four_gigabytes() -> None:
    case = Case(8, 64, 8192, 8192, 66)
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free memory")
    packed = torch.randint(0, 256, (66, 8192, 8192), dtype=torch.uint8, device="cuda")
    scale, zero = torch.randn((2, 66, 8192, 128), device="cuda").half()
    found = packing.pack_parts({"packed": packed, "scale": scale, "zero": zero}, case.spec, 8192, 8192)
    for expert in (0, 31, 32, 63, 64, 65):
        parts = {"packed": packed[expert], "scale": scale[expert], "zero": zero[expert]}
        assert torch.equal(found[expert], records.pack_parts(parts, case.spec, 8192, 8192))


def test_weights_on_a_gpu_are_packed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WeightSpec(bits=3, group_size=64)
    gate, up = some_parts(spec, 2, 3), some_parts(spec, 2, 3, seed=1)
    wanted = records.pack_parts(gate, spec, N, K), records.pack_gate_up(gate, up, spec, N, K)
    strided = {name: part.mT.contiguous().mT for name, part in gate.items()}
    with monkeypatch.context() as patch:
        patch.setattr(records, "_pack_chunks", forbidden)
        found = packing.pack_parts(strided, spec, N, K), packing.pack_gate_up(gate, up, spec, N, K)
    assert all(torch.equal(*both) and both[0].device == both[1].device for both in zip(found, wanted, strict=True))
    nothing = packing.pack_parts({name: part[:0] for name, part in gate.items()}, spec, N, K)
    assert nothing.shape == (0, *wanted[0].shape[1:])


def test_on_request_torch_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WeightSpec(bits=3, group_size=64)
    parts = some_parts(spec)
    by_kernel = packing.pack_parts(parts, spec, N, K)
    monkeypatch.setenv(registry.OVERRIDE, registry.REFERENCE)
    monkeypatch.setattr(launcher, "launch_pack", forbidden)
    assert torch.equal(packing.pack_parts(parts, spec, N, K), by_kernel)


def test_bad_parts_are_refused() -> None:
    spec = WeightSpec(bits=3, group_size=64)
    parts = some_parts(spec)
    with pytest.raises(AssertionError, match="packed must have shape"):
        packing.pack_parts(parts, spec, N, K + 64)
    with pytest.raises(AssertionError, match=r"scale must be torch\.float16, got torch\.bfloat16"):
        packing.pack_parts(parts | {"scale": parts["scale"].bfloat16()}, spec, N, K)
    with pytest.raises(AssertionError, match="parts are on cpu, their records on cuda:0"):
        packing.pack_parts(parts | {"zero": parts["zero"].cpu()}, spec, N, K)


def test_a_layer_is_packed_and_unpacked_again() -> None:
    spec = WeightSpec(bits=3, group_size=64)
    layer, parts = CompressedLinear(LinearEntry(spec, (N, K)), None).cuda(), some_parts(spec)
    for name, part in parts.items():
        layer.get_buffer(name).copy_(part)
    layer.pack()
    assert layer.is_packed
    layer.unpack()
    assert all(torch.equal(layer.get_buffer(name), part) for name, part in parts.items())
