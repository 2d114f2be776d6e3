# SPDX-License-Identifier: Apache-2.0
"""What a contender has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from moepress.bench.clock import Call
from moepress.bench.problems import DENSE, MOE, Problem
from moepress.kernels.registry import Choice

BASELINE, PEER, OURS = "16-bit", "peer", "ours"


class Contender(Protocol):
    """One way to run a layer. A subclass gives a name, its role and `prepare`; the rest has defaults."""

    name: str
    role: str = PEER
    """BASELINE, PEER or OURS: what the ratios are taken against."""
    kinds: tuple[str, ...] = (DENSE, MOE)

    def why_not(self, problem: Problem) -> str | None:
        """None where it can run, else the reason it cannot. Must not need a GPU to say so."""
        return None

    def bits_per_weight(self, problem: Problem) -> float:
        """Bits that a call reads for a weight, scales, zeros and factors included."""
        return 16.0

    def note(self, problem: Problem) -> str:
        """What a reader of the table should know about how it ran."""
        return ""

    def warm_up(self, problems: Sequence[Problem], device: torch.device) -> None:
        """Compiles ahead for all these problems, where doing it at once is faster."""
        return

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        """One call for each of `copies` sets of random weights; every call returns y [T, N or H] of the same inputs,
        `problem.draw(seed, device)`. Sorting tokens and gathering x belongs here; the whole layer belongs in a call."""
        ...

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor | None:
        """What the first call should return, if it can say: float64 [checked tokens, N or H], see `bench.reference`."""
        return None


def ours() -> Contender:
    """The kernels of this package."""
    from moepress.bench.ours import Moepress  # it is made of what this module declares

    return Moepress()


def explain(problem: Problem) -> list[Choice]:
    """Every implementation of moepress that there is for this problem, the chosen one marked."""
    from moepress.bench import ours as own

    return own.explain(problem)
