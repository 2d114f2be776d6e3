# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's FP8 checkpoints: an e4m3 matrix and one float32 factor per 128 x 128 block, `<name>_scale_inv`.

Despite its name the factor multiplies: w = fp8 * scale_inv (DeepSeek-V3 technical report, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from moepress.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """`weight_block_size` of the source's quantization_config, (128, 128) where it says nothing."""
    given = config.get("quantization_config")
    size = given.get("weight_block_size") if isinstance(given, Mapping) else None
    if size is None:
        return 128, 128
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size)):
        raise CheckpointError(f"config.json: weight_block_size is {size!r}, not two positive numbers")
    return size[0], size[1]


def dequantize_blocks(name: str, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """e4m3 [N, K] and float32 [ceil(N / rows), ceil(K / columns)] -> bfloat16 [N, K]."""
    if weight.ndim != 2:
        raise CheckpointError(f"{name} is FP8 with shape {tuple(weight.shape)}; moepress reads FP8 matrices only")
    n, k = weight.shape
    expected = (math.ceil(n / block[0]), math.ceil(k / block[1]))
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"{name}{SCALE_SUFFIX} has shape {tuple(scale.shape)}; blocks of {block} in ({n}, {k}) need {expected}"
        )
    rows = scale.float().repeat_interleave(block[0], 0)[:n]
    return (weight.float() * rows.repeat_interleave(block[1], 1)[:, :k]).bfloat16()
