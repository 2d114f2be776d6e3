# SPDX-License-Identifier: Apache-2.0
"""Does a compressed folder compute what its stored weights mean? Logits and greedy text beside the source model.

The reference is the source checkpoint with every compressed weight replaced by `dequantize` of its stored
parts, written to a temporary folder and loaded by transformers alone. Both run in float32 on the same tokens.

    python benchmarks/logits.py SRC DST [--text FILE] [--tokens 256] [--new 32]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import DEMO_TEXT, Figure, finish
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moepress.checkpoint.reader import CheckpointReader
from moepress.format.manifest import Manifest
from moepress.format.weight import dequantize
from moepress.source import Source, open_source
from moepress.verify import load_parts

TARGET = 1e-3
PROMPT = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="the original checkpoint")
    parser.add_argument("target", type=Path, help="what `moepress compress` made of it")
    parser.add_argument("--text", type=Path, default=DEMO_TEXT)
    parser.add_argument("--tokens", type=int, default=256, help="how many tokens of the text to run")
    parser.add_argument("--new", type=int, default=32, help="how many tokens to generate greedily")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(options.source)(text, return_tensors="pt")["input_ids"][:, : options.tokens]
    with TemporaryDirectory(prefix="moepress-logits-") as folder:
        write_dequantized(options.source, options.target, Path(folder))
        expected, expected_text = run(Path(folder), tokens, options.new)
    found, found_text = run(options.target, tokens, options.new)
    error = (
        (torch.linalg.vector_norm(found - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)).max().item()
    )
    same = float(torch.equal(found_text, expected_text))
    print(f"{tokens.shape[1]} tokens: largest relative logit error {error:.2e} (target {TARGET}), ", end="")
    print(f"greedy text of {options.new} tokens {'equal' if same else 'DIFFERS'}")
    note = f"{options.source.resolve().name}, {tokens.shape[1]} tokens"
    largest = Figure("largest relative logit error", error, "", f"at most {TARGET}", note)
    finish("logits", [largest, Figure("greedy text equal", same, "", "1", f"{note}, {options.new} new")])
    return int(error > TARGET or not same)


def write_dequantized(source: Path, target: Path, folder: Path) -> None:
    """The source's folder with the values that `target` stores for its compressed weights."""
    with open_source(source) as src, CheckpointReader(target) as stored:
        manifest = Manifest.from_config(stored.config["quantization_config"])
        save_file(overwritten(src, stored, manifest), folder / "model.safetensors", metadata={"format": "pt"})
        config = {key: value for key, value in src.reader.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config))


def overwritten(src: Source, stored: CheckpointReader, manifest: Manifest) -> dict[str, torch.Tensor]:
    weights = defaultdict(list)
    for ref in src.graph.weights:
        weights[ref.tensor].append(ref)
    tensors = {}
    for name in set(src.reader.tensors) - set(src.graph.folded):
        value = src.reader.load_float(name)
        tensors[name] = value.float() if value.is_floating_point() else value
        for ref in weights[name]:
            place = tensors[name] if ref.slot is None else tensors[name][ref.slot]
            rows = place if ref.rows is None else place[ref.rows[0] : ref.rows[1]]
            if ref.bank in manifest.banks or ref.module in manifest.linears:
                rows.copy_(stored_value(stored, manifest, ref))
    return tensors


def stored_value(stored: CheckpointReader, manifest: Manifest, ref) -> torch.Tensor:  # type: ignore[no-untyped-def]
    if ref.bank is None:
        spec = manifest.linears[ref.module].spec
    else:
        spec = manifest.banks[ref.bank].specs(ref.projection)[ref.expert]
    return dequantize(load_parts(stored, manifest, ref), spec, *ref.shape)


@torch.inference_mode()
def run(folder: Path, tokens: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] of the tokens, and the ids generated greedily after the first few."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokens[:, :PROMPT]
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    return model(tokens).logits[0], ids[0]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
