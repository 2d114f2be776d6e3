# SPDX-License-Identifier: Apache-2.0
"""What a compressed weight means. One equation, obeyed by the quantisers, the runtime and every kernel:

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]  +  sum_r u[n, r] * v[r, k]        g = k // group_size

evaluated in float32 from fp16 scales and real-valued fp16 zeros (in code units). A factor is fp16, or integer with
one fp16 scale per 64 consecutive row-major elements: u = (code - 2**(bits - 1)) * scale. All functions accept leading
dimensions (experts) in front of the shapes given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from moepress.format.packing import unpack_codes
from moepress.format.spec import FACTOR_GROUP, WeightSpec

Parts = Mapping[str, torch.Tensor]
"""Tensors by local name: packed, scale, zero, and u/v or u_packed/u_scale/v_packed/v_scale (see WeightSpec.parts)."""


def dequantize(parts: Parts, spec: WeightSpec, out_features: int, in_features: int) -> torch.Tensor:
    """The float32 weight [..., N, K], compensator included."""
    weight = dequantize_base(parts, spec, in_features)
    if spec.rank:
        u, v = dequantize_factors(parts, spec, out_features, in_features)
        weight = weight + u @ v
    return weight


def dequantize_base(parts: Parts, spec: WeightSpec, in_features: int) -> torch.Tensor:
    """(codes - zero) * scale, float32 [..., N, K], without the compensator."""
    codes = unpack_codes(parts["packed"], spec.bits, in_features)
    return affine(codes, parts["scale"], parts["zero"], spec.group_size)


def affine(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """uint8 codes [..., N, K] with scale and zero [..., N, G] -> float32 [..., N, K]; the last group may be short."""
    count = codes.shape[-1]
    ragged = -count % group_size
    values = torch.nn.functional.pad(codes, (0, ragged)).unflatten(-1, (-1, group_size)).float()
    values = values.sub_(zero.float().unsqueeze(-1)).mul_(scale.float().unsqueeze(-1)).flatten(-2)
    return values[..., :count] if ragged else values


def dequantize_factors(
    parts: Parts, spec: WeightSpec, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 factors u [..., N, R] and v [..., R, K]."""
    shapes = {"u": (out_features, spec.rank), "v": (spec.rank, in_features)}
    if spec.factor_bits == 16:
        return parts["u"].float(), parts["v"].float()
    u, v = (
        dequantize_factor(parts[f"{name}_packed"], parts[f"{name}_scale"], spec.factor_bits, shape)
        for name, shape in shapes.items()
    )
    return u, v


def dequantize_factor(packed: torch.Tensor, scale: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """Integer factor codes -> float32 [..., *shape]."""
    count = math.prod(shape)
    codes = unpack_codes(packed, bits, count)
    centre = torch.full_like(scale, 2.0 ** (bits - 1))
    return affine(codes, scale, centre, FACTOR_GROUP).unflatten(-1, shape)
