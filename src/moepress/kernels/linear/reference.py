# SPDX-License-Identifier: Apache-2.0
"""y = x W^T (+ bias) for one compressed weight in plain torch: right on every device, and what kernels are held to."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts, dequantize_base, dequantize_factors


def compressed_linear(
    x: torch.Tensor,
    parts: Parts,
    spec: WeightSpec,
    out_features: int,
    in_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] in any float dtype -> [..., N] in that dtype.

    The weight is dequantised in float32 and rounded once to x's dtype. The compensator is applied as (x v^T) u^T,
    R (N + K) multiplications a token, instead of being multiplied out to N x K.
    """
    y = linear(x, dequantize_base(parts, spec, in_features).to(x.dtype), bias)
    if spec.rank:
        u, v = dequantize_factors(parts, spec, out_features, in_features)
        y = y + linear(linear(x, v.to(x.dtype)), u.to(x.dtype))
    return y
