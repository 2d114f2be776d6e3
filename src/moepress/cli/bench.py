# SPDX-License-Identifier: Apache-2.0
"""bench: time a layer of any shape on this GPU, beside 16 bits and other projects' kernels."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from moepress.bench import report
from moepress.bench.clock import CudaClock
from moepress.bench.contenders import OURS, Contender, explain
from moepress.bench.peers import lineup
from moepress.bench.problems import DTYPES, LAYERS, Problem, parse_shape, parse_tokens
from moepress.bench.run import Row, Setting, run_problem, warm_up
from moepress.cli.app import Device, app, pick_device, table, write_text
from moepress.errors import EvaluationError
from moepress.progress import console


@app.command(name="bench")
def bench(
    layer: Annotated[str | None, typer.Option(help=f"The routed experts of {', '.join(LAYERS)}; the first by "
                                                   "default.", show_default=False)] = None,
    dense: Annotated[str | None, typer.Option(help="A dense weight instead: outputs x inputs, such as 8192x8192.")]
    = None,
    moe: Annotated[str | None, typer.Option(help="Other experts: how many, chosen for a token, hidden size, inner "
                                                 "size, such as 8,2,4096,14336.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens that enter the layer at once.")] = "1,8,16,64,256,1024",
    bits: Annotated[int, typer.Option(min=1, max=8, help="Width of the weights.")] = 3,
    group_size: Annotated[int, typer.Option(min=1, help="Inputs that share a scale and a zero.")] = 64,
    rank: Annotated[int, typer.Option(min=0, help="Compensator rank.")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16 activations.")] = "bf16",
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Whether other projects' kernels run too.")] = True,
    why: Annotated[bool, typer.Option("--explain", help="Time nothing; print which implementation would run and why "
                                                        "others cannot.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each kernel gets, one after the other.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long each kernel is timed for each token count; "
                                                         "it runs once a round at least.")] = 1.0,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file, not as the last line of stdout.",
                                              dir_okay=False)] = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Time one layer on this GPU: microseconds, share of what the memory allows, ratio to 16 bits and to peers."""
    if dtype not in DTYPES:
        raise EvaluationError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    kind, shape, name = parse_shape(layer, dense, moe)
    problems = [Problem(kind, shape, count, bits, group_size, rank, dtype, name) for count in parse_tokens(tokens)]
    contenders = lineup(kind, dtype, peers=peers)
    if why:
        explain_problems(problems, contenders)
        return
    clock = CudaClock(cuda_device(device))
    setting = Setting(clock.device, clock.machine(), rounds, seconds)
    time_problems(problems, contenders, clock, setting, json)


def cuda_device(name: str) -> torch.device:
    """The GPU to time. Raises EvaluationError where there is none."""
    device = pick_device(name)
    if device.type != "cuda":
        found = f"torch {torch.__version__} sees {torch.cuda.device_count()} of them here"
        raise EvaluationError(f"moepress bench needs a CUDA GPU: {found}, and --device {name} is {device.type}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def explain_problems(problems: list[Problem], contenders: list[Contender]) -> None:
    """Our implementations for each problem, and for the other contenders whether they can run."""
    for problem in problems:
        rows = [(each.name, "runs" if each.chosen else "", each.reason) for each in explain(problem)]
        others = [each for each in contenders if each.role != OURS]
        rows += [(each.name, "runs" if (reason := each.why_not(problem)) is None else "", reason or each.note(problem))
                 for each in others]  # fmt: skip
        show(problem.title(), ("kernel", "", "why"), rows, (0, 1, 2))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> None:
    """A table under a title that may be wider than it."""
    print(f"\n{title}")
    table("", columns, rows, text=text)
    sys.stdout.flush()


def time_problems(
    problems: list[Problem], contenders: list[Contender], clock: CudaClock, setting: Setting, file: Path | None
) -> None:
    """A table for each problem as it is done; the file is written anew after each, so that nothing is lost."""
    machine = setting.machine
    print(report.machine_line(machine), flush=True)
    for line in warm_up(contenders, problems, setting):
        print(line, file=sys.stderr, flush=True)
    done: list[list[Row]] = []
    body = {}
    for problem in problems:
        with console(f"T = {problem.tokens}", len(contenders) + setting.rounds) as advance:
            rows = run_problem(problem, contenders, clock, setting, advance)
        clock.release()
        done.append(rows)
        show(report.heading(rows[0]), report.COLUMNS, [report.cells(row, rows, machine) for row in rows], report.TEXT)
        body = report.document(done, machine, {"rounds": setting.rounds, "seconds": setting.seconds})
        if file is not None:
            write_text(file, jsonlib.dumps(body) + "\n")
    if file is None:
        print(jsonlib.dumps(body), flush=True)
