# SPDX-License-Identifier: Apache-2.0
"""CompressedLinear: stands where an nn.Linear stood."""

from __future__ import annotations

import torch
from torch import nn

from moepress.format.manifest import LinearEntry
from moepress.format.weight import dequantize
from moepress.kernels.linear.cuda import packed_linear
from moepress.kernels.linear.reference import compressed_linear
from moepress.kernels.problem import LINEAR, Problem
from moepress.runtime.packable import Key, Packable, Side
from moepress.runtime.stored import BASE, StoredParts


class CompressedLinear(Packable, StoredParts):
    """x [..., K] -> [..., N] with a compressed weight; the bias, if any, is the layer's own and full precision."""

    tables = ("table",)

    def __init__(self, entry: LinearEntry, bias: nn.Parameter | None) -> None:
        super().__init__(entry.spec, *entry.shape)
        self.register_parameter("bias", bias)
        self._forget()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._ready(x):
            return compressed_linear(x, self.parts(), self.spec, self.out_features, self.in_features, self.bias)
        (weights,) = self.banks()
        factors = {name: self.get_buffer(name) for name in self.part_names if name not in BASE}
        return packed_linear(x, weights, self.spec, factors, self.out_features, self.bias)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K]."""
        return dequantize(self.parts(), self.spec, self.out_features, self.in_features)

    def _sides(self) -> tuple[Side, ...]:
        return (Side([(self, None)], ((0, 0),)),)

    def _problem(self, key: Key) -> Problem:
        return Problem(LINEAR, self.device, key[0], (self.layout(),), rank=self.spec.rank)
