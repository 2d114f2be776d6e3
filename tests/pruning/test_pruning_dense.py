# SPDX-License-Identifier: Apache-2.0
"""A compressed model's backward pass: the same outputs, the gradients of a dense model, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moepress.pruning.dense import dense_bytes, differentiable
from moepress.runtime.experts import ExpertBank
from moepress.runtime.linear import CompressedLinear
from tiny import tokens

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3")


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tiny: Callable[..., Path], pressed: Callable[..., Path]) -> tuple:
    """A compressed model, and the model of its source with the dequantised weights in it."""
    source = tiny(request.param)
    folder = pressed(request.param, method="milo", ranks="uniform-4", iterations=1, group_size=32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in ours.named_modules():
            if isinstance(module, CompressedLinear):
                dense.get_submodule(name).weight.copy_(module.dequantize())
            elif isinstance(module, ExpertBank):
                own = dense.get_submodule(name)
                for expert in range(module.num_experts):
                    gate, up, down = (each.dequantize(expert) for each in (module.gate, module.up, module.down))
                    own.gate_up_proj[expert].copy_(torch.cat([gate, up]))
                    own.down_proj[expert].copy_(down)
    return ours, dense


def logits_and_gradient(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded)
    return logits.detach(), gradient


def test_outputs_and_gradients_are_those_of_the_dense_model(pair: tuple) -> None:
    ours, dense = pair
    wanted = logits_and_gradient(dense)
    for keep in (True, False):
        with differentiable(ours, keep=keep):
            found = logits_and_gradient(ours)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_kept_weights_are_made_once_and_others_for_each_use(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair
    made = []
    make = CompressedLinear.dequantize
    monkeypatch.setattr(CompressedLinear, "dequantize", lambda module: made.append(module) or make(module))
    count = sum(isinstance(module, CompressedLinear) for module in ours.modules())
    for keep, wanted in ((True, count), (False, 4 * count)):
        made.clear()
        with differentiable(ours, keep=keep):
            for _ in range(2):
                logits_and_gradient(ours)
        assert len(made) == wanted


def test_nothing_is_left_behind(pair: tuple) -> None:
    ours, _ = pair
    before = [parameter.requires_grad for parameter in ours.parameters()]
    assert any(before)
    with differentiable(ours, keep=True):
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert [parameter.requires_grad for parameter in ours.parameters()] == before
    assert not any("forward" in vars(module) for module in ours.modules())


def test_bytes_of_dense_weights_are_counted(pair: tuple) -> None:
    ours, dense = pair
    replaced = {name for name, module in ours.named_modules() if isinstance(module, CompressedLinear | ExpertBank)}
    weights = (
        parameter for name, parameter in dense.named_parameters()
        if not name.endswith("bias") and (name.rpartition(".")[0] in replaced)
    )  # fmt: skip
    assert dense_bytes(ours, torch.bfloat16) == 2 * sum(weight.numel() for weight in weights)
    assert dense_bytes(dense, torch.bfloat16) == 0
