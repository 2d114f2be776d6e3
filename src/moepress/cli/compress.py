# SPDX-License-Identifier: Apache-2.0
"""inspect, plan, compress, verify: the commands that turn one folder into another and look at both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from moepress.cli.app import Device, Folder, Json, app, finish, pick_device, read_text, write_text
from moepress.cli.show import show_errors, show_inventory, show_plan
from moepress.errors import PlanError
from moepress.graph.view import ROUTED
from moepress.measure.frequency import read_frequencies
from moepress.pipeline import compress_checkpoint, measure_kurtosis, plan_checkpoint
from moepress.plan.plan import Plan
from moepress.plan.settings import Settings, preset
from moepress.progress import console
from moepress.source import Source, open_source
from moepress.verify import verify_checkpoint

Preset = Annotated[str | None, typer.Option(help="milo-s1 (the default) or milo-s2: the MiLo paper's settings.")]
Method = Annotated[str | None, typer.Option(help="rtn, hqq or milo.")]
Bits = Annotated[int | None, typer.Option(help="1 to 6, or 8.")]
GroupSize = Annotated[int | None, typer.Option(help="Inputs that share a scale and a zero: 32, 64 or 128.")]
DenseRank = Annotated[int | None, typer.Option(help="Compensator rank of attention, shared experts and dense MLPs.")]
SparseRank = Annotated[int | None, typer.Option(help="Compensator rank of every routed expert matrix.")]
RankPolicy = Annotated[
    str | None,
    typer.Option(help="A sum such as dense-512+kurtosis-16; kinds: uniform, dense, sparse, kurtosis, "
                      "milo-kurtosis, frequency."),
]  # fmt: skip
FactorBits = Annotated[int | None, typer.Option(help="Width of the compensators' factors: 3, 4, 8 or 16.")]
Iterations = Annotated[int | None, typer.Option(help="Alternations of quantiser and compensator, at most.")]
Refit = Annotated[bool | None, typer.Option("--refit/--no-refit", help="Refit the factors to each other while they are "
                                            "quantised; --no-refit is MiLo's own way.")]  # fmt: skip
Keep = Annotated[list[str] | None, typer.Option(help="Leave these as they are: a name pattern, a role (attn.q) or a "
                                                     "group (attn, shared, mlp, expert). Repeatable.")]  # fmt: skip
Frequencies = Annotated[Path | None, typer.Option(help="Expert frequencies, as `moepress profile` writes them.")]


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
def plan(
    source: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    preset: Preset = None, method: Method = None, bits: Bits = None, group_size: GroupSize = None,
    dense_rank: DenseRank = None, sparse_rank: SparseRank = None, rank_policy: RankPolicy = None,
    factor_bits: FactorBits = None, iterations: Iterations = None, refit: Refit = None, keep: Keep = None,
    frequencies: Frequencies = None, device: Device = "cpu", json: Json = False,
) -> None:  # fmt: skip
    """The decisions that `compress` would take, as a file to read, edit and pass to `compress --plan`."""
    chosen = pick_device(device)
    asked = _asked(method, bits, group_size, factor_bits, iterations, refit)
    ranks = ranks_from(dense_rank, sparse_rank, rank_policy)
    settings, counts = _settle(source, preset, asked, ranks, keep, frequencies)
    made = plan_checkpoint(source, settings, frequencies=counts, device=chosen, progress=console)
    write_text(output, made.to_json())
    show_plan(made)
    finish(json, {"plan": str(output), "settings": settings.as_dict(), **made.notes["predicted"]})


@app.command()
def compress(
    source: Folder,
    target: Annotated[Path, typer.Argument(help="The folder to make; must not exist.", show_default=False)],
    preset: Preset = None, method: Method = None, bits: Bits = None, group_size: GroupSize = None,
    dense_rank: DenseRank = None, sparse_rank: SparseRank = None, rank_policy: RankPolicy = None,
    factor_bits: FactorBits = None, iterations: Iterations = None, refit: Refit = None, keep: Keep = None,
    frequencies: Frequencies = None,
    plan: Annotated[Path | None, typer.Option(help="Do what this plan says.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")] = False,
    device: Device = "auto", json: Json = False,
) -> None:  # fmt: skip
    """Compress a checkpoint folder into a new one."""
    asked = _asked(method, bits, group_size, factor_bits, iterations, refit)
    ranks = ranks_from(dense_rank, sparse_rank, rank_policy)
    options: dict[str, Any] = {"device": pick_device(device), "resume": resume, "progress": console}
    if plan is not None:
        if preset or ranks or keep or frequencies or any(value is not None for value in asked.values()):
            raise PlanError("--plan already decides everything; edit the plan instead of adding options")
        result = compress_checkpoint(source, target, plan=Plan.from_json(read_text(plan)), **options)
    else:
        settings, counts = _settle(source, preset, asked, ranks, keep, frequencies)
        result = compress_checkpoint(source, target, settings, frequencies=counts, **options)
    show_plan(result.plan, result.summary)
    show_errors(result.errors)
    print(f"wrote {target}" + (f" ({result.resumed} weights were already done)" if result.resumed else ""))
    finish(json, {"target": str(target), "resumed": result.resumed, **result.summary})


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


def _asked(*values: Any) -> dict[str, Any]:
    names = ("method", "bits", "group_size", "factor_bits", "iterations", "refit")
    return dict(zip(names, values, strict=True))


def ranks_from(dense: int | None, sparse: int | None, policy: str | None) -> str | None:
    """The rank options as one policy, or None where none was given."""
    if dense is None and sparse is None:
        return policy
    if policy is not None:
        raise PlanError("--rank-policy and --dense-rank/--sparse-rank say the same thing twice; give one of them")
    return f"dense-{dense or 0}+sparse-{sparse or 0}"


def _settle(
    source: Path,
    name: str | None,
    asked: dict[str, Any],
    ranks: str | None,
    keep: list[str] | None,
    path: Path | None,
) -> tuple[Settings, dict[str, list[float]]]:
    with open_source(source) as src:
        counts = read_frequencies(path, src.graph) if path else {}
        return resolve_settings(src, name, asked, ranks, tuple(keep or ())), counts


def resolve_settings(
    src: Source, name: str | None, asked: dict[str, Any], ranks: str | None, keep: tuple[str, ...]
) -> Settings:
    """Options over a preset over defaults. Without a preset and a method the preset is milo-s1."""
    given = {key: value for key, value in asked.items() if value is not None} | {"keep": keep}
    if ranks is not None:
        given["ranks"] = ranks
    if name is None and given.get("method") in ("rtn", "hqq"):
        return Settings(**given)
    experts = [ref.expert or 0 for ref in src.graph.weights if ref.group == ROUTED]
    hidden = src.reader.config.get("hidden_size")
    if not isinstance(hidden, int) or not experts:
        raise PlanError("presets need hidden_size in config.json and routed experts; give --method and ranks instead")
    base = preset(name or "milo-s1", src.graph.family.model_type, hidden, max(experts) + 1)
    return dataclasses.replace(base, **given)
