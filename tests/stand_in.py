# SPDX-License-Identifier: Apache-2.0
"""moepress.kernels.cuda.run by what its functions mean, on any device: everything around the kernels without a GPU.

Addresses in the tables are held against those of the records, so that a bank that outlives a move is noticed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import moepress.kernels.cuda as package
from moepress.kernels import banks
from moepress.kernels.cuda import router as router_launcher
from moepress.kernels.cuda import select as select_launcher
from moepress.kernels.cuda.bank import Factors
from moepress.kernels.experts.reference import run_experts
from moepress.kernels.records import RecordLayout, deinterleave, dequantize_records
from moepress.kernels.router.cuda import FEW, Selection
from moepress.kernels.router.reference import Routed, Routing, route
from moepress.kernels.selector.reference import Costs, log_costs, worth_running
from moepress.pruning.rule import rescale
from moepress.runtime.experts import BankLayouts

CHECKS_ADDRESSES = True
"""Off for checks that give an operation clones of its arguments."""


@dataclass(frozen=True)
class RecordBank:
    records: tuple[torch.Tensor, ...]
    layouts: tuple[RecordLayout, ...]
    where: tuple[tuple[int, int] | None, ...]
    table: torch.Tensor
    in_order: bool | None = None

    @classmethod
    def build(
        cls,
        records: Sequence[torch.Tensor],
        layouts: Sequence[RecordLayout],
        where: Sequence[tuple[int, int] | None],
        *,
        is_v: bool = False,
    ) -> RecordBank:
        for tensor, layout in zip(records, layouts, strict=True):
            assert tensor.dtype == torch.uint8 and tensor.is_contiguous() and tensor.shape[1:] == layout.shape
        rows = [cls.row(records, layouts, *place) if place else (0, 0) for place in where]
        table = torch.tensor(rows + [(0, 0)] * is_v, device=records[0].device)
        return cls(tuple(records), tuple(layouts), tuple(where), table)

    @staticmethod
    def row(records: Sequence[torch.Tensor], layouts: Sequence[RecordLayout], which: int, slot: int) -> tuple[int, int]:
        return records[which].data_ptr() + slot * layouts[which].num_bytes, layouts[which].word_bits

    def weight(self, expert: int) -> torch.Tensor:
        which, slot = self.where[expert] or (0, None)
        if CHECKS_ADDRESSES:
            wanted = (0, 0) if slot is None else self.row(self.records, self.layouts, which, slot)
            assert self.table[expert].tolist() == list(wanted), "the table points elsewhere"
        layout = self.layouts[which]
        if slot is None:
            return torch.zeros(layout.rows, layout.columns)
        return dequantize_records(self.records[which][slot], layout)


def whole(bank: RecordBank, factors: Factors | None, expert: int) -> torch.Tensor:
    """One expert's weight with its compensator."""
    weight = bank.weight(expert)
    if factors is None:
        return weight
    assert len(factors.v.where) == len(factors.u.where) == len(bank.where)
    rooms = [len(each.table) - len(each.where) for each in (bank, *factors)]
    assert rooms == [0, 1, 0], "v's table alone has room for t"
    return weight + factors.u.weight(expert) @ factors.v.weight(expert)


class Kernels(types.ModuleType):
    """The module; `calls` are the names of what was called, `compiled` what selectors and routers asked for."""

    def __init__(self) -> None:
        super().__init__("moepress.kernels.cuda.run")
        self.calls: list[str] = []
        self.warmed: list[Any] = []
        self.compiled: dict[str, set[Any]] = {}
        self.RecordBank, self.MAX_EXPERTS, self.MAX_SLOTS = RecordBank, 512, 32

    def why_not_linear(self, device: torch.device, dtype: torch.dtype, layout: RecordLayout) -> str | None:
        return self.why_not_columns(device, dtype, layout.columns)

    def why_not_columns(self, device: torch.device, dtype: torch.dtype, columns: int) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"inputs are {dtype}"
        return f"{columns} inputs are no multiple of 8" if columns % 8 else None

    def why_not_experts(
        self,
        device: torch.device,
        dtype: torch.dtype,
        gate_up: Sequence[RecordLayout],
        down: Sequence[RecordLayout],
        top_k: int,
        activation: str,
    ) -> str | None:
        if activation != "silu":
            return f"the activation is {activation}"
        return next(
            (reason for each in (*gate_up, *down) if (reason := self.why_not_linear(device, dtype, each))), None
        )

    def linear(
        self,
        x: torch.Tensor,
        bank: RecordBank,
        bias: torch.Tensor | None,
        out_features: int,
        factors: Factors | None = None,
    ) -> torch.Tensor:
        self.calls.append("linear" if factors is None else "linear with factors")
        assert x.is_contiguous() and x.data_ptr() % 16 == 0 and len(x) and (bias is None or bias.dtype == x.dtype)
        y = x.float() @ whole(bank, factors, 0).T
        assert y.shape[1] == out_features
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def experts(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: RecordBank,
        down: RecordBank,
        intermediate: int,
        gate_up_factors: Factors | None = None,
        down_factors: Factors | None = None,
    ) -> torch.Tensor:
        self.calls.append("experts")
        assert x.is_contiguous() and x.data_ptr() % 16 == 0 and len(x) and weights.dtype in (torch.float32, x.dtype)
        assert ids.dtype in (torch.int64, torch.int32)

        def expert(number: int, tokens: torch.Tensor) -> torch.Tensor:
            gate, up = deinterleave(whole(gate_up, gate_up_factors, number), intermediate)
            h = torch.nn.functional.silu(tokens @ gate.T) * (tokens @ up.T)
            return h @ whole(down, down_factors, number).T

        return run_experts(x.float(), ids, weights.float(), len(down.where), expert).to(x.dtype)

    def warm(
        self,
        linears: Sequence[Sequence[RecordLayout]],
        banks: Sequence[BankLayouts],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert all(isinstance(each, RecordLayout) for layouts in linears for each in layouts)
        for gate_up, down, _, *factors in banks:
            own = gate_up, down, *(layouts for both in factors for layouts in both or ())
            assert all(isinstance(each, RecordLayout) for layouts in own for each in layouts)
        self.warmed.append((len(linears), [top_k for _, _, top_k, *_ in banks], dtype, device.type))


def launch_select(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, costs: Costs, dial: torch.Tensor, renormalises: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The selector's launch by its definition."""
    assert all(each.is_contiguous() for each in (x, ids, weights, *costs)) and x.data_ptr() % 16 == 0 and len(x)
    assert weights.dtype in (torch.float32, x.dtype) and ids.dtype in (torch.int64, torch.int32)
    kept = worth_running(log_costs(x, ids, weights.float(), costs), 1 + dial)
    return ids.where(kept, -1), rescale(weights, kept, renormalises)


def launch_route(x: torch.Tensor, weight: torch.Tensor, routing: Routing, selection: Selection | None) -> Routed:
    """The router's launch by its definition."""
    assert x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype and 0 < len(x) <= FEW
    assert x.data_ptr() % 16 == weight.data_ptr() % 16 == 0 and x.shape[1] == weight.shape[1]
    logits, weights, ids = route(x, weight, routing)
    if selection is not None:
        ids, weights = launch_select(x, ids, weights, *selection)
    return logits, weights, ids


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Puts it in the place of the real module, and lets every device have kernels."""
    kernels = Kernels()
    for name, module, launch in (("select", select_launcher, launch_select), ("route", router_launcher, launch_route)):

        def noted(*arguments: Any, name: str = name, launch: Any = launch) -> Any:
            kernels.calls.append(name)
            return launch(*arguments)

        monkeypatch.setattr(module, f"launch_{name}", noted)
        monkeypatch.setattr(
            module, "warm", lambda dtype, kinds, name=name: kernels.compiled.setdefault(name, set()).update(kinds)
        )
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(package, "run", kernels, raising=False)
    monkeypatch.setattr(banks, "_why_not_device", lambda kind: None)
    return kernels
