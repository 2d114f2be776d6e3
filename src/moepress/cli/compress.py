# SPDX-License-Identifier: Apache-2.0
"""inspect, compress, verify: the commands that turn one folder into another and look at both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from moepress.cli import options as opt
from moepress.cli.app import Device, Folder, Json, Memory, app, finish, parse_memory, pick_device, read_text
from moepress.cli.show import show_errors, show_inventory, show_plan
from moepress.errors import PlanError
from moepress.pipeline import compress_checkpoint
from moepress.plan.plan import Plan
from moepress.plan.settings import METHODS
from moepress.planning import measure_kurtosis
from moepress.progress import console
from moepress.source import open_source
from moepress.verify import verify_checkpoint


@app.command()
def inspect(
    source: Folder,
    kurtosis: Annotated[bool, typer.Option(help="Read the weights and measure their kurtosis.")] = True,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """What is in a checkpoint: roles, shapes, bytes, kurtosis; what would be compressed and what not."""
    chosen = pick_device(device)
    with open_source(source) as src:
        measured = measure_kurtosis(src, chosen, console) if kurtosis else {}
        finish(json, show_inventory(src, measured))


@app.command()
def compress(
    source: Folder,
    target: Annotated[Path, typer.Argument(help="The folder to make; must not exist.", show_default=False)],
    plan: Annotated[Path | None, typer.Option(help="Do what this plan says; --method replaces its methods.")] = None,
    budget: opt.Budget = None, stats: opt.Stats = None, preset: opt.Preset = None, method: opt.Method = None,
    bits: opt.Bits = None, group_size: opt.GroupSize = None, dense_rank: opt.DenseRank = None,
    sparse_rank: opt.SparseRank = None, rank_policy: opt.RankPolicy = None, factor_bits: opt.FactorBits = None,
    iterations: opt.Iterations = None, refit: opt.Refit = None, keep: opt.Keep = None,
    frequencies: opt.Frequencies = None, gamma: opt.Gamma = None, scope: opt.Scope = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")] = False,
    windows: opt.Windows = None,
    memory: Memory = "4GB", device: Device = "auto", json: Json = False,
) -> None:  # fmt: skip
    """Compress a checkpoint folder into a new one."""
    asked = opt.Asked(
        budget=budget, stats=stats, preset=preset, method=method, bits=bits, group_size=group_size,
        dense_rank=dense_rank, sparse_rank=sparse_rank, rank_policy=rank_policy, factor_bits=factor_bits,
        iterations=iterations, refit=refit, keep=keep, frequencies=frequencies, gamma=gamma, scope=scope,
    )  # fmt: skip
    options: dict[str, Any] = {"device": pick_device(device), "resume": resume, "progress": console}
    options |= {"statistics": stats, "memory": parse_memory(memory), "windows": windows}
    if plan is not None:
        asked.only({"--method", "--stats"}, "--plan already decides everything; edit the plan instead")
        made, settings, counts = _with_method(Plan.from_json(read_text(plan)), method), None, {}
    else:
        made, settings, counts = opt.settle(source, asked, options["device"])
    result = compress_checkpoint(source, target, settings, plan=made, frequencies=counts, **options)
    show_plan(result.plan, result.summary)
    show_errors(result.errors)
    print(f"wrote {target}" + (f" ({result.resumed} weights were already done)" if result.resumed else ""))
    finish(json, {"target": str(target), "resumed": result.resumed, **result.summary})


def _with_method(plan: Plan, method: str | None) -> Plan:
    if method is None:
        return plan
    if method not in METHODS:
        raise PlanError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    return dataclasses.replace(plan, method=method, methods={})


@app.command()
def verify(
    target: Folder,
    against: Annotated[Path | None, typer.Option(help="The source: also report the error of every weight.")] = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Check every file, shape and checksum of a compressed folder; exits with 1 where something is wrong."""
    pick_device(device)
    found = verify_checkpoint(target, against, progress=console)
    for problem in found.problems:
        print(f"problem: {problem}")
    show_errors(found.errors)
    verdict = f"{len(found.problems)} problems" if found.problems else "sound"
    print(f"{target}: {verdict} ({found.files} files, {found.tensors} tensors checked)")
    finish(json, {"ok": not found.problems, **dataclasses.asdict(found)})
    if found.problems:
        raise typer.Exit(1)
