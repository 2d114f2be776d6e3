# SPDX-License-Identifier: Apache-2.0
"""Several weights at once on a CPU: one thread a weight beats all threads on one weight, whose operations are short.

Compressing a model of 135 M parameters with MiLo on 2 cores, the other way round was slower than a single thread as
soon as anything else ran on the machine: each of its many thousand short parallel loops then waits for the scheduler.
It also makes a weight's bytes independent of the number of cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
MAX_WORKERS = 4
"""Bounds the memory: a worker on a Mixtral expert holds about 0.4 GB."""


def run_jobs(jobs: Iterable[Callable[[], T]], device: torch.device) -> Iterator[T]:
    """Results in the jobs' order; at most one job more than there are workers is under way or waiting.

    On a GPU, which one job fills, they run one after the other in this thread.
    """
    if device.type != "cpu":
        yield from (job() for job in jobs)
        return
    before = torch.get_num_threads()
    workers = min(before, MAX_WORKERS)
    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
