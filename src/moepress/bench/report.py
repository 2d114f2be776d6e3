# SPDX-License-Identifier: Apache-2.0
"""Rows as a table and as JSON, with what they are held against: this machine's own rates, 16 bits, the fastest peer."""

from __future__ import annotations

import dataclasses
import math
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moepress.bench.clock import Machine
from moepress.bench.contenders import BASELINE, PEER
from moepress.bench.run import Row
from moepress.version import __version__

COLUMNS = ("kernel", "us", "p20 - p80", "GB/s", "of what is possible", "to 16 bits", "to the best peer", "error", "")
TEXT = (0, 8)
"""Columns of words."""
_HERE = Path(__file__).parent


def bound(row: Row, machine: Machine) -> tuple[float, str]:
    """Seconds that this machine's copy or matrix rate allows at best, and which of them it is."""
    moving, computing = row.bytes / machine.copy_bandwidth, row.problem.flops / machine.matrix_rate
    return (moving, "copy") if moving >= computing else (computing, "matrix")


def fastest(rows: Sequence[Row], role: str) -> float | None:
    """Microseconds of the fastest contender of a role."""
    return min((row.us for row in rows if row.role == role and row.us is not None), default=None)


def entry(row: Row, rows: Sequence[Row], machine: Machine) -> dict[str, Any]:
    """A row and its ratios, for JSON; `rows` are all of its problem."""
    body = {name: _finite(value) for name, value in vars(row).items() if name != "problem"}
    body |= {"problem": dataclasses.asdict(row.problem), "bytes": row.bytes, "flops": row.problem.flops}
    if row.us is None:
        return body
    best, limit = bound(row, machine)
    baseline, peer = fastest(rows, BASELINE), fastest(rows, PEER)
    return body | {
        "gb_per_s": row.bytes / row.us / 1e3,
        "share": 1e6 * best / row.us,
        "share_of": limit,
        "speed_up_over_16_bits": None if baseline is None else baseline / row.us,
        "speed_up_over_best_peer": None if peer is None else peer / row.us,
    }


def cells(row: Row, rows: Sequence[Row], machine: Machine) -> list[str]:
    """A row of the table, COLUMNS wide."""
    found = entry(row, rows, machine)
    if row.us is None:
        return [row.contender, *["-"] * (len(COLUMNS) - 2), row.reason or ""]
    return [
        row.contender,
        f"{row.us:.1f}",
        f"{row.p20:.1f} - {row.p80:.1f}",
        f"{found['gb_per_s']:,.0f}",
        f"{found['share']:.0%} {found['share_of']}",
        _times(found["speed_up_over_16_bits"]),
        _times(found["speed_up_over_best_peer"]),
        "-" if row.error is None else f"{row.error:.1e}",
        ", ".join(remarks(row)),
    ]


def remarks(row: Row) -> list[str]:
    """The note, and what else a reader must know before believing the time."""
    said = [row.note] if row.note else []
    if not row.cold:
        said.append("weights may come from L2")
    if row.repeatable is False:
        said.append("not bitwise repeatable")
    return said


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def heading(row: Row) -> str:
    """Of a problem's table."""
    problem = row.problem
    return problem.title() + (f": {row.hit} of {problem.experts} experts hit" if problem.moe else "")


def machine_line(machine: Machine) -> str:
    copies, products = f"{machine.copy_bandwidth / 1e12:.2f} TB/s", f"{machine.matrix_rate / 1e12:,.0f} TFLOP/s"
    return (
        f"{machine.name}, L2 {machine.l2_bytes / 1e6:.0f} MB; measured now: copies at {copies} (read and written), "
        f"bf16 products at {products}"
    )


def document(problems: Sequence[Sequence[Row]], machine: Machine, settings: dict[str, Any]) -> dict[str, Any]:
    """All rows, problem by problem, with the machine and the environment."""
    rows = [entry(row, rows, machine) for rows in problems for row in rows]
    return {"bench": settings, **environment(), "machine": dataclasses.asdict(machine), "rows": rows}


def environment() -> dict[str, str]:
    """Date, versions and commit; empty where unknown."""
    packages = {name: _version(name) for name in ("triton", "humming-kernels", "gemlite")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "moepress": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        **packages,
    }


def commit() -> str:
    """The short hash of the checkout that this file is tracked in, with -dirty where the package has changed since."""
    git = ("git", "-C", str(_HERE))
    if not _run(*git, "ls-files", "report.py"):
        return ""
    dirty = _run(*git, "status", "--porcelain", "--", "..")
    return _run(*git, "rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def _run(*command: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""
