# SPDX-License-Identifier: Apache-2.0
"""Data-free statistics of a weight."""

from __future__ import annotations

import math

import torch

_CHUNK = 1 << 22


def excess_kurtosis(weight: torch.Tensor) -> float:
    """mean((w - mean)^4) / std^4 - 3 with the unbiased std, as MiLo defines it; 0 for a constant weight.

    MiLo evaluates it in the weight's own bfloat16; here sums are float64 over chunks, so that no copy of the whole
    weight is made. The two differ by the rounding of the published values (1/64 near 0).
    """
    flat = weight.reshape(-1)
    chunks = flat.split(_CHUNK)
    mean = sum(c.sum(dtype=torch.float64).item() for c in chunks) / flat.numel()
    second = fourth = 0.0
    for chunk in chunks:
        # not in place: float() of a float32 tensor is the caller's own; fourth powers leave float32's range early
        squares = chunk.float().sub(mean).square_().double()
        second += squares.sum().item()
        fourth += squares.square_().sum().item()
    variance = second / max(flat.numel() - 1, 1)
    return fourth / flat.numel() / variance**2 - 3 if 0 < variance < math.inf else 0.0
