# SPDX-License-Identifier: Apache-2.0
"""CompressedLinear: stands where an nn.Linear stood."""

from __future__ import annotations

import torch
from torch import nn

from moepress.format.manifest import LinearEntry
from moepress.format.weight import dequantize
from moepress.kernels.linear.cuda import packed_linear
from moepress.kernels.linear.reference import compressed_linear
from moepress.kernels.linear.triton import triton_linear
from moepress.kernels.problem import LINEAR, Problem
from moepress.kernels.records import RecordLayout
from moepress.runtime.packable import Key, Packable, Side
from moepress.runtime.stored import StoredParts


class CompressedLinear(Packable, StoredParts):
    """x [..., K] -> [..., N] with a compressed weight; the bias, if any, is the layer's own and full precision.

    Packed, it holds a compensator twice, as stored and in records, which kernels read at their width.
    """

    prefixes = ("",)

    def __init__(self, entry: LinearEntry, bias: nn.Parameter | None) -> None:
        super().__init__(entry.spec, *entry.shape)
        self.register_parameter("bias", bias)
        self._forget()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._ready(x):
            run = triton_linear if self._on_triton(x) else compressed_linear
            return run(x, self.parts(), self.spec, self.out_features, self.in_features, self.bias)
        (weights,), (factors,) = self.banks(), self.factor_banks()
        return packed_linear(x, weights, self.spec, factors or self.factors(), self.out_features, self.bias)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K]."""
        return dequantize(self.parts(), self.spec, self.out_features, self.in_features)

    def kernel_layouts(self) -> tuple[RecordLayout, ...]:
        """Of all records that a call reads: the weight's, and its factors' where they have some."""
        (factors,) = self.factor_layouts()
        return self.layout(), *(factors or ())

    def _sides(self) -> tuple[Side, ...]:
        return (Side([(self, None)], ((0, 0),)),)

    def _problem(self, key: Key) -> Problem:
        return Problem(LINEAR, self.device, key[0], (self.layout(),), compensated=self._sides()[0].compensated())
