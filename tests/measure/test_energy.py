# SPDX-License-Identifier: Apache-2.0
"""Routed energy: against sampled inputs, and the rules about routing weights and gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.errors import PlanError
from moepress.measure.energy import BOUNDS, routed_energy
from moepress.source import open_source
from tiny import LAYERS

Tiny = Callable[..., Path]


def _found(folder: Path, scale: float = 1.0, **config: Any) -> dict[int, float]:
    with open_source(folder) as src:

        def weight(ref: Any) -> torch.Tensor:
            return src.weight(ref).float() * (scale if ref.group == "expert" else 1.0)

        return routed_energy(src.graph, src.reader.config | config, weight, lambda layer: None)


def test_without_shared_experts_the_ratio_is_one(tiny: Tiny) -> None:
    assert _found(tiny("olmoe")) == dict.fromkeys(range(LAYERS), 1.0)


def test_the_ratio_is_that_of_sampled_inputs(tiny: Tiny) -> None:
    folder = tiny("qwen2_moe")
    found = _found(folder, 30.0)
    generator = torch.Generator().manual_seed(0)
    with open_source(folder) as src:
        top_k = src.reader.config["num_experts_per_tok"]
        for layer, ratio in found.items():
            refs = [ref for ref in src.graph.weights if ref.layer == layer and ref.group in ("shared", "expert")]
            energies: dict[int | None, float] = {}
            for expert in {ref.expert for ref in refs}:
                size = 30.0 if expert is not None else 1.0
                w = {r.projection: src.weight(r).float() * size for r in refs if r.expert == expert}
                x = torch.randn(4000, w["gate"].shape[1], generator=generator)
                inner = torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)
                energies[expert] = (inner @ w["down"].T).square().sum(1).mean().item()
            routed = torch.tensor([value for expert, value in energies.items() if expert is not None][:4]).quantile(0.5)
            norm = 1.0 if src.reader.config.get("norm_topk_prob", True) else 0.25
            expected = float(routed) * norm / top_k / (0.25 * energies[None])
            assert ratio == pytest.approx(min(max(expected, BOUNDS[0]), BOUNDS[1]), rel=0.1)


def test_routing_weights_count(tiny: Tiny) -> None:
    folder = tiny("deepseek_v3")
    plain = _found(folder, routed_scaling_factor=1.0, norm_topk_prob=True, num_experts_per_tok=4)
    moe = [layer for layer, value in plain.items() if BOUNDS[0] < value < BOUNDS[1] / 4]
    assert moe
    doubled = _found(folder, routed_scaling_factor=2.0, norm_topk_prob=True, num_experts_per_tok=4)
    left = _found(folder, routed_scaling_factor=2.0, norm_topk_prob=False, num_experts_per_tok=4)
    for layer in moe:
        assert doubled[layer] == pytest.approx(4 * plain[layer])
        assert left[layer] == pytest.approx(plain[layer])


@pytest.mark.parametrize("value", [None, 0, -1, 2.0, "2", True])
def test_a_missing_top_k_is_told(value: Any, tiny: Tiny) -> None:
    with pytest.raises(PlanError, match=r"config\.json says .* num_experts_per_tok of at least 1"):
        _found(tiny("qwen2_moe"), num_experts_per_tok=value)
