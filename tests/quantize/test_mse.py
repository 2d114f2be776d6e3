# SPDX-License-Identifier: Apache-2.0
"""MSE: the least squared error of the data-free methods, and independent of how rows are taken."""

from __future__ import annotations

import pytest
import torch

from moepress.errors import CheckpointError
from moepress.format.weight import affine
from moepress.quantize import mse as module
from moepress.quantize.affine import AffineWeight
from moepress.quantize.gptq import GptqOptions, gptq, make_metric
from moepress.quantize.hqq import hqq
from moepress.quantize.mse import mse
from moepress.quantize.rtn import rtn


def _weight(rows: int = 48, columns: int = 200, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    return weight * (1 + torch.rand(rows, 1, generator=generator) * 3) + 0.02


def _error(weight: torch.Tensor, found: AffineWeight, group_size: int) -> float:
    return (affine(found.codes, found.scale, found.zero, group_size) - weight).square().sum().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_no_other_method_leaves_less(bits: int, group_size: int) -> None:
    weight = _weight()
    own = _error(weight, mse("w", weight, bits, group_size), group_size)
    assert own < _error(weight, rtn("w", weight, bits, group_size), group_size)
    # at 8 bits all that is left is rounding, and the two tell no difference
    assert own < (1.05 if bits == 8 else 1.0) * _error(weight, hqq("w", weight, bits, group_size), group_size)


def test_two_bits_gain_most() -> None:
    weight = _weight(64, 256)
    ratio = _error(weight, mse("w", weight, 2, 64), 64) / _error(weight, hqq("w", weight, 2, 64), 64)
    assert ratio < 0.75


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_it_is_gptq_on_inputs_that_are_all_alike(bits: int) -> None:
    weight = _weight()
    metric = make_metric(torch.eye(200).unsqueeze(0), GptqOptions(damping=0.0))
    (other,) = gptq(["w"], weight.unsqueeze(0), metric, [bits], 64, GptqOptions(damping=0.0, sweeps=0, act_order=False))
    found = mse("w", weight, bits, 64)
    assert torch.equal(found.codes, other.codes)
    assert torch.equal(found.scale, other.scale) and torch.equal(found.zero, other.zero)


def test_how_rows_are_taken_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight().bfloat16()
    whole = mse("w", weight, 3, 64)
    monkeypatch.setattr(module, "row_chunks", lambda w: (slice(i, i + 7) for i in range(0, len(w), 7)))
    parts = mse("w", weight, 3, 64)
    assert all(torch.equal(getattr(whole, k), getattr(parts, k)) for k in ("codes", "scale", "zero"))


def test_weights_too_large_for_fp16_are_named() -> None:
    with pytest.raises(CheckpointError, match="huge"):
        mse("huge", torch.randn(4, 64) * 1e9, 3, 64)
