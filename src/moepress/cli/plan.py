# SPDX-License-Identifier: Apache-2.0
"""plan: decisions as a file that people read, edit and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moepress.cli import options as opt
from moepress.cli.app import Device, Json, app, finish, pick_device, read_text, write_text
from moepress.cli.show import show_difference, show_plan, show_plan_file
from moepress.errors import PlanError
from moepress.plan.plan import Plan
from moepress.planning import plan_checkpoint
from moepress.progress import console

Source = Annotated[Path | None, typer.Argument(help="A Hugging Face checkpoint folder.", show_default=False)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The plan file to write.")]
Show = Annotated[Path | None, typer.Option(help="Print what this plan file says, by role.")]
Diff = Annotated[tuple[Path, Path] | None, typer.Option(help="Print what changes from one plan file to another.")]


@app.command()
def plan(
    source: Source = None,
    output: Output = None,
    show: Show = None,
    diff: Diff = None,
    budget: opt.Budget = None, stats: opt.Stats = None, preset: opt.Preset = None, method: opt.Method = None,
    bits: opt.Bits = None, group_size: opt.GroupSize = None, dense_rank: opt.DenseRank = None,
    sparse_rank: opt.SparseRank = None, rank_policy: opt.RankPolicy = None, factor_bits: opt.FactorBits = None,
    iterations: opt.Iterations = None, refit: opt.Refit = None, keep: opt.Keep = None,
    frequencies: opt.Frequencies = None, gamma: opt.Gamma = None, scope: opt.Scope = None,
    device: Device = "cpu", json: Json = False,
) -> None:  # fmt: skip
    """The decisions that `compress` would take, as a file to read, edit and pass to `compress --plan`.

    With --budget widths and group sizes are chosen weight by weight; with --preset pmq expert by expert.
    """
    if show or diff:
        if source or output:
            raise PlanError("--show and --diff read plan files alone; leave out SOURCE and --output")
        body = show_plan_file(_read(show)) if show else {}
        finish(json, body | (show_difference(_read(diff[0]), _read(diff[1])) if diff else {}))
        return
    if source is None or output is None:
        raise PlanError("give a checkpoint folder and -o FILE, or --show FILE, or --diff OLD NEW")
    asked = opt.Asked(
        budget=budget, stats=stats, preset=preset, method=method, bits=bits, group_size=group_size,
        dense_rank=dense_rank, sparse_rank=sparse_rank, rank_policy=rank_policy, factor_bits=factor_bits,
        iterations=iterations, refit=refit, keep=keep, frequencies=frequencies, gamma=gamma, scope=scope,
    )  # fmt: skip
    chosen = pick_device(device)
    made, settings, counts = opt.settle(source, asked, chosen)
    if made is None:
        assert settings is not None, "neither a plan nor settings"
        options = {"statistics": stats, "device": chosen, "progress": console}
        made = plan_checkpoint(source, settings, frequencies=counts, **options)
    write_text(output, made.to_json())
    _print(made)
    facts = {"settings": settings.as_dict()} if settings else {"allocation": dict(made.notes["allocation"])}
    finish(json, {"plan": str(output), **facts, **made.notes["predicted"]})


def _print(made: Plan) -> None:
    if "allocation" in made.notes:
        show_plan_file(made)
    show_plan(made)


def _read(path: Path) -> Plan:
    return Plan.from_json(read_text(path))
