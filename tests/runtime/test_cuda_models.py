# SPDX-License-Identifier: Apache-2.0
"""Whole models on a GPU: loaded, packed, generating, saved and moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moepress
from moepress.kernels import registry
from moepress.runtime.packable import Packable
from moepress.runtime.router import routers_of
from tiny import CONFIGS, EXPERTS, NATIVE, ROUTED, read_all, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
COMPILED = ("qwen3_moe", "deepseek_v3")
"""Families that are compiled as well; each takes a minute."""
RANKED = [
    *((family, "dense-8+sparse-16") for family in NATIVE if family != "granitemoe"),  # whose sides 64 does not divide
    ("qwen3_moe", "dense-20+sparse-20"), ("mixtral", "dense-1+sparse-64"),
]  # fmt: skip
"""Families and their compensators; ranks that divide 64, that do not, and that fill records."""


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)


def load(folder: Path, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **config: int) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device, **config)


def to_all_experts(family: str) -> dict[str, int]:
    """Overrides of a config so that each token goes to all experts, and near-ties of the router decide nothing.

    Weights of these models are random: where another shape's rounding sends one token to another expert, that token's
    logits change by as much as two thirds of their standard deviation.
    """
    groups = {"topk_group": CONFIGS[family]["n_group"]} if "n_group" in CONFIGS[family] else {}
    return {"num_experts_per_tok": EXPERTS, **groups}


def layers_of(model: Any) -> list[Packable]:
    return [module for module in model.modules() if isinstance(module, Packable)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens().to(model.device)).logits.double().cpu()


@pytest.mark.parametrize("family", NATIVE)
def test_logits(pressed: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pressed(family, method="rtn", group_size=32)
    model = load(folder)
    assert all(layer.is_packed for layer in layers_of(model)) and model.hf_quantizer.is_compileable
    exact = logits(load(folder, "cpu", torch.float32))
    monkeypatch.setenv(registry.OVERRIDE, "reference")
    plain = load(folder)
    assert not any(layer.is_packed for layer in layers_of(plain))
    error, yardstick = ((logits(each) - exact).norm() for each in (model, plain))
    assert 0 < error <= 2 * yardstick, f"{error / exact.norm():.3g} against {yardstick / exact.norm():.3g}"


def decoded(model: Any) -> torch.Tensor:
    """Logits of one sequence's last tokens, which come one by one."""
    ids, found = tokens()[:1].to(model.device), []
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        for at in range(3, ids.shape[1]):
            found.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found).double().cpu()


@pytest.mark.parametrize("run", [logits, decoded], ids=["prefill", "decode"])
@pytest.mark.parametrize(("family", "ranks"), RANKED)
def test_logits_with_compensators(
    pressed: Callable[..., Path], family: str, ranks: str, run: Callable[[Any], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = pressed(family, method="milo", group_size=32, ranks=ranks, iterations=0)
    routing = to_all_experts(family)
    model = load(folder, **routing)
    assert all(layer.is_packed for layer in layers_of(model)) and model.hf_quantizer.is_compileable
    exact = run(load(folder, "cpu", torch.float32, **routing))
    found = run(model)
    monkeypatch.setenv(registry.OVERRIDE, "reference")
    error, yardstick = ((each - exact).norm() for each in (found, run(load(folder, **routing))))
    assert 0 < error <= 2 * yardstick, f"{error / exact.norm():.3g} against {yardstick / exact.norm():.3g}"


@pytest.mark.parametrize("family", NATIVE)
def test_generate_with_a_static_cache(pressed: Callable[..., Path], family: str) -> None:
    torch._dynamo.reset()
    # float16: scores of 5 in bfloat16 lie 0.03 apart, and two of these are more than the bound below
    model = load(pressed(family, method="rtn", group_size=32), dtype=torch.float16, **to_all_experts(family))
    ids = tokens().cuda()
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False,
        cache_implementation="static", disable_compile=family not in COMPILED,
    )  # fmt: skip
    assert found.shape == (2, 21)
    with torch.no_grad():
        scores = model(found[:, :-1]).logits[:, 8:].float()
    spread, scores[..., 2] = scores.std(), -torch.inf  # min_new_tokens forbids the end of the text
    taken = scores.gather(-1, found[:, 9:, None])[..., 0]
    assert (scores.max(-1).values - taken).max() <= 0.05 * spread, "not greedy"


@pytest.mark.parametrize("family", ROUTED)
def test_routers_on_kernels_give_the_tokens_of_transformers_own(pressed: Callable[..., Path], family: str) -> None:
    model = load(pressed(family, method="rtn", group_size=32), dtype=torch.float16)
    ids = tokens().cuda()
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = model.generate(ids, **arguments)
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    assert len(logits) == len(routers_of(model)) and all(each.shape == (ids.numel(), EXPERTS) for each in logits)
    for router in routers_of(model):
        router.__class__ = type(router).__mro__[2]
    # a logit that rounds otherwise sends a token to another expert where two are nearly tied
    assert (model.generate(ids, **arguments) == found).float().mean() > 0.9


def test_a_model_that_is_moved(pressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = pressed("qwen2_moe", method="milo", group_size=32, ranks="dense-8+sparse-16", iterations=0)
    model = load(folder, "cpu")
    model.cuda()
    assert not any(layer.is_packed for layer in layers_of(model))
    first = logits(model)
    assert all(layer.is_packed for layer in layers_of(model))
    model.save_pretrained(tmp_path / "again")
    before, after = read_all(folder), read_all(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.cpu()
    assert not any(layer.is_packed for layer in layers_of(model))
    assert (logits(model) - first).norm() <= 0.03 * first.norm()
    moepress.warmup(model.cuda())
    assert all(layer.is_packed for layer in layers_of(model)) and model.hf_quantizer.is_compileable
    assert torch.equal(logits(model), first)


def test_a_graph_after_warmup_and_one_call(pressed: Callable[..., Path]) -> None:
    model = load(pressed("olmoe", method="rtn"), "cpu").cuda()
    moepress.warmup(model)
    x = torch.randn(1, 64, device="cuda").bfloat16()
    layer = next(each for each in layers_of(model) if hasattr(each, "bias"))
    with torch.no_grad():
        layer(x)  # loads what was compiled, which a capture forbids
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, layer(x))
