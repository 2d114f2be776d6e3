# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere; silent when nobody asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[float], None]
"""Called with the amount of work just finished, in the unit that `total` was given in."""

Progress = Callable[[str, float], AbstractContextManager[Advance]]
"""`progress(label, total)` is a context manager that yields an `Advance`."""


@contextmanager
def silent(label: str, total: float) -> Iterator[Advance]:
    """The default: says nothing, so library calls stay quiet."""
    yield lambda amount: None


@contextmanager
def console(label: str, total: float) -> Iterator[Advance]:
    """A bar on stderr where it is a terminal, else a plain line at most every five seconds."""
    if sys.stderr.isatty():
        yield from _bar(label, total)
    else:
        yield from _lines(label, total)


def _bar(label: str, total: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


def _lines(label: str, total: float, every_s: float = 5.0) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= every_s and done > 0:
            last = now
            left = (now - start) * max(total - done, 0.0) / done
            print(f"{label}: {100 * done / total:.0f} %, {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
    print(f"{label}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
