# SPDX-License-Identifier: Apache-2.0
"""train-pruning: teach a checkpoint which experts each token needs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moepress.checkpoint.reader import CONFIG
from moepress.checkpoint.side import sha256
from moepress.checkpoint.writer import refuse_existing
from moepress.cli.app import Device, Dtype, Folder, Json, app, finish, free_memory, mebibytes, pick_device
from moepress.errors import PruningError
from moepress.evaluate.load import load_model
from moepress.evaluate.scoring import max_positions
from moepress.measure.corpus import read_windows, windows_digest
from moepress.progress import console
from moepress.pruning.dense import dense_bytes, differentiable
from moepress.pruning.sites import moe_sites
from moepress.pruning.stored import publish_pruned
from moepress.pruning.train import TrainingSettings, train
from moepress.pruning.unfinished import Unfinished
from moepress.version import __version__

DENSE = ("auto", "keep", "remake")
RENORMALISE = {"auto": None, "yes": True, "no": False}
DENSE_SHARE = 0.6
"""Of the free memory: what dense weights may take at most, activations need the rest."""
_DEFAULT = TrainingSettings()


@app.command(name="train-pruning")
def train_pruning(
    source: Folder,
    text: Annotated[Path, typer.Option(help="Training text: .txt or .jsonl (also .xz, .gz), or a folder of the "
                                            "datasets library.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make; must not exist.")],
    target: Annotated[float, typer.Option(help="Share of the routed activations to drop.")] = _DEFAULT.target,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = _DEFAULT.batch,
    measure_steps: Annotated[int, typer.Option(help="Steps that measure what dropping costs.")]
    = _DEFAULT.measure_steps,
    distil_steps: Annotated[int, typer.Option(help="Steps that distil the unpruned model.")] = _DEFAULT.distil_steps,
    held: Annotated[int, typer.Option(help="Windows kept from training, on which the target is met.")]
    = _DEFAULT.held,
    renormalise: Annotated[str, typer.Option(help="Whether kept routing weights take over the sum of all: yes, no, or "
                                                  "auto, what loses less on the text.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the windows and of the training.")] = _DEFAULT.seed,
    dense: Annotated[str, typer.Option(help="Of a compressed model, keep dequantised weights in memory, or remake "
                                            "them for each use; auto keeps them if they fit.")] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between states that --resume continues from.")] = 16,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Teach a checkpoint, compressed or not, which of its top-k experts each token needs; nothing else is trained."""
    begin, chosen = time.monotonic(), pick_device(device)
    if dense not in DENSE:
        raise PruningError(f"--dense {dense!r} is unknown; choose one of {', '.join(DENSE)}")
    if renormalise not in RENORMALISE:
        raise PruningError(f"--renormalise {renormalise!r} is unknown; choose one of {', '.join(RENORMALISE)}")
    if save_every < 1:
        raise PruningError(f"--save-every is {save_every}; the least is 1")
    settings = TrainingSettings(
        target=target, measure_steps=measure_steps, distil_steps=distil_steps, batch=batch, held=held,
        renormalise=RENORMALISE[renormalise], seed=seed,
    )  # fmt: skip
    refuse_existing(output)
    model, tokenizer = load_model(source, chosen, dtype, pruning=False)
    if (limit := max_positions(model)) is not None and length > limit:
        raise PruningError(f"--length {length} is more than the model's {limit} positions; ask for fewer")
    ids = read_windows(text, tokenizer, windows=settings.windows, length=length, seed=seed)
    fingerprint = fingerprint_of(source, model, ids, settings)
    with Unfinished(output, fingerprint, resume=resume) as folder:
        with differentiable(model, keep=keeps_dense(model, dense, chosen)):
            found = train(
                model, ids, settings, state=folder.load(), save=folder.save, save_every=save_every, progress=console
            )
        rules = {site.name: rule for site, rule in zip(moe_sites(model), found.selectors, strict=True)}
        publish_pruned(source, output, rules)
        folder.remove()
    seconds, share = time.monotonic() - begin, found.parameters / total_parameters(model)
    print(f"drops {found.dropped:.2%} of the routed activations on held-out text ({target:.2%} were asked for), at a "
          f"divergence of {found.divergence:.4f} nats a token")  # fmt: skip
    if found.renormalises is False:
        print("kept routing weights stay as they are: taking over the sum of all loses more here")
    print(f"wrote {output} in {seconds:.0f} s: {found.parameters:,} parameters, {share:.2%} of the model's")
    finish(json, {"pruned": str(output), "target": target, "dropped": found.dropped,
                  "renormalises": found.renormalises, "divergence": found.divergence,
                  "parameters": found.parameters, "share": share, "tokens": ids.numel(),
                  "seconds": round(seconds, 1)})  # fmt: skip


def fingerprint_of(source: Path, model: Any, ids: torch.Tensor, settings: TrainingSettings) -> dict[str, Any]:
    """All that the result depends on; weights by name and size, of which the source's own digests tell more."""
    weights = sorted((path.name, path.stat().st_size) for path in source.glob("*.safetensors"))
    return {
        **dataclasses.asdict(settings),
        "windows": windows_digest(ids),
        "config": sha256((source / CONFIG).read_bytes()),
        "weights": [list(each) for each in weights],
        "dtype": str(model.dtype),
        "device": model.device.type,
        "torch": torch.__version__,
        "moepress": __version__,
    }


def keeps_dense(model: Any, asked: str, device: torch.device) -> bool:
    """Whether dense weights stay in memory; says so where that was ours to decide."""
    needed = dense_bytes(model, model.dtype)
    if asked != "auto" or not needed:
        return asked != "remake"
    free = free_memory(device)
    fits = needed <= DENSE_SHARE * free
    print(f"dense weights: {'kept' if fits else 'remade for each use'} ({mebibytes(needed)}, free {mebibytes(free)})")
    return fits


def total_parameters(model: Any) -> int:
    """Weights as the model's architecture counts them, compressed ones at their full number."""
    plain = sum(parameter.numel() for parameter in model.parameters())
    return plain + dense_bytes(model, torch.int8)
