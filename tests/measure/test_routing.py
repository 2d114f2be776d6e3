# SPDX-License-Identifier: Apache-2.0
"""What allocation policies read from a walk: the use of each expert, and the error of replacing one expert alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from walking import LENGTH, TOKENS, WINDOWS, change, disturbed, load, watching, window_ids

from moepress.errors import CalibrationError
from moepress.measure.routing import Routing
from moepress.measure.walk import Walk
from moepress.source import open_source
from tiny import EXPERTS, LAYERS, NATIVE

Tiny = Callable[..., Path]
SIGMOID = ("deepseek_v3", "glm4_moe")
DENSE_FIRST = ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")
LAST = LAYERS - 1


@torch.no_grad()
def model_routing(family: str, model: Any, bank: str) -> Routing:
    """Counted token by token from what the last layer's experts module got in one run of the whole model."""
    experts = model.get_submodule(bank)
    block = model.get_submodule(bank.rpartition(".")[0])
    router = block.router if family == "granitemoe" else block.gate
    with watching({"experts": experts}) as seen:
        model(window_ids(), use_cache=False)
    hidden, index, weight = seen["experts"]
    tokens = torch.zeros(EXPERTS, dtype=torch.int64)
    before, after = torch.zeros(EXPERTS, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
    for token in range(TOKENS):
        logits = hidden.reshape(TOKENS, -1)[token] @ router.weight.T
        probability = logits.sigmoid() if family in SIGMOID else logits.softmax(-1)
        for slot in range(2):
            expert = int(index[token, slot])
            tokens[expert] += 1
            before[expert] += float(probability[expert])
            after[expert] += float(weight[token, slot])
    return Routing(tokens, before, after)


@pytest.mark.parametrize("family", NATIVE)
def test_routing_is_that_of_the_model(family: str, tiny: Tiny, tmp_path: Path) -> None:
    with open_source(tiny(family)) as source:
        bank = source.graph.family.module_name(source.graph.family.bank.format(layer=LAST))
        expected = model_routing(family, load(tiny(family)), bank)
        for layer in Walk(source, window_ids(), folder=tmp_path, batch=3).layers():
            for _ in layer.stages():
                pass
            found = layer.routing
            assert (found is None) == (layer.number == 0 and family in DENSE_FIRST)
    assert found is not None
    assert torch.equal(found.tokens, expected.tokens)
    assert int(found.tokens.sum()) == 2 * TOKENS
    torch.testing.assert_close(found.weight_before, expected.weight_before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.weight_after, expected.weight_after, rtol=1e-5, atol=1e-5)
    renormalised = {"mixtral": 1.0, "granitemoe": 1.0, "deepseek_v3": 1.5, "glm4_moe": 1.0}.get(family)
    if renormalised is not None:
        assert found.weight_after.sum().item() == pytest.approx(renormalised * TOKENS, rel=1e-5)
        assert abs(found.weight_before.sum().item() - found.weight_after.sum().item()) > 1


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("batch_windows", [1, 3, 8])
def test_expert_error_is_the_change_of_the_models_block(
    family: str, batch_windows: int, tiny: Tiny, tmp_path: Path
) -> None:
    model = load(tiny(family))
    with open_source(tiny(family)) as source:
        bank = source.graph.family.module_name(source.graph.family.bank.format(layer=LAST))
        refs = {(r.expert, r.projection): r for r in source.graph.weights if r.layer == LAST and r.expert is not None}
        new = {key: disturbed(source.weight(ref).float(), seed=len(key[1])) for key, ref in refs.items()}
        expected = [brute_force(model, source, bank, refs, new, e, batch_windows) for e in range(EXPERTS)]
        walk = Walk(source, window_ids(), folder=tmp_path)
        for layer in walk.layers():
            for stage in layer.stages():
                for site in stage:  # what was replaced so far must not matter
                    if layer.number == LAST and (ref := site.refs[0]).expert is not None:
                        own = [new[ref.expert, projection] for projection in ("gate", "up", "down")]
                        error = layer.expert_error(ref.expert, *own, batch_windows=batch_windows)
                        assert error == pytest.approx(expected[ref.expert], rel=1e-4)
                        site.replace(ref.name, new[ref.expert, ref.projection])
            if layer.number == LAST:  # after the stages
                own = [new[1, projection] for projection in ("gate", "up", "down")]
                assert layer.expert_error(1, *own, batch_windows=batch_windows) == pytest.approx(expected[1], rel=1e-4)
    assert layer.routing is not None
    assert [error > 0.01 for error in expected] == [bool(tokens) for tokens in layer.routing.tokens]
    assert sum(error > 0.01 for error in expected) >= 2


@torch.no_grad()
def brute_force(model: Any, source: Any, bank: str, refs: Any, new: Any, expert: int, batch_windows: int) -> float:
    """Runs the model's whole MoE block with the one expert changed and back."""
    block = model.get_submodule(bank.rpartition(".")[0])
    with watching({"block": block}) as seen:
        model(window_ids(), use_cache=False)
    x = seen["block"][0].reshape(WINDOWS, LENGTH, -1)
    outputs = []
    for weights in (new, {key: source.weight(ref).float() for key, ref in refs.items()}):
        for projection in ("gate", "up", "down"):
            change(model, source, refs[expert, projection], weights[expert, projection])
        outputs.append(block(x).reshape(x.shape).double())
    return sum((outputs[0] - outputs[1])[first : first + batch_windows].norm().item()
               for first in range(0, WINDOWS, batch_windows))  # fmt: skip


def test_what_is_not_known_yet_or_any_more_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    one = torch.zeros(1, 1)
    with open_source(tiny("mixtral")) as source:
        layers = Walk(source, window_ids(), folder=tmp_path).layers()
        layer = next(layers)
        with pytest.raises(CalibrationError, match="routing of layer 0 is not known before its attention stages end"):
            _ = layer.routing
        with pytest.raises(CalibrationError, match="layer 0 has no expert inputs now"):
            layer.expert_error(0, one, one, one)
        for _ in layer.stages():
            pass
        with pytest.raises(CalibrationError, match="there is no expert 4; the layer has 4"):
            layer.expert_error(4, one, one, one)
        with pytest.raises(CalibrationError, match=r"w1.weight has shape \(1, 1\), the old one \(128, 64\)"):
            layer.expert_error(0, one, one, one)
        layer.finish()
        layer.finish()
        assert layer.routing is not None
        with pytest.raises(CalibrationError, match="no expert inputs now"):
            layer.expert_error(0, one, one, one)
