# SPDX-License-Identifier: Apache-2.0
"""Runs a problem: everybody is prepared and checked, then timed in turn for some rounds. One failure costs one row."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from moepress.bench.clock import CACHES, Call, Machine, Recording, copies_needed
from moepress.bench.contenders import Contender
from moepress.bench.problems import Problem
from moepress.bench.reference import LIMIT, errors
from moepress.progress import Advance


class Clock(Protocol):
    """What timing needs; `clock.CudaClock` on a GPU."""

    def free_bytes(self) -> int: ...

    def release(self) -> None: ...

    def record(self, calls: Sequence[Call]) -> Recording: ...

    def replay(self, recording: Recording, seconds: float) -> list[float]: ...


@dataclass(frozen=True)
class Setting:
    """How long and from which random numbers; `seconds` of timing for each contender on each problem."""

    device: torch.device
    machine: Machine
    rounds: int = 3
    seconds: float = 1.0
    seed: int = 0


@dataclass
class Row:
    """One contender on one problem. Times are microseconds a layer; without `us`, `reason` says why there are none."""

    problem: Problem
    contender: str
    role: str
    hit: int
    weight_bytes: int = 0
    us: float | None = None
    p20: float | None = None
    p80: float | None = None
    replays: int = 0
    copies: int = 0
    cold: bool = False
    """Whether the copies together exceed the L2 cache CACHES times."""
    error: float | None = None
    largest_error: float | None = None
    repeatable: bool | None = None
    """Whether two calls gave the same bits."""
    note: str = ""
    reason: str | None = None
    trace: str | None = None

    @property
    def bytes(self) -> int:
        """That a perfect kernel moves."""
        return self.weight_bytes + self.problem.activation_bytes


@dataclass
class Lane:
    """A contender on its way through one problem; after a failure it only carries its row."""

    contender: Contender
    row: Row
    recording: Recording | None = None
    times: list[float] = field(default_factory=list)

    def attempt(self, step: Callable[[], None]) -> None:
        """Runs a step unless one has failed before; whatever it raises becomes the row's reason."""
        if self.row.reason is not None:
            return
        try:
            step()
        except Exception as error:  # one contender's failure must not cost the others' results
            self.row.reason, self.row.trace = describe(error), traceback.format_exc()
            self.recording = None


def warm_up(contenders: Sequence[Contender], problems: Sequence[Problem], setting: Setting) -> list[str]:
    """Lets contenders compile ahead; failures come back as lines, and `prepare` will meet their cause again."""
    lines = []
    for contender in contenders:
        try:
            contender.warm_up([each for each in problems if contender.why_not(each) is None], setting.device)
        except Exception as error:  # as above
            lines.append(f"{contender.name} could not compile ahead: {describe(error)}")
    return lines


def run_problem(
    problem: Problem, contenders: Sequence[Contender], clock: Clock, setting: Setting, advance: Advance
) -> list[Row]:
    """A row for each contender. Advances once for each contender and once for each round."""
    hit = problem.draw(setting.seed, "cpu").hit
    lanes = []
    for contender in contenders:
        lane = Lane(contender, Row(problem, contender.name, contender.role, hit))
        lane.attempt(lambda lane=lane: enter(lane, clock, setting))
        if lane.row.trace:
            clock.release()
        lanes.append(lane)
        advance(1)
    for _ in range(setting.rounds):
        for lane in lanes:
            lane.attempt(lambda lane=lane: _time(lane, clock, setting))
        advance(1)
    return [finished(lane) for lane in lanes]


def enter(lane: Lane, clock: Clock, setting: Setting) -> None:
    """Prepares copies, holds the first against its reference, records; or takes down why the contender cannot run."""
    row, contender, machine = lane.row, lane.contender, setting.machine
    problem = row.problem
    row.reason = contender.why_not(problem)
    if row.reason is not None:
        return
    bits = contender.bits_per_weight(problem)
    row.weight_bytes, row.note = problem.weight_bytes(bits, row.hit), contender.note(problem)
    resident = problem.weight_bytes(bits)
    row.copies = copies_needed(row.weight_bytes, resident, machine.l2_bytes, clock.free_bytes())
    row.cold = row.copies * row.weight_bytes > CACHES * machine.l2_bytes
    with torch.no_grad():
        calls = contender.prepare(problem, row.copies, setting.seed, setting.device)
        check(row, contender, calls[0], setting)
        lane.recording = clock.record(calls)


def check(row: Row, contender: Contender, call: Call, setting: Setting) -> None:
    """Fills in the errors. Raises ArithmeticError for a wrong result: its time would mean nothing."""
    y = call().clone()
    row.repeatable = torch.equal(y, call())
    expected = contender.reference(row.problem, setting.seed, setting.device)
    if expected is None:
        return
    row.error, row.largest_error = errors(y, expected)
    if not row.error <= LIMIT:  # not a number is wrong, too
        raise ArithmeticError(f"the result is wrong: relative error {row.error:.3g}, at most {LIMIT:g} is rounding")


def finished(lane: Lane) -> Row:
    """The row with its median and spread."""
    row = lane.row
    if row.reason is None:
        row.p20, row.us, row.p80 = (float(q) for q in np.quantile(lane.times, (0.2, 0.5, 0.8)))
        row.replays = len(lane.times)
    return row


def describe(error: BaseException) -> str:
    """What went wrong and where, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if message else ''}{message} ({Path(last.filename).name}:{last.lineno})"


def _time(lane: Lane, clock: Clock, setting: Setting) -> None:
    assert lane.recording is not None
    lane.times += clock.replay(lane.recording, setting.seconds / setting.rounds)
