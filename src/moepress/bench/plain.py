# SPDX-License-Identifier: Apache-2.0
"""The 16-bit baselines: torch's own products of uncompressed weights.

For experts there are two ways, and neither wins everywhere: one grouped product for all experts, and one cuBLAS call
for each expert that was hit. Tokens are sorted and gathered before the clock runs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from moepress.bench.clock import Call
from moepress.bench.contenders import BASELINE, Contender
from moepress.bench.fused import silu_mul, weighted_sum
from moepress.bench.problems import DENSE, MOE, Draw, Problem
from moepress.bench.reference import dense_reference, moe_reference

STD = 0.02
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Sorted rows [M, K] and all experts' weights [E, N, K] -> [M, N]."""


class PlainDense(Contender):
    """torch.nn.functional.linear."""

    role, kinds = BASELINE, (DENSE,)

    def __init__(self, dtype: str) -> None:
        self.name = dtype

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        x = problem.draw(seed, device).x

        def call(weight: torch.Tensor) -> Call:
            return lambda: torch.nn.functional.linear(x, weight)

        return [call(self._weight(problem, seed, copy, device)) for copy in range(copies)]

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor:
        return dense_reference(problem.draw(seed, device), self._weight(problem, seed, 0, device))

    def _weight(self, problem: Problem, seed: int, copy: int, device: torch.device) -> torch.Tensor:
        return normal(problem.matrices[0], problem.torch_dtype, (seed, copy, 0, 0), device)


class PlainExperts(Contender):
    """Two products with silu(gate) * up between them and the weighted sum after them."""

    role, kinds = BASELINE, (MOE,)

    def __init__(self, dtype: str, *, grouped: bool) -> None:
        self.grouped = grouped
        self.name = f"{dtype} {'grouped' if grouped else 'by expert'}"

    def why_not(self, problem: Problem) -> str | None:
        if not self.grouped:
            return None
        if not hasattr(torch, "_grouped_mm"):
            return f"torch {torch.__version__} has no _grouped_mm"
        if torch.cuda.is_available() and (problem.dtype != "bf16" or torch.cuda.get_device_capability() < (9, 0)):
            return "torch._grouped_mm is a single kernel only for bf16 on compute capability 9.0 and later"
        return None

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        draw = problem.draw(seed, device)
        sort = sorted_by_expert(draw, problem.experts)
        x = draw.x[sort.order // problem.shape[1]]
        multiply = _grouped(sort.ends) if self.grouped else _by_expert(sort.ends.tolist())
        _, _, hidden, inner = problem.shape
        act = x.new_empty(len(x), inner)
        y = x.new_empty(problem.tokens, hidden)

        def call(gate_up: torch.Tensor, down: torch.Tensor) -> Call:
            def run() -> torch.Tensor:
                out = multiply(silu_mul(multiply(x, gate_up), act), down)
                return weighted_sum(out, sort.position, draw.weights, y)

            return run

        return [call(*self._copy(problem, seed, copy, device)) for copy in range(copies)]

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor:
        shapes = expert_shapes(problem)

        def weight(matrix: int) -> Callable[[int], torch.Tensor]:
            return lambda e: normal(shapes[matrix], problem.torch_dtype, (seed, 0, matrix, e), device)

        return moe_reference(problem.draw(seed, device), weight(0), weight(1))

    def _copy(self, problem: Problem, seed: int, copy: int, device: torch.device) -> list[torch.Tensor]:
        made = []
        for matrix, shape in enumerate(expert_shapes(problem)):
            made.append(torch.empty(problem.experts, *shape, dtype=problem.torch_dtype, device=device))
            for expert in range(problem.experts):
                fill(made[-1][expert], (seed, copy, matrix, expert))
        return made


class Sort:
    """Tokens sorted by expert. order [T * k]: sorted row -> token * k + choice; position [T, k] is its inverse;
    ends [E] int32: where each expert's rows end."""

    def __init__(self, ids: torch.Tensor, experts: int) -> None:
        flat = ids.flatten()
        self.order = torch.argsort(flat, stable=True)
        self.position = torch.argsort(self.order).view(ids.shape)
        self.ends = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)


def sorted_by_expert(draw: Draw, experts: int) -> Sort:
    assert draw.ids is not None
    return Sort(draw.ids, experts)


def expert_shapes(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """(N, K) of gate and up in one matrix, and of down."""
    _, _, hidden, inner = problem.shape
    return (2 * inner, hidden), (hidden, inner)


def normal(
    shape: tuple[int, ...], dtype: torch.dtype, seed: tuple[int, int, int, int], device: torch.device
) -> torch.Tensor:
    """Weights of standard deviation STD, the same for the same seed."""
    return fill(torch.empty(shape, dtype=dtype, device=device), seed)


def fill(weight: torch.Tensor, seed: tuple[int, int, int, int]) -> torch.Tensor:
    return weight.normal_(0, STD, generator=seeded(seed, weight.device))


def seeded(seed: tuple[int, int, int, int], device: torch.device) -> torch.Generator:
    """A generator for (seed, copy, matrix, expert)."""
    mixed = 0
    for part in seed:
        mixed = mixed * 1009 + part
    return torch.Generator(device).manual_seed(mixed)


def _grouped(ends: torch.Tensor) -> Multiply:
    return lambda rows, weight: torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


def _by_expert(ends: list[int]) -> Multiply:
    spans = [(e, first, last) for e, (first, last) in enumerate(pairwise([0, *ends])) if last > first]

    def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = rows.new_empty(len(rows), weight.shape[1])
        for expert, first, last in spans:
            torch.mm(rows[first:last], weight[expert].T, out=out[first:last])
        return out

    return multiply
