# SPDX-License-Identifier: Apache-2.0
"""CompressedLinear: stands where an nn.Linear stood."""

from __future__ import annotations

import torch
from torch import nn

from moepress.format.manifest import LinearEntry
from moepress.format.weight import dequantize
from moepress.kernels.linear.reference import compressed_linear
from moepress.runtime.stored import StoredParts


class CompressedLinear(StoredParts):
    """x [..., K] -> [..., N] with a compressed weight; the bias, if any, is the layer's own and full precision."""

    def __init__(self, entry: LinearEntry, bias: nn.Parameter | None) -> None:
        super().__init__(entry.spec, *entry.shape)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return compressed_linear(x, self.parts(), self.spec, self.out_features, self.in_features, self.bias)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K]."""
        return dequantize(self.parts(), self.spec, self.out_features, self.in_features)
