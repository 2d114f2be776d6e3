# SPDX-License-Identifier: Apache-2.0
"""Humming (PyPI humming-kernels 0.1.19): any-bit dense and MoE GEMMs, compiled by NVRTC at first use.

Weights are asymmetric with 16-bit scales and real-valued zeros, like ours, where its kernels can; tiles are those of
its own heuristics for the row count. A layer of experts is its indexed GEMM, silu(gate) * up, the indexed GEMM again
with one row for each token and choice, and the weighted sum. Tokens are sorted into blocks before the clock runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from moepress.bench.clock import Call
from moepress.bench.contenders import Contender
from moepress.bench.fused import silu_mul, weighted_sum
from moepress.bench.humming_parts import (
    Packed,
    aligned,
    compile_ahead,
    dequantize,
    has_zero,
    kernel,
    layer_config,
    pack,
    random_parts,
    rows_of,
    shapes_of,
)
from moepress.bench.problems import Draw, Problem
from moepress.bench.reference import dense_reference, moe_reference

_LOCKS = 2048
_LEAST_GROUP = 16


class Humming(Contender):
    name = "humming"

    def why_not(self, problem: Problem) -> str | None:
        try:
            version("humming-kernels")
        except PackageNotFoundError:
            return "humming-kernels is not installed"
        return unsupported(problem)

    def bits_per_weight(self, problem: Problem) -> float:
        return problem.bits + (32 if has_zero(problem) else 16) / problem.group_size

    def note(self, problem: Problem) -> str:
        return f"{self.bits_per_weight(problem):g} b, {'real zeros' if has_zero(problem) else 'symmetric'}"

    def warm_up(self, problems: Sequence[Problem], device: torch.device) -> None:
        rows: dict[str, tuple[Any, set[int]]] = {}
        for problem in problems:
            for matrix in range(len(shapes_of(problem))):
                config = layer_config(problem, matrix, device)
                rows.setdefault(config.to_str(), (config, set()))[1].add(rows_of(problem))
        for config, counts in rows.values():
            compile_ahead(config, sorted(counts), device)

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        draw = problem.draw(seed, device)
        matrices = range(len(shapes_of(problem)))
        packed = [[pack(problem, matrix, seed, copy, device) for matrix in matrices] for copy in range(copies)]
        if problem.moe:
            return _experts(problem, draw, packed)
        out = draw.x.new_empty(problem.tokens, problem.shape[0])
        launch = Launch(packed[0][0].config, problem.tokens, device)
        return [launch.bind(weight, draw.x, out) for (weight,) in packed]

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor:
        draw = problem.draw(seed, device)
        parts = [random_parts(problem, matrix, seed, 0, device) for matrix in range(len(shapes_of(problem)))]

        def weight(matrix: int, expert: int) -> torch.Tensor:
            return dequantize(problem, {name: part[expert] for name, part in parts[matrix].items()})

        if not problem.moe:
            return dense_reference(draw, dequantize(problem, parts[0]))
        return moe_reference(draw, lambda expert: weight(0, expert), lambda expert: weight(1, expert))


def unsupported(problem: Problem) -> str | None:
    """Why Humming has no kernel for this problem, None where it has one."""
    if problem.rank:
        return "has no compensators"
    if problem.bits not in range(1, 9):
        return f"has no {problem.bits}-bit weights"
    group = problem.group_size
    if group < _LEAST_GROUP or group & (group - 1):
        return f"groups of {group}: it takes powers of two from {_LEAST_GROUP}"
    for n, k in shapes_of(problem):
        if n % 64 or k % 32 or k % group:
            return f"{n}x{k}: it takes N in multiples of 64 and K in multiples of 32 and of the group size"
    return None


class Launch:
    """One of its GEMMs for a fixed number of output rows; `ids` [T, k] for experts'."""

    def __init__(self, config: Any, rows: int, device: torch.device, ids: torch.Tensor | None = None) -> None:
        self.configs, block = kernel(config, rows, device)
        self.route = {} if ids is None else aligned(ids, config.num_experts, block)

    def bind(self, weight: Packed, x: torch.Tensor, out: torch.Tensor, top_k: int = 1) -> Call:
        """x [M, K] -> out [M * top_k, N]; with a route, row r of out is of row r // top_k of x."""
        from humming import ops

        locks = torch.zeros(_LOCKS, dtype=torch.int32, device=x.device)  # each launch leaves them zero

        def call() -> torch.Tensor:
            ops.launch_kernel(
                configs=self.configs, inputs=x, outputs=out, locks=locks, top_k=top_k, **self.route, **weight.tensors
            )
            return out

        return call


def _experts(problem: Problem, draw: Draw, packed: list[list[Packed]]) -> list[Call]:
    _, chosen, hidden, inner = problem.shape
    x, ids, weights = draw.x, draw.ids, draw.weights
    assert ids is not None and weights is not None
    rows = ids.numel()
    first, second = (Launch(weight.config, rows, x.device, ids) for weight in packed[0])
    h, act, out = (x.new_empty(rows, width) for width in (2 * inner, inner, hidden))
    y = torch.empty_like(x)
    position = torch.arange(rows, device=x.device).view(ids.shape)

    def layer(gate_up: Packed, down: Packed) -> Call:
        project_up, project_down = first.bind(gate_up, x, h, chosen), second.bind(down, act, out)

        def run() -> torch.Tensor:
            project_up()
            silu_mul(h, act)
            project_down()
            return weighted_sum(out, position, weights, y)

        return run

    return [layer(*copy) for copy in packed]
