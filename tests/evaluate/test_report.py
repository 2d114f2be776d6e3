# SPDX-License-Identifier: Apache-2.0
"""Sizes counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moepress.errors import EvaluationError
from moepress.evaluate.report import bits_per_weight, resident_bytes


def test_bits_per_weight():
    assert bits_per_weight(300, 800) == 3.0
    assert bits_per_weight(0, 1) == 0.0


@pytest.mark.parametrize(("num_bytes", "num_weights", "message"), [(1, 0, "not 0"), (-1, 1, "-1 bytes")])
def test_impossible_sizes(num_bytes, num_weights, message):
    with pytest.raises(EvaluationError, match=message):
        bits_per_weight(num_bytes, num_weights)


def test_resident_bytes_count_each_storage_once():
    model = nn.Module()
    model.first = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)  # 30 bytes
    model.tied = nn.Linear(3, 5, bias=False)
    model.tied.weight = model.first.weight
    bank = torch.zeros(10, dtype=torch.uint8)  # 10 bytes, of which two buffers each show a part
    model.register_buffer("head", bank[:4])
    model.register_buffer("tail", bank[6:], persistent=False)
    model.register_buffer("empty", torch.empty(0))
    assert resident_bytes(model) == 40


def test_meta_tensors_have_no_bytes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(EvaluationError, match=r"1\.weight is on the meta device"):
        resident_bytes(model)
