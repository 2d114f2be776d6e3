# SPDX-License-Identifier: Apache-2.0
"""The typer application, the options that every command has, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from moepress.errors import MoepressError, PlanError
from moepress.plan.budget import parse_budget
from moepress.version import __version__

app = typer.Typer(
    help="Makes Mixture-of-Experts checkpoints small: 1 to 4 bits a weight, with low-rank compensators.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Folder = Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16; auto is float32 on the CPU and bfloat16 on a GPU.")
]
NoPruning = Annotated[bool, typer.Option("--no-pruning", help="Run all experts, whatever rules the folder has.")]
Dial = Annotated[
    float | None,
    typer.Option(help="Of a pruned model: 0 is as trained, more runs fewer experts.", show_default=False),
]
ExpertsPlot = Annotated[
    Path | None, typer.Option(help="Draw which layers and positions ran how many experts (.svg, .png, .pdf).")
]
Memory = Annotated[str, typer.Option(help="About how much memory calibration text may take: 4GB, 500MB, ...")]


def parse_memory(text: str) -> int:
    """`4GB` to bytes. Raises PlanError for anything but a size."""
    size = parse_budget(text).total_bytes
    if size is None:
        raise PlanError(f"--memory {text} is not a size; write 4GB, 500MB, ...")
    return size


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moepress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def pick_device(name: str) -> torch.device:
    """`auto` or a torch device that exists. Raises PlanError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"device {name!r} cannot be used here ({reason}); use --device cpu or auto") from error
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses on a GPU, or that Linux would give without swapping; no limit where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, text: Iterable[int] = (0,)) -> None:
    """Prints one table; the columns in `text` are left-aligned, numbers right."""
    grid = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    left = set(text)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i in left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console = Console()
    # files and pipes get whole lines: a fixed width there would fold them
    (console if console.is_terminal else Console(width=200)).print(grid)


def finish(wanted: bool, body: dict[str, Any]) -> None:
    """The JSON line, where it was asked for."""
    if wanted:
        print(json.dumps(body))


def write_text(path: Path, text: str) -> None:
    """Writes a small file in one step, so that it is never half there."""
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise MoepressError(f"{path} cannot be written: {error}") from error


def read_text(path: Path) -> str:
    """Reads a small file, or says why it cannot."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoepressError(f"{path} cannot be read: {error}") from error


def mebibytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
