# SPDX-License-Identifier: Apache-2.0
"""eval, profile, demo: commands that run a model over a text."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from moepress.cli.app import (
    Device,
    Dial,
    Dtype,
    ExpertsPlot,
    Folder,
    Json,
    NoPruning,
    app,
    finish,
    mebibytes,
    pick_device,
    table,
    write_text,
)
from moepress.cli.experts import check_plot, tell_experts
from moepress.demo.run import run_demo
from moepress.errors import EvaluationError
from moepress.evaluate.load import load_model
from moepress.evaluate.perplexity import perplexity, read_text
from moepress.evaluate.sizes import folder_sizes
from moepress.evaluate.tasks import load_task, run_task
from moepress.measure.frequency import profile_frequencies
from moepress.progress import console
from moepress.pruning.attach import counting, is_pruned, set_pruning_dial


@app.command(name="eval")
def evaluate(
    folder: Folder,
    ppl: Annotated[Path | None, typer.Option(help="Text (.txt, or .jsonl with a text field) for perplexity.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of context.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; the window's size (disjoint) by default.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first tokens of the text.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="lambada=FILE, piqa=FILE or hellaswag=FILE.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Task examples run at once.")] = 8,
    experts_report: Annotated[
        bool, typer.Option("--experts-report", help="Of a pruned model: experts run by layer and by position of --ppl.")
    ] = False,
    experts_plot: ExpertsPlot = None,
    no_pruning: NoPruning = False,
    dial: Dial = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Perplexity and zero-shot tasks of a checkpoint, compressed or not; of a pruned one also the experts it ran."""
    if ppl is None and not task:
        raise EvaluationError("nothing to evaluate; give --ppl FILE or --task NAME=FILE")
    check_plot(experts_plot)
    if ppl is None and (experts_report or experts_plot):
        raise EvaluationError("experts are counted over the text of --ppl; give one")
    tasks = [load_task(*_name_and_file(each), limit=limit) for each in task or ()]
    text = read_text(ppl) if ppl else None
    model, tokenizer = load_model(folder, pick_device(device), dtype, pruning=not no_pruning)
    if dial is not None:
        set_pruning_dial(model, dial)
    body: dict[str, Any] = {"ppl": None, "tokens": None, "protocol": None, "tasks": {}}
    if text is not None:
        counted = is_pruned(model) or experts_report or experts_plot is not None
        with counting(model, window) if counted else nullcontext() as read:
            found = perplexity(model, tokenizer, text, window=window, stride=stride or window, max_tokens=max_tokens,
                               progress=console)  # fmt: skip
            counts = read() if read else None
        body |= dataclasses.asdict(found)
        print(f"perplexity {found.ppl:.4f} over {found.tokens} tokens ({found.protocol})")
        body |= tell_experts(counts, experts_report, experts_plot)
    for each in tasks:
        result = run_task(model, tokenizer, each, batch_size=batch_size, progress=console)
        body["tasks"][result.task] = dataclasses.asdict(result)
        print(f"{result.task}: " + ", ".join(f"{k} {v:.4f}" for k, v in result.metrics.items()) + f" (n {result.n})")
    sizes = folder_sizes(folder, model)
    print(f"stored {mebibytes(sizes['stored_bytes'])}, {sizes['stored_bpw']:.3f} bits per weight; "
          f"resident {mebibytes(sizes['resident_bytes'])}, {sizes['resident_bpw']:.3f}")  # fmt: skip
    finish(json, body | {"sizes": sizes, "dtype": str(model.dtype).removeprefix("torch."), "folder": str(folder)})


@app.command()
def profile(
    source: Folder,
    text: Annotated[Path, typer.Option(help="Text (.txt, or .jsonl with a text field) to run the model over.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The frequencies file to write.")],
    window: Annotated[int, typer.Option(help="Tokens of context.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first tokens of the text.")] = 65536,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Count how often each routed expert is chosen, for the frequency rank policy."""
    model, tokenizer = load_model(source, pick_device(device), dtype, pruning=False)
    body = profile_frequencies(model, tokenizer, read_text(text), window, max_tokens, console)
    write_text(output, jsonlib.dumps(body) + "\n")
    shares = [(name, [c / max(sum(counts), 1) for c in counts]) for name, counts in body["banks"].items()]
    table(
        "expert use",
        ("experts of", "least", "most"),
        [(n, f"{min(s):.1%}", f"{max(s):.1%}") for n, s in shares],
    )
    finish(json, {"frequencies": str(output), "tokens": body["tokens"], "banks": len(body["banks"])})


@app.command()
def demo(device: Device = "cpu", json: Json = False) -> None:
    """Compress the embedded model with RTN, HQQ and MiLo at 3 bits, and within a budget, and show what each costs."""
    rows = run_demo(pick_device(device), console)
    shown = [(r["name"], f"{r['bpw']:.3f}", f"{r['bytes']:,}", f"{r['ppl']:.2f}", r["text"]) for r in rows]
    table("the embedded model", ("weights", "bits/weight", "bytes", "perplexity", "greedy text"), shown,
          text=(0, 4))  # fmt: skip
    finish(json, {"rows": rows})


def _name_and_file(text: str) -> tuple[str, Path]:
    name, found, path = text.partition("=")
    if not found:
        raise EvaluationError(f"--task {text!r} is not of the form NAME=FILE, such as lambada=test.jsonl")
    return name, Path(path)
