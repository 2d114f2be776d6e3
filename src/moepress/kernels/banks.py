# SPDX-License-Identifier: Apache-2.0
"""What the CUDA operations of linears and experts share: how a bank of records enters a torch operation.

An operation takes tensors and one string that says what lies in them, and makes the bank of them again. A string,
because torch.compile guards it as one value and because it means the same in every process that finds a compiled graph
in a cache on disk: "32x64b3g64,32x64b4g64|0.0 1.0 - 0.1" are two tensors of records and the places of four experts, of
whom one has no such matrix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import compiler
from moepress.kernels.cuda.bank import Factors, are_in_order
from moepress.kernels.problem import Problem
from moepress.kernels.records import RecordLayout

if TYPE_CHECKING:
    from moepress.kernels.cuda.run import RecordBank

Where = tuple[tuple[int, int] | None, ...]
"""Expert -> (which of the records, slot), or None for an expert that has no such matrix."""
_NOWHERE = "-"
_LAYOUT = re.compile(r"(\d+)x(\d+)b(\d)g(\d+)")


class Weights(NamedTuple):
    """One bank, ready for a call: the three arguments of an operation, and the bank for calls that need none."""

    records: list[torch.Tensor]
    table: torch.Tensor
    text: str
    bank: RecordBank | None


class FactorWeights(NamedTuple):
    """The banks of compensators' factors, as `Factors` has them."""

    v: Weights
    u: Weights


def why_not_here(problem: Problem) -> str | None:
    """None where CUDA kernels can be compiled, and records kept, for this device; else the reason they cannot."""
    if problem.offloaded:
        return "its weights are offloaded, and records would stay on the device"
    return _why_not_device(problem.device.type)


@cache
def _why_not_device(kind: str) -> str | None:
    if kind != "cuda":
        return f"CUDA kernels need a CUDA device, and this layer is on {kind}"
    if torch.version.hip:
        return "CUDA kernels need a CUDA device, and this torch is built for ROCm"
    return compiler.why_not()


def describe(layouts: Sequence[RecordLayout], where: Where) -> str:
    """The string of a bank; `parse` is its inverse."""
    kinds = (f"{each.rows}x{each.columns}b{each.bits}g{each.group_size}" for each in layouts)
    places = (f"{place[0]}.{place[1]}" if place else _NOWHERE for place in where)
    return f"{','.join(kinds)}|{' '.join(places)}"


@cache
def parse(text: str) -> tuple[tuple[RecordLayout, ...], Where]:
    """Layouts and places of the string of a bank. KernelError for any other string."""
    kinds, _, places = text.partition("|")
    try:
        layouts = tuple(RecordLayout(*map(int, _LAYOUT.fullmatch(kind).groups())) for kind in kinds.split(","))
        where = tuple(_parse_place(place) for place in places.split())
    except (AttributeError, ValueError) as error:
        raise KernelError(f"{text!r:.80} does not describe records: {error}") from None
    return layouts, where


@cache
def _in_order(text: str) -> bool:
    """Found out once: compiled code makes its banks anew in every call."""
    return are_in_order(parse(text)[1])


def _parse_place(place: str) -> tuple[int, int] | None:
    if place == _NOWHERE:
        return None
    which, slot = place.split(".")
    return int(which), int(slot)


def rebuild(records: list[torch.Tensor], table: torch.Tensor, text: str) -> RecordBank:
    """The bank that an operation was given."""
    from moepress.kernels.cuda import run

    return run.RecordBank(tuple(records), *parse(text), table, _in_order(text))


def factor_arguments(factors: FactorWeights | None) -> tuple[list[torch.Tensor], str]:
    """Factors as two arguments of an operation: records and table of v, those of u; and both strings."""
    tensors = [tensor for weights in factors or () for tensor in (*weights.records, weights.table)]
    return tensors, ";".join(weights.text for weights in factors or ())


def rebuild_factors(tensors: list[torch.Tensor], text: str) -> Factors | None:
    """The factors that an operation was given; `factor_arguments` made them arguments."""
    if not text:
        return None
    v_records, v_table, u_records, u_table = tensors
    v, u = text.split(";")
    return Factors(rebuild([v_records], v_table, v), rebuild([u_records], u_table, u))


def ready_factors(factors: FactorWeights | None) -> Factors | None:
    """The same for calls that need no operation."""
    if factors is None:
        return None
    v, u = factors.v.bank, factors.u.bank
    assert v is not None and u is not None, "under torch.compile weights come without their banks"
    return Factors(v, u)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous, or its copy where it begins at an address that 16-byte copies cannot."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def needs_operation() -> bool:
    """Whether a call has to be visible to torch: while torch.compile looks on, and where gradients are recorded.

    Elsewhere the operation is left out: it takes 10 us a call, several times what launching a kernel does.
    """
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def no_gradient(ctx: Any, *gradients: torch.Tensor) -> None:
    """The backward of both operations. Raises KernelError."""
    raise KernelError(
        "moepress's kernels have no gradients: call the model under torch.no_grad(), or, for a backward pass, "
        "set MOEPRESS_KERNELS=reference before the model is loaded"
    )
