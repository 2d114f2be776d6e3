# SPDX-License-Identifier: Apache-2.0
"""CompressedLinear: stands where an nn.Linear stood."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moepress.format.manifest import LinearEntry
from moepress.format.weight import dequantize
from moepress.kernels.banks import Weights, describe
from moepress.kernels.linear.cuda import packed_linear
from moepress.kernels.linear.factors import factor_layouts, pack_factors, why_not_records
from moepress.kernels.linear.reference import compressed_linear
from moepress.kernels.linear.triton import triton_linear
from moepress.kernels.problem import LINEAR, Problem
from moepress.kernels.records import RecordLayout
from moepress.runtime.packable import Key, Packable, Side
from moepress.runtime.stored import BASE, StoredParts


class CompressedLinear(Packable, StoredParts):
    """x [..., K] -> [..., N] with a compressed weight; the bias, if any, is the layer's own and full precision.

    Packed, it holds a compensator twice, as stored and in records, which kernels read at their width.
    """

    tables = ("table",)
    extras = ("v_records", "v_table", "u_records", "u_table")

    def __init__(self, entry: LinearEntry, bias: nn.Parameter | None) -> None:
        super().__init__(entry.spec, *entry.shape)
        self.register_parameter("bias", bias)
        self._forget()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._ready(x):
            run = triton_linear if self._on_triton(x) else compressed_linear
            return run(x, self.parts(), self.spec, self.out_features, self.in_features, self.bias)
        (weights,) = self.banks()
        factors = self._factor_banks() if "v_records" in self._buffers else self._factors()
        return packed_linear(x, weights, self.spec, factors, self.out_features, self.bias)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K]."""
        return dequantize(self.parts(), self.spec, self.out_features, self.in_features)

    def kernel_layouts(self) -> tuple[RecordLayout, ...]:
        """Of all records that a call reads: the weight's, and its factors' where they have some."""
        shape = self.spec, self.out_features, self.in_features
        ranked = self.spec.rank and not why_not_records(self.spec, self.in_features)
        return self.layout(), *(factor_layouts(*shape) if ranked else ())

    def _factors(self) -> dict[str, torch.Tensor]:
        return {name: self.get_buffer(name) for name in self.part_names if name not in BASE}

    def _make_banks(self) -> None:
        super()._make_banks()
        shape = self.spec, self.out_features, self.in_features
        if not self.spec.rank or why_not_records(self.spec, self.in_features):
            return
        from moepress.kernels.cuda import run

        for name, records, layout in zip(
            "vu", pack_factors(self._factors(), *shape), factor_layouts(*shape), strict=True
        ):
            self.register_buffer(f"{name}_records", records[None], persistent=False)
            bank = run.RecordBank.build([self.get_buffer(f"{name}_records")], [layout], [(0, 0)])
            self.register_buffer(f"{name}_table", bank.table, persistent=False)
            self._ready_factors[name] = bank

    def _factor_banks(self) -> tuple[Weights, Weights]:
        """Of v and u. By the names of buffers, so that torch.compile knows that their addresses do not change."""
        layouts = factor_layouts(self.spec, self.out_features, self.in_features)
        v, u = (
            Weights([self.get_buffer(f"{name}_records")], self.get_buffer(f"{name}_table"),
                    describe([layout], ((0, 0),)), None if torch.compiler.is_compiling() else self._ready_factors[name])
            for name, layout in zip("vu", layouts, strict=True)
        )  # fmt: skip
        return v, u

    def _forget(self) -> None:
        super()._forget()
        self._ready_factors: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_ready_factors": {}}

    def _sides(self) -> tuple[Side, ...]:
        return (Side([(self, None)], ((0, 0),)),)

    def _problem(self, key: Key) -> Problem:
        return Problem(LINEAR, self.device, key[0], (self.layout(),), rank=self.spec.rank)
