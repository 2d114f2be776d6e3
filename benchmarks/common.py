# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: a clock, a table, the rows in results.csv and the JSON line that ends the output.

Speeds of two programs are compared by calling them in turn and dividing the medians, so that what else the
machine does falls on both alike.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).parent
DEMO_MODEL = HERE.parent / "src/moepress/demo/model"
DEMO_TEXT = HERE.parent / "src/moepress/demo/excerpt.txt"
RESULTS = HERE / "results.csv"
COLUMNS = (
    "date", "benchmark", "metric", "value", "unit", "baseline", "device",
    "torch", "transformers", "moepress", "peer", "commit", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One measured number; `baseline` is the peer's number or the target, in words where it needs them."""

    metric: str
    value: float
    unit: str
    baseline: str = ""
    note: str = ""


def finish(benchmark: str, figures: Sequence[Figure], *, device: str = "cpu", peer: str = "") -> None:
    """Appends the figures to results.csv and prints them and the environment as the last line of stdout."""
    where = environment(device, peer)
    rows = [
        {"benchmark": benchmark, "metric": f.metric, "value": f"{f.value:.6g}", "unit": f.unit}
        | {"baseline": f.baseline, "note": f.note}
        | where
        for f in figures
    ]
    append_rows(RESULTS, COLUMNS, rows)
    values = {f.metric: float(f"{f.value:.6g}") for f in figures}
    print(json.dumps({"benchmark": benchmark, **where, "figures": values}), flush=True)


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows to a file of results; the header is written with the first."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            table.writeheader()
        table.writerows(rows)


def environment(device: str, peer: str = "") -> dict[str, str]:
    """The columns that say where and with what a figure was measured; `peer` is a package's name."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "device": describe(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "moepress": moepress_version(),
        "peer": f"{peer} {version(peer)}" if peer else "",
        "commit": commit(),
    }


def describe(device: str) -> str:
    """The GPU's name, or the processor's with the threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def moepress_version() -> str:
    """Of the code that is imported, which need not be installed."""
    from moepress.version import __version__

    return __version__


def commit() -> str:
    """The short hash of the checkout, `dirty` where it was changed since, nothing outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        changed = git("status", "--porcelain", "--", "../src", ".", ":!*.csv", ":!*.svg")
        return "dirty" if changed else git("rev-parse", "--short", "HEAD")
    return ""


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(first: Callable[[], Any], second: Callable[[], Any], budget: float) -> tuple[float, float]:
    """Median seconds of two calls made alternately: once to warm up, then 3 to 25 times within `budget` seconds."""
    spent = seconds(first) + seconds(second)
    repeats = min(25, max(3, int(budget / spent)))
    times = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return median(a for a, _ in times), median(b for _, b in times)


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Left-aligned first column, the rest right-aligned."""
    cells = [list(header)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]), flush=True)
