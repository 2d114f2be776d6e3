# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs: a table, and what it says of a problem.

The first row of an operation that can run is taken. On a CUDA device the reference is never taken in silence: a
warning names each reason once. MOEPRESS_KERNELS=reference (or cuda, or triton), read when a layer meets its first
input, takes that row and no other, and is an error where it cannot run; an operation without such a row keeps its own
order. Triton's kernels, which no GPU has measured yet, are taken in no other way. On the CPU the reference is what
there is, and nothing is said.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from moepress.errors import KernelError
from moepress.kernels import packing
from moepress.kernels.experts import cuda as experts_cuda
from moepress.kernels.experts import triton as experts_triton
from moepress.kernels.linear import cuda as linear_cuda
from moepress.kernels.linear import triton as linear_triton
from moepress.kernels.problem import EXPERTS, LINEAR, PACKING, ROUTER, SELECTOR, Problem
from moepress.kernels.router import cuda as router_cuda
from moepress.kernels.selector import cuda as selector_cuda

CUDA, TRITON, REFERENCE = "cuda", "triton", "reference"
OVERRIDE = "MOEPRESS_KERNELS"
_warned: set[str] = set()


@dataclass(frozen=True)
class Row:
    """One implementation of an operation; `why_not` gives None where it can run, else the reason."""

    op: str
    name: str
    why_not: Callable[[Problem], str | None]


@dataclass(frozen=True)
class Choice:
    """A row's answer for a problem: whether it runs, and if not, why."""

    name: str
    chosen: bool
    reason: str


def _always(problem: Problem) -> None:
    return None


def _triton(problem: Problem) -> str | None:
    if os.environ.get(OVERRIDE) != TRITON:
        return f"no GPU has measured the Triton kernels yet; {OVERRIDE}={TRITON} runs them"
    if problem.offloaded:
        return "its weights are moved to the GPU for each call and out again"
    bits = [layout.bits for layout in (*problem.layouts, *problem.down)]
    if problem.op == LINEAR:
        return linear_triton.why_not(problem.device, problem.dtype, bits[0])
    return experts_triton.why_not(problem.device, problem.dtype, bits, problem.activation)


ROWS = (
    # the fastest first
    Row(LINEAR, CUDA, linear_cuda.why_not),
    Row(LINEAR, TRITON, _triton),
    Row(LINEAR, REFERENCE, _always),
    Row(EXPERTS, CUDA, experts_cuda.why_not),
    Row(EXPERTS, TRITON, _triton),
    Row(EXPERTS, REFERENCE, _always),
    Row(SELECTOR, CUDA, selector_cuda.why_not),
    Row(SELECTOR, REFERENCE, _always),
    Row(ROUTER, CUDA, router_cuda.why_not),
    Row(ROUTER, REFERENCE, _always),
    Row(PACKING, CUDA, packing.why_not),
    Row(PACKING, REFERENCE, _always),
)


def select(problem: Problem) -> str:
    """The name of the row that runs. KernelError where MOEPRESS_KERNELS asks for what cannot be had."""
    choices = explain(problem)
    chosen = next(choice.name for choice in choices if choice.chosen)
    if chosen == REFERENCE and problem.device.type == "cuda" and not os.environ.get(OVERRIDE):
        _warn(problem.op, choices[0].reason)
    return chosen


def explain(problem: Problem) -> list[Choice]:
    """Every row of the problem's operation in order, one of them chosen. Errors as in `select`."""
    reasons = {row.name: row.why_not(problem) for row in ROWS if row.op == problem.op}
    wanted, names = os.environ.get(OVERRIDE), dict.fromkeys(row.name for row in ROWS)
    if wanted and wanted not in names:
        raise KernelError(f"{OVERRIDE} is {wanted!r}; choose one of {', '.join(names)}, or unset it")
    if wanted not in reasons:
        wanted = None
    if wanted and reasons[wanted] is not None:
        raise KernelError(f"{OVERRIDE} is {wanted!r}, which cannot run {problem.op} here: {reasons[wanted]}; unset it")
    chosen = wanted or next(name for name, reason in reasons.items() if reason is None)
    passed_over = f"{OVERRIDE} is {wanted!r}" if wanted else f"{chosen} goes first"
    return [
        Choice(name, name == chosen, "" if name == chosen else reason or passed_over)
        for name, reason in reasons.items()
    ]


def _warn(op: str, reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(f"moepress runs {op} in plain torch on this GPU, which is many times slower: {reason}", stacklevel=3)
