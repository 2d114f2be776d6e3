# SPDX-License-Identifier: Apache-2.0
"""ExpertBank: the routed experts of one layer, which may differ in bits and rank, behind transformers' experts call.

Experts with equal specs are stored stacked in a bucket; `expert -> (bucket, slot)` finds them. Each of gate, up and
down has its own buckets (gate and up have the same ones). Packed, a bucket of gate and that of up share their records,
and compensators are held twice, as stored and in records.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moepress.format.manifest import BankEntry
from moepress.format.spec import PROJECTIONS, WeightSpec
from moepress.format.weight import dequantize
from moepress.kernels.experts.cuda import packed_experts
from moepress.kernels.experts.reference import run_experts
from moepress.kernels.experts.triton import Bucket, slot_table, triton_experts
from moepress.kernels.linear.reference import compressed_linear
from moepress.kernels.problem import EXPERTS, SILU, Problem
from moepress.kernels.records import RecordLayout
from moepress.runtime.packable import Key, Packable, Side
from moepress.runtime.stored import StoredParts

Layouts = tuple[RecordLayout, ...]
BankLayouts = tuple[Layouts, Layouts, int, tuple[Layouts, Layouts] | None, tuple[Layouts, Layouts] | None]
"""Layouts of gate and up and of down, experts a token, and layouts of v and u for gate and up and for down."""


class Projection(nn.ModuleDict):
    """One of gate, up and down for all experts of a layer: buckets by spec tag."""

    def __init__(self, entry: BankEntry, projection: str) -> None:
        shape = entry.shape(projection)
        buckets = entry.buckets(projection)
        super().__init__({tag: StoredParts(WeightSpec.parse(tag), *shape, len(ids)) for tag, ids in buckets.items()})
        self.where = {expert: (tag, slot) for tag, ids in buckets.items() for slot, expert in enumerate(ids)}

    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, K] through one expert's weight."""
        bucket, slot = self._find(expert)
        return compressed_linear(x, bucket(slot), bucket.spec, bucket.out_features, bucket.in_features)

    def dequantize(self, expert: int) -> torch.Tensor:
        """One expert's float32 weight [N, K]."""
        bucket, slot = self._find(expert)
        return dequantize(bucket(slot), bucket.spec, bucket.out_features, bucket.in_features)

    def places(self) -> tuple[tuple[int, int], ...]:
        """Expert -> (number of its bucket, slot)."""
        numbers = {tag: number for number, tag in enumerate(self)}
        return tuple((numbers[tag], slot) for tag, slot in (self.where[expert] for expert in range(len(self.where))))

    def _find(self, expert: int) -> tuple[StoredParts, int]:
        tag, slot = self.where[expert]
        bucket = self[tag]
        assert isinstance(bucket, StoredParts)
        return bucket, slot


class ExpertBank(Packable):
    """hidden [T, H], ids [T, k], weights [T, k] -> [T, H]: down(act(gate(x)) * up(x)), weighted and summed."""

    prefixes = ("gate_up_", "down_")

    def __init__(self, entry: BankEntry, act_fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.num_experts, self.act_fn = entry.num_experts, act_fn
        self.gate, self.up, self.down = (Projection(entry, projection) for projection in PROJECTIONS)
        self.intermediate = entry.gate_up_shape[0]
        self._forget()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self._ready(flat, top_k_index.shape[-1]):
            banks = *self.banks(), self.intermediate, *self.factor_banks()
            out = packed_experts(flat, top_k_index, top_k_weights, *banks)
        elif self._on_triton(flat, top_k_index.shape[-1]):
            out = self._run_triton(flat, top_k_index, top_k_weights)
        else:
            out = run_experts(flat, top_k_index, top_k_weights, self.num_experts, self.run_expert)
        return out.view_as(hidden_states)

    def kernel_layouts(self, top_k: int) -> BankLayouts:
        """What decides which kernels a call needs where a token has `top_k` experts."""
        gate_up, down = self.layouts()
        gate_up_factors, down_factors = (both and ((both[0],), (both[1],)) for both in self.factor_layouts())
        return gate_up, down, top_k, gate_up_factors, down_factors

    def _run_triton(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up, down = (
            [Bucket(bucket.spec, bucket.parts()) for bucket in projection.values()]
            for projection in (self.gate, self.up, self.down)
        )
        if not self._slots:
            self._slots = tuple(slot_table(side.places(), x.device) for side in (self.gate, self.down))
        return triton_experts(x, ids, weights, gate, up, self._slots[0], down, self._slots[1], self.intermediate)

    def _forget(self) -> None:
        super()._forget()
        self._slots: tuple[torch.Tensor, ...] = ()

    def run_expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, H] through one expert, unweighted."""
        return self.down.linear(expert, self.act_fn(self.gate.linear(expert, x)) * self.up.linear(expert, x))

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """For model code that holds its experts in a list and calls them one by one."""
        number = range(self.num_experts)[expert]  # IndexError past the end, which is what ends a `for`
        return lambda x: self.run_expert(number, x)

    def _sides(self) -> tuple[Side, ...]:
        gate_up = Side([(gate, self.up[tag]) for tag, gate in self.gate.items()], self.gate.places())
        return gate_up, Side([(down, None) for down in self.down.values()], self.down.places())

    def _problem(self, key: Key) -> Problem:
        layouts = (tuple(dict.fromkeys(layouts)) for layouts in self.layouts())
        compensated = (side.compensated() for side in self._sides())
        dtype, top_k = key
        name = activation_name(self.act_fn)
        return Problem(EXPERTS, self.device, dtype, *layouts, *compensated, self.num_experts, top_k, name)


def activation_name(act_fn: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """ "silu" for the functions and modules of torch and transformers that are that; any other's own name."""
    name = getattr(act_fn, "__name__", type(act_fn).__name__)
    return SILU if name in ("silu", "SiLU", "SiLUActivation") else name
