# SPDX-License-Identifier: Apache-2.0
"""Times on a CUDA GPU: graphs that rotate over copies of the weights, replayed between events.

A layer's low-bit weights fit into the L2 cache of a large GPU; calling it again on the same weights times the cache.
So a graph goes round enough copies that more than four caches' worth is read before a copy comes back.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

CACHES = 4
CALLS, REPLAYS, MOST_COPIES = 20, 200, 256
"""Calls in a graph at least, replays in a turn at most, copies at most (tiny layers would need thousands)."""
REST = 0.05
"""Seconds before each turn. Without, whoever followed a product that draws much power had a lower clock: at 256 tokens
times moved by 10 to 20 % with the order of the contenders."""
SHARE = 0.4
"""Of the free memory, what one contender's copies may take."""
_COPY_BYTES, _MATRIX = 1 << 32, 8192

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Machine:
    """Measured in the same run as what is compared with it: bytes/s of a copy (read and written), FLOP/s of bf16."""

    name: str
    l2_bytes: int
    copy_bandwidth: float
    matrix_rate: float


@dataclass(frozen=True)
class Recording:
    """A captured graph, how many layer calls are in it, and the calls: they own the memory that it reads."""

    graph: Any
    calls: int
    owners: Sequence[Call]


def copies_needed(read: int, resident: int, l2_bytes: int, free: int) -> int:
    """Copies of weights of `resident` bytes, `read` of which a call reads, so that caches are cold where memory allows.

    Raises MemoryError where not even two copies fit.
    """
    if 2 * resident > free:
        raise MemoryError(f"two copies of the weights take {2 * resident:,} bytes, {free:,} are free")
    cold = CACHES * l2_bytes // max(read, 1) + 1
    return max(2, min(cold, int(SHARE * free / max(resident, 1)), MOST_COPIES))


def calls_in_graph(copies: int) -> int:
    """At least CALLS, and each copy equally often."""
    return copies * -(-CALLS // copies)


class CudaClock:
    """Captures and replays on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)

    def free_bytes(self) -> int:
        self.release()
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        """Gives back what a contender that failed or is done has held."""
        gc.collect()
        with suppress(RuntimeError):  # a GPU error that is still pending; it has been reported already
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def machine(self) -> Machine:
        """Times a large copy and a large bf16 product of random data."""
        properties = torch.cuda.get_device_properties(self.device)
        return Machine(torch.cuda.get_device_name(self.device), properties.L2_cache_size, self._copy(), self._matrix())

    def record(self, calls: Sequence[Call]) -> Recording:
        """Runs every call once (they compile, tune and allocate then), and captures them in turn."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in (*calls, *calls[:2]):
                call()
            self.release()
            graph, count = torch.cuda.CUDAGraph(), calls_in_graph(len(calls))
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(count):
                    calls[i % len(calls)]()
            except BaseException:
                with suppress(RuntimeError):  # says only that the capture failed; the cause is on its way
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return Recording(graph, count, calls)

    def replay(self, recording: Recording, seconds: float) -> list[float]:
        """Microseconds a call, for each replay that fits into `seconds`, at least one; after a rest one warms up."""
        time.sleep(REST)
        once = sum(self._between(recording.graph.replay, 1))
        count = max(1, min(REPLAYS, int(seconds / max(once, 1e-9))))
        return [1e6 * each / recording.calls for each in self._between(recording.graph.replay, count)]

    def _between(self, step: Callable[[], Any], count: int) -> list[float]:
        """Seconds of each of `count` steps that follow each other without a pause."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]

    def _copy(self) -> float:
        size = min(_COPY_BYTES, self.free_bytes() // 4)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self._between(lambda: target.copy_(source), 3)
        return 2 * size / median(self._between(lambda: target.copy_(source), 25))

    def _matrix(self) -> float:
        a, b = (torch.randn(_MATRIX, _MATRIX, device=self.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        self._between(lambda: torch.mm(a, b, out=out), 3)
        return 2 * _MATRIX**3 / median(self._between(lambda: torch.mm(a, b, out=out), 25))
