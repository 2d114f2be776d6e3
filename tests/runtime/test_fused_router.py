# SPDX-License-Identifier: Apache-2.0
"""Routers of compressed models: transformers' own in all but what runs where there is a kernel (a stand-in, here)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

import moepress
from moepress.errors import CheckpointError
from moepress.graph.families import family_of
from moepress.kernels import registry
from moepress.kernels.cuda.router import Kind
from moepress.runtime.router import FusedRouter, adopt, routers_of
from stand_in import Kernels, stand_in
from tiny import EXPERTS, GREEDY, NATIVE, ROUTED, read_all, tiny_model, tokens

Folders = Callable[..., Path]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def greedy(tiny: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("greedy") / "pressed"
    moepress.compress_checkpoint(tiny("deepseek_v2", **GREEDY), folder, moepress.Settings(method="rtn", group_size=32))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model: Any, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(tokens(), **arguments)


@pytest.mark.parametrize("family", NATIVE)
def test_who_has_such_a_router(pressed: Folders, tiny: Folders, family: str) -> None:
    model = load(pressed(family, method="rtn", group_size=32))
    assert bool(routers_of(model)) == (family in ROUTED)
    assert not routers_of(load(tiny(family)))
    for router in routers_of(model):
        own = type(router).__mro__[2]
        assert own.__module__.startswith("transformers.") and type(router).__name__ == own.__name__
        assert list(router.state_dict()) == ["weight"]


@pytest.mark.parametrize("family", ROUTED)
def test_without_kernels_it_is_transformers_own(pressed: Folders, tmp_path: Path, family: str) -> None:
    model = load(pressed(family, method="rtn", group_size=32))
    found = logits(model, output_router_logits=True)
    for router in routers_of(model):
        router.__class__ = type(router).__mro__[2]
    wanted = logits(model, output_router_logits=True)
    assert torch.equal(found.logits, wanted.logits) and len(found.router_logits) == len(wanted.router_logits) > 0
    assert all(torch.equal(a, b) for a, b in zip(found.router_logits, wanted.router_logits, strict=True))
    again = load(pressed(family, method="rtn", group_size=32))
    again.save_pretrained(tmp_path / "again")
    before, after = read_all(pressed(family, method="rtn", group_size=32)), read_all(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", [*ROUTED, "deepseek_v2"])
def test_kernels_give_the_same_and_record_the_same(
    pressed: Folders, greedy: Path, family: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = greedy if family == "deepseek_v2" else pressed(family, method="rtn", group_size=32)
    model = load(folder)
    found = logits(model, output_router_logits=True)
    count = len(routers_of(model))
    assert count and kernels.calls.count("route") == count
    for router in routers_of(model):
        router.__class__ = type(router).__mro__[2]
    wanted = logits(model, output_router_logits=True)
    assert kernels.calls.count("route") == count
    assert torch.equal(found.logits, wanted.logits) and len(found.router_logits) == count
    assert all(torch.equal(a, b) for a, b in zip(found.router_logits, wanted.router_logits, strict=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_router_that_learns_is_transformers_own(pressed: Folders, family: str, kernels: Kernels) -> None:
    model = load(pressed(family, method="rtn", group_size=32))
    (router, *_), x = routers_of(model), torch.randn(5, 64).bfloat16()
    router.requires_grad_(True)
    router(x)[1].float().square().sum().backward()
    assert router.weight.grad.norm() > 0 and "route" not in kernels.calls
    leaf = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    router.requires_grad_(False)
    router(leaf)[0].float().sum().backward()
    assert leaf.grad.norm() > 0 and "route" not in kernels.calls
    router(x)
    assert "route" in kernels.calls
    kernels.calls.clear()
    assert router(torch.randn(5, 64)[None, :, :].bfloat16())[0].shape == (5, EXPERTS)
    with torch.no_grad(), pytest.raises(RuntimeError):  # torch's own words for what does not fit together
        router(x.float())
    router.float()
    assert router(x.float())[1].dtype == torch.float32 and kernels.calls == ["route"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(pressed: Folders, how: Callable[[Any], Any], kernels: Kernels) -> None:
    router = routers_of(load(pressed("olmoe", method="rtn", group_size=32)))[0]
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        wanted, twin = router(x), how(router)
        assert type(twin) is type(router) and twin.weight.data_ptr() != router.weight.data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(twin(x), wanted, strict=True))
    assert kernels.calls == ["route", "route"]


def test_what_accelerate_moves_in(pressed: Folders) -> None:
    model = load(pressed("qwen3_moe", method="rtn", group_size=32))
    wanted = logits(model).logits
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(model).logits, wanted)


def test_warmup_compiles_routers(pressed: Folders, kernels: Kernels) -> None:
    moepress.warmup(load(pressed("mixtral", method="rtn", group_size=32)))
    assert kernels.compiled["route"] == {(Kind(EXPERTS, 0, False), torch.device("cpu"))}


def test_a_router_that_is_not_there() -> None:
    model = tiny_model("mixtral")
    del model.model.layers[0].mlp.gate
    with pytest.raises(CheckpointError, match="MixtralSparseMoeBlock has no router gate"):
        adopt(model, family_of("mixtral"), "model.layers.0.mlp.experts")
    adopt(model, family_of("mixtral"), "model.layers.1.mlp.experts")
    adopt(model, family_of("mixtral"), "model.layers.1.mlp.experts")
    assert len(routers_of(model)) == 1 and isinstance(model.model.layers[1].mlp.gate, FusedRouter)
