# SPDX-License-Identifier: Apache-2.0
"""A clock that needs no GPU, a contender that always agrees with itself, and small problems."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from moepress.bench.clock import Call, Machine, Recording, calls_in_graph
from moepress.bench.contenders import PEER, Contender
from moepress.bench.problems import DENSE, MOE, Problem
from moepress.bench.reference import checked_tokens
from moepress.bench.run import Row, Setting, run_problem

CPU = torch.device("cpu")
MACHINE = Machine("a card", 60_000_000, 4.0e12, 800e12)
SETTING = Setting(CPU, MACHINE, rounds=3, seconds=0.3)
SMALL_MOE = Problem(MOE, (8, 2, 64, 48), 5)
SMALL_DENSE = Problem(DENSE, (48, 64), 3)


class FakeClock:
    """Runs the calls and makes the times up: `times` by contender's order of recording, in microseconds."""

    def __init__(self, times: Sequence[float] = (10.0, 20.0, 40.0), free: int = 1 << 40) -> None:
        self.times, self.free = times, free
        self.device = CPU
        self.replayed: list[int] = []
        self.released = self.recorded = 0

    def free_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        self.released += 1

    def machine(self) -> Machine:
        return MACHINE

    def record(self, calls: Sequence[Call]) -> Recording:
        for call in calls:
            call()
        self.recorded += 1
        return Recording(self.recorded - 1, calls_in_graph(len(calls)), calls)

    def replay(self, recording: Recording, seconds: float) -> list[float]:
        assert seconds == pytest.approx(0.1)
        self.replayed.append(recording.graph)
        return [self.times[recording.graph] * (1 + 0.1 * i) for i in range(-2, 3)]


class Ones(Contender):
    """Returns ones, and the reference agrees; tests override what shall go wrong."""

    def __init__(self, name: str = "ones", role: str = PEER) -> None:
        self.name, self.role = name, role

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        return [lambda: torch.ones(problem.tokens, 4)] * copies

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor | None:
        return torch.ones(len(checked_tokens(problem.tokens)), 4, dtype=torch.float64)


def run(problem: Problem, contenders: Sequence[Contender], clock: FakeClock | None = None) -> list[Row]:
    return run_problem(problem, contenders, clock or FakeClock(), SETTING, lambda amount: None)
