# SPDX-License-Identifier: Apache-2.0
"""generate: continue a prompt, and tell which layers ran how many experts for it."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Annotated

import typer

from moepress.cli.app import Device, Dial, Dtype, ExpertsPlot, Folder, Json, NoPruning, app, finish, pick_device
from moepress.cli.experts import check_plot, tell_experts
from moepress.errors import EvaluationError
from moepress.evaluate.load import load_model
from moepress.pruning.attach import counting, set_pruning_dial


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    experts_report: Annotated[
        bool, typer.Option("--experts-report", help="Tell which layers and positions ran how many experts.")
    ] = False,
    experts_plot: ExpertsPlot = None,
    no_pruning: NoPruning = False,
    dial: Dial = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Continue a prompt, streaming the text."""
    from transformers import TextStreamer, set_seed

    check_plot(experts_plot)
    model, tokenizer = load_model(folder, pick_device(device), dtype, pruning=not no_pruning)
    if dial is not None:
        set_pruning_dial(model, dial)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise EvaluationError("the prompt is empty; give at least one token with -p")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    wanted = experts_report or experts_plot is not None
    with counting(model, length + max_new_tokens) if wanted else nullcontext() as read:
        start = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer), **sampling)
        seconds = time.perf_counter() - start
        counts = read() if read else None
    new = ids[0, length:]
    rate = len(new) / seconds
    print(f"[{len(new)} tokens, {rate:.1f} a second]")
    text = tokenizer.decode(new, skip_special_tokens=True)
    body = {"prompt": prompt, "text": text, "tokens": len(new), "tokens_per_second": rate}
    finish(json, body | tell_experts(counts, experts_report, experts_plot))
