# SPDX-License-Identifier: Apache-2.0
"""Weights to quantise: real ones from the embedded model, and synthetic ones with a purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import moepress

MODEL = Path(moepress.__file__).parent / "demo" / "model" / "model.safetensors"


@pytest.fixture(scope="session")
def demo_weight() -> Callable[[str], torch.Tensor]:
    """demo_weight("0.self_attn.q_proj") -> that matrix of the embedded model, bfloat16."""

    @cache
    def get(name: str) -> torch.Tensor:
        with safe_open(MODEL, "pt") as file:
            return file.get_tensor(f"model.layers.{name}.weight")

    return get


@pytest.fixture(scope="session")
def gaussian() -> Callable[..., torch.Tensor]:
    """gaussian(n, k, seed=...) -> float32 values about as large as a language model's weights."""

    def get(n: int, k: int, seed: int = 0, size: float = 0.02) -> torch.Tensor:
        return size * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))

    return get
