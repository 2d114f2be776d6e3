# SPDX-License-Identifier: Apache-2.0
"""calibrate: measure a checkpoint on a text, for plans within a budget and for gptq."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from moepress.cli.app import (
    Device,
    Folder,
    Json,
    Memory,
    app,
    finish,
    free_memory,
    mebibytes,
    parse_memory,
    pick_device,
    table,
)
from moepress.errors import CalibrationError, CheckpointError
from moepress.evaluate.load import load_model
from moepress.format.spec import WeightSpec
from moepress.graph.view import ModelGraph
from moepress.measure.calibrate import calibrate as run_calibration
from moepress.measure.calibration import CalibrationSettings
from moepress.measure.corpus import evenly, read_windows
from moepress.measure.gradients import squared_gradients
from moepress.measure.stats_folder import recorded_kind
from moepress.plan.plan import label_of
from moepress.plan.statistics import Statistics
from moepress.progress import console
from moepress.source import Source, open_source

GRADIENTS = ("auto", "on", "off")
MODEL_ROOM = 1.6
"""Times the float32 weights: what running the whole model backwards to its inputs takes."""
_SHOWN_BITS = (2, 3, 4)
_SHOWN_EXPERTS = 8

Take = Callable[[], Mapping[str, torch.Tensor]]


@app.command()
def calibrate(
    source: Folder,
    text: Annotated[Path, typer.Option(help="Calibration text: .txt or .jsonl (also .xz, .gz), or a folder of "
                                            "the datasets library.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of statistics to make.")],
    windows: Annotated[int, typer.Option(help="How many stretches of the text to run the model over.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    seed: Annotated[int, typer.Option(help="Where in the text they lie.")] = 0,
    feed: Annotated[str, typer.Option(help="What a layer reads: full, as in the original model, or compressed, after "
                                           "earlier weights at --feed-bits.")] = "full",
    feed_bits: Annotated[int, typer.Option(help="For --feed compressed.")] = 4,
    method: Annotated[str, typer.Option(help="The quantiser whose errors are measured: gptq, hqq or rtn.")] = "gptq",
    bits: Annotated[str, typer.Option(help="Widths on the menu.")] = "1,2,3,4,5,6,8",
    group_sizes: Annotated[str, typer.Option(help="Group sizes on the menu.")] = "64,128",
    ranks: Annotated[str | None, typer.Option(help="Compensator ranks on the menu, for weights that every token "
                                                   "passes; 16,64 by default, none with rtn; 0 for none.")] = None,
    gradients: Annotated[str, typer.Option(help="on: gradients of the whole model, which must fit into memory in "
                                                "float32; off: sensitivities layer by layer; auto: on if it fits.")]
    = "auto",
    gradient_windows: Annotated[int, typer.Option(help="Windows to take gradients from.")] = 32,
    memory: Memory = "8GB",
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure a checkpoint on a text: what each choice costs each weight, and how experts are used."""
    begin, chosen, limit = time.monotonic(), pick_device(device), parse_memory(memory)
    if gradients not in GRADIENTS:
        raise CalibrationError(f"--gradients {gradients!r} is unknown; choose one of {', '.join(GRADIENTS)}")
    settings = CalibrationSettings(
        method=method, bits=_numbers("--bits", bits), group_sizes=_numbers("--group-sizes", group_sizes),
        ranks=None if ranks is None else tuple(r for r in _numbers("--ranks", ranks) if r),
        feed=feed, feed_bits=feed_bits, seed=seed, gradient_windows=gradient_windows,
    )  # fmt: skip
    with open_source(source) as src:
        ids = read_windows(text, load_tokenizer(source), windows=windows, length=length, seed=seed)
        recorded = recorded_kind(output) if resume else None
        take = None
        if wants_gradients(src, gradients, recorded, chosen, limit):
            take = _gradients(src, evenly(ids, gradient_windows), chosen)
        found = run_calibration(
            src, ids, output, settings, gradients=take, device=chosen, memory=limit, resume=resume, progress=console
        )
        show_statistics(found, src.graph)
    seconds = time.monotonic() - begin
    print(f"wrote {output} in {seconds:.0f} s: {found.tokens:,} tokens, losses of kind {found.kind!r}")
    finish(json, {"stats": str(output), "kind": found.kind, "tokens": found.tokens, "weights": len(found.errors),
                  "banks": len(found.experts), "short": list(found.short), "seconds": round(seconds, 1)})  # fmt: skip


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own; local files only. Raises CheckpointError where it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load: {error}") from error


def wants_gradients(src: Source, asked: str, recorded: str | None, device: torch.device, limit: int) -> bool:
    """Whether to take the whole model's gradients; says which it is and why. Raises CalibrationError for an `on` that
    does not fit."""
    if asked == "auto" and recorded is not None:
        print(f"gradients: {'whole-model' if recorded == 'fisher' else 'layer by layer'}, as the run was begun")
        return recorded == "fisher"
    if asked == "off":
        return False
    needed = int(MODEL_ROOM * 4 * sum(info.numel for info in src.reader.tensors.values()))
    where, free = _room(device, limit)
    fits = needed <= free
    because = f"the model in float32 takes about {mebibytes(needed)} with its activations, {where} {mebibytes(free)}"
    if asked == "on" and not fits:
        raise CalibrationError(f"--gradients on: {because}; use --gradients off, or give more memory")
    print(f"gradients: {'whole-model' if fits else 'layer by layer'} ({because})")
    return fits


def _room(device: torch.device, limit: int) -> tuple[str, int]:
    """What is free for a whole model, and what says so."""
    if device.type == "cuda":
        return f"{device} has free", torch.cuda.mem_get_info(device)[0]
    available = free_memory(torch.device("cpu"))
    return ("--memory allows", limit) if limit <= available else ("this machine has free", available)


def _gradients(src: Source, ids: torch.Tensor, device: torch.device) -> Take:
    def take() -> Mapping[str, torch.Tensor]:
        model, _ = load_model(src.folder, device, "float32")
        rows = squared_gradients(model, src.graph, ids, progress=console).rows
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return rows

    return take


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise CalibrationError(f"{option} {text!r} is no list of whole numbers, such as 2,3,4") from error


def show_statistics(found: Statistics, graph: ModelGraph) -> None:
    """Predicted losses by role, the use of experts, and those that too few tokens reached."""
    settings = found.settings
    specs = [WeightSpec(bits=b, group_size=settings["group_sizes"][0]) for b in _SHOWN_BITS if b in settings["bits"]]
    labels = [label_of(settings["method"], spec) for spec in specs]
    roles: dict[str, list[str]] = {}
    for ref in graph.weights:
        roles.setdefault(ref.role, []).append(ref.name)
    rows = [[role, len(names), *(_total(found, names, label) for label in labels)] for role, names in roles.items()]
    rows.append(["all", len(found.errors), *(_total(found, list(found.errors), label) for label in labels)])
    unit = "nats a token" if found.kind == "fisher" else "relative to the residual stream"
    table(f"predicted loss, {unit}", ("role", "weights", *labels), rows)
    use = []
    for bank, experts in found.experts.items():
        total = max(sum(expert.tokens for expert in experts), 1)
        shares = [expert.tokens / total for expert in experts]
        use.append((bank, len(shares), f"{min(shares):.1%}", f"{max(shares):.1%}"))
    if use:
        table("expert use", ("experts of", "count", "least", "most"), use)
    if found.short:
        print(_short_line(found.short, int(settings["min_tokens"])))


def _short_line(short: Sequence[str], least: int) -> str:
    more = f" and {len(short) - _SHOWN_EXPERTS} more" if len(short) > _SHOWN_EXPERTS else ""
    return (
        f"{len(short)} experts saw fewer than {least} tokens and are judged by their weights alone; more windows would "
        f"help: {', '.join(short[:_SHOWN_EXPERTS])}{more}"
    )


def _total(found: Statistics, names: Sequence[str], label: str) -> str:
    losses = [found.errors[name].get(label) for name in names]
    known = [loss for loss in losses if loss is not None]
    return f"{sum(known):.4g}" if known else "-"
