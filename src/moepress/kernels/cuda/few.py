# SPDX-License-Identifier: Apache-2.0
"""Launches `gemv`: one token, or up to eight, through a matrix or through the experts that they chose."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import NamedTuple

import torch

from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import BankArgument, Factors, RecordBank, structure
from moepress.kernels.cuda.functions import address, find_kernel, is_bf16, processors_of, shared_bytes_of
from moepress.kernels.cuda.launch import Function

_Arguments = structure(
    "_Arguments", "x y bias passed_bytes passed_sums", "ids weights",
    "ids_wide weights_wide tokens slots num_experts n k records row_blocks stages",
)  # fmt: skip


class _Compensators(ctypes.Structure):
    _fields_ = (
        ("v", BankArgument), ("u", BankArgument), ("t", ctypes.c_void_p), ("ended", ctypes.c_void_p),
        ("others", ctypes.c_void_p), ("other_pieces", ctypes.c_int), ("columns", ctypes.c_int),
        ("v_row_blocks", ctypes.c_int), ("v_records", ctypes.c_int), ("u_records", ctypes.c_int),
        ("v_inverse", ctypes.c_uint32),
    )  # fmt: skip


class _Passed(NamedTuple):
    """The intermediate as bytes (bytes.cuh), as `gemv` of down has it in shared memory."""

    bytes: torch.Tensor
    """As many bytes as 16-bit [P, I] has, I in whole units, in a tensor of that shape and dtype."""
    sums: torch.Tensor
    """Scales and sums of its segments, float32, P rows one after the other, padded to 16 bytes in all."""


@dataclass(frozen=True)
class _Plan:
    function: Function
    team: choose.Team
    stages: int
    shared: int


def few_linear(
    x: torch.Tensor, y: torch.Tensor, bank: RecordBank, bias: torch.Tensor | None, factors: Factors | None = None
) -> bool:
    """x [1, K] (W + u v)^T (+ bias) into y [1, N]; False, and no launch, where x needs too much shared memory."""
    if not (plan := _plan("DENSE", bank.shape, factors and _ranks(factors), x.dtype, 1, 1, x.device.index)):
        return False
    _launch(plan, x, y, bank, _compensators(factors), None, None, 1, 1, y.shape[1], bias)
    return True


def few_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: RecordBank,
    down: RecordBank,
    gate_up_factors: Factors | None,
    down_factors: Factors | None,
    intermediate: int,
    y: torch.Tensor,
) -> bool:
    """A layer of experts for up to eight tokens, in two launches; False, and none, where it does not fit.

    The ids of one token must differ from each other, except for those that name no expert.
    """
    tokens, slots = ids.shape
    if tokens > 1 and (tokens > choose.MAX_TOKENS or tokens * slots > choose.MAX_PAIRS):
        return False
    shape = tokens, slots, x.device.index
    plans = [
        _plan(mode, bank.shape, factors and _ranks(factors), x.dtype, *shape)
        for mode, bank, factors in (("GATE_UP", gate_up, gate_up_factors), ("DOWN", down, down_factors))
    ]
    if plans[0] is None or plans[1] is None:
        return False
    pairs, processors = tokens * slots, processors_of(x.device.index)
    passed = None
    if choose.gemv_passes_bytes(plans[0].team, gate_up.shape, down.shape, tokens, slots, processors):
        floats = choose.gemv_row_sums(down.shape, tokens)
        sums = torch.empty(-(-pairs * floats // 4) * 4, dtype=torch.float32, device=x.device)
        passed = _Passed(x.new_empty(pairs, 64 * down.shape.units), sums)
    h = passed.bytes if passed else x.new_empty(pairs, intermediate)
    up = _compensators(gate_up_factors, down_factors, pairs)
    own = _compensators(down_factors, gate_up_factors, pairs)
    with _both_halves(x.device.index, gate_up_factors) if gate_up_factors or down_factors else _NOTHING:
        _launch(plans[0], x, h, gate_up, up, ids, None, tokens, slots, intermediate, passed=passed)
        _launch(plans[1], h, y, down, own, ids, weights, tokens, slots, x.shape[1], passed=passed)
    return True


_NOTHING = nullcontext()
_locks: dict[int, Lock] = {}
"""Of devices."""


@contextmanager
def _both_halves(device: int, gate_up: Factors | None) -> Iterator[None]:
    """Halves set each other's t to 0: no other thread's come between; where down fails, gate and up's is set here."""
    with _locks.setdefault(device, Lock()):
        try:
            yield
        except BaseException:
            if gate_up:
                gate_up.v.scratch.zero_()
            raise


@cache
def _plan(
    mode: choose.Mode,
    bank: choose.Bank,
    ranks: choose.Ranks | None,
    dtype: torch.dtype,
    tokens: int,
    slots: int,
    device: int,
) -> _Plan | None:
    """The first team of warps whose rings of two records or more fit beside its inputs; None: no team's do."""
    shared, processors = shared_bytes_of(device), processors_of(device)
    for team in choose.gemv_candidates(mode, bank, ranks, tokens, slots, processors, shared):
        function, static = find_kernel("gemv.cu", gemv_instance(mode, bank, ranks, dtype, tokens, team), device)
        room = choose.gemv_room(mode, bank, ranks, tokens, slots, team, processors)
        if stages := room.stages(shared - static):
            return _Plan(function, team, stages, room.total(stages))
    return None


def gemv_instance(
    mode: choose.Mode, bank: choose.Bank, ranks: choose.Ranks | None, dtype: torch.dtype, tokens: int, team: choose.Team
) -> str:
    columns = 1 if tokens == 1 else 4
    factors = f"{ranks.bits}, {ranks.units}" if ranks else "0, 0"
    return f"gemv<{bank.template}, {is_bf16(dtype)}, {columns}, {mode}, {team.warps}, {team.groups}, {factors}>"


def _launch(
    plan: _Plan,
    x: torch.Tensor,
    y: torch.Tensor,
    bank: RecordBank,
    compensators: _Compensators,
    ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    tokens: int,
    slots: int,
    columns: int,
    bias: torch.Tensor | None = None,
    passed: _Passed | None = None,
) -> None:
    shape, layout = bank.shape, bank.shape.any
    arguments = _Arguments(
        x.data_ptr(), y.data_ptr(), address(bias), *map(address, passed or (None, None)), bank.argument, address(ids),
        address(weights),
        int(ids is not None and ids.dtype == torch.int64), int(weights is not None and weights.dtype == torch.float32),
        tokens, slots, len(bank.where), columns, x.shape[1], layout.records_per_row_block, shape.row_blocks,
        plan.stages,
    )  # fmt: skip
    blocks = processors_of(x.device.index)
    if not compensators.columns:
        blocks = min(blocks, shape.row_blocks * (slots * tokens if ids is not None and weights is None else 1))
    plan.function.launch(
        blocks, 32 * plan.team.warps * plan.team.groups, plan.shared, (arguments, compensators), programmatic=True
    )


def _compensators(factors: Factors | None, others: Factors | None = None, pairs: int = 1) -> _Compensators:
    """`others` are those of the other half of a layer of experts, whose t for `pairs` the launch sets to 0."""
    made = _Compensators()
    if others:
        made.others, made.other_pieces = _t_of(others), pairs * others.t_columns // 8
    if factors is None:
        return made
    v, u = factors.v.shape, factors.u.shape.any
    return _Compensators(
        factors.v.argument, factors.u.argument, _t_of(factors), factors.v.scratch_address, made.others,
        made.other_pieces, v.any.rows, v.row_blocks, v.any.records_per_row_block, u.records_per_row_block,
        inverse(v.row_blocks),
    )  # fmt: skip


def inverse(n: int) -> int:
    """What `divide` in gemv_shares.cuh divides by n with."""
    return 2**31 // n + 1


def _t_of(factors: Factors) -> int:
    """Address of t, after the counter's row."""
    return factors.v.scratch_address + 16


def _ranks(factors: Factors) -> choose.Ranks:
    return choose.ranks(factors.v.layouts[0], factors.u.layouts[0])
