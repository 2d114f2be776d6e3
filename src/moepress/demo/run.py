# SPDX-License-Identifier: Apache-2.0
"""The main job on the embedded model: a small Mixture of Experts trained on public-domain novels, compressed by
three methods at 3 bits and by a budget of the same bytes, and what each costs on an excerpt that it was not trained
on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from moepress.evaluate.load import load_model
from moepress.evaluate.perplexity import perplexity, read_text
from moepress.evaluate.sizes import folder_sizes
from moepress.pipeline import compress_checkpoint
from moepress.plan.settings import Settings
from moepress.planning import plan_budget
from moepress.progress import Progress, silent

HERE = Path(__file__).parent
MODEL = HERE / "model"
EXCERPT = HERE / "excerpt.txt"
PROMPT = "It was"
WINDOW = 512
RECIPES = {
    "RTN": Settings(method="rtn"),
    "HQQ": Settings(method="hqq"),
    # the MiLo preset's proportions on a hidden size of 256; INT3 factors as in the paper
    "MiLo": Settings(method="milo", ranks="dense-32+kurtosis-4", iterations=10),
}
BUDGET = "3.5bpw"
"""What RTN and HQQ take at 3 bits in groups of 64."""


def run_demo(device: torch.device, progress: Progress = silent) -> list[dict[str, Any]]:
    """One row for the original and one for each recipe: name, bpw, bytes, ppl, text."""
    rows = [_measure("original (bf16)", MODEL, device)]
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in RECIPES.items():
            target = Path(folder) / name
            compress_checkpoint(MODEL, target, settings, device=device, progress=progress)
            rows.append(_measure(name, target, device))
        plan = plan_budget(MODEL, BUDGET, device=device, progress=progress)
        compress_checkpoint(MODEL, Path(folder) / "budget", plan=plan, device=device, progress=progress)
        rows.append(_measure(f"--budget {BUDGET}", Path(folder) / "budget", device))
    return rows


def _measure(name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    model, tokenizer = load_model(folder, device, "float32")
    found = perplexity(model, tokenizer, read_text(EXCERPT), window=WINDOW, stride=WINDOW)
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    sizes = folder_sizes(folder, model)
    text = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    bpw = sizes.get("compressed_bpw", 16.0)
    return {"name": name, "bpw": bpw, "bytes": int(sizes["stored_bytes"]), "ppl": found.ppl, "text": text,
            "protocol": found.protocol}  # fmt: skip
