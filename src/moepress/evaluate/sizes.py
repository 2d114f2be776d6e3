# SPDX-License-Identifier: Apache-2.0
"""Stored and resident bytes of a checkpoint, as bits per weight of the original model, everything counted in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moepress.checkpoint.reader import CheckpointReader
from moepress.evaluate.report import bits_per_weight, resident_bytes
from moepress.format.manifest import QUANT_METHOD, Manifest
from moepress.pruning.attach import rules_of
from moepress.pruning.stored import FILE


def folder_sizes(folder: str | Path, model: Any) -> dict[str, float]:
    """Bytes of all tensors in the files and of the loaded `model`, each also per weight of the uncompressed model.

    Rules of pruning are counted in, as stored in the folder and as attached to the model. For a compressed folder
    `compressed_bpw` counts the compressed weights alone, with scales, zeros and factors.
    """
    with CheckpointReader(folder) as reader:
        stored = sum(info.num_bytes for info in reader.tensors.values())
        numel = {name: info.numel for name, info in reader.tensors.items()}
        sizes = {name: info.num_bytes for name, info in reader.tensors.items()}
        config = reader.config.get("quantization_config")
    if (rules := Path(folder) / FILE).exists():
        stored += rules.stat().st_size
    own: set[str] = set()
    weights = 0
    if isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD:
        manifest = Manifest.from_config(config)
        own = set(manifest.stored())
        weights = sum(math.prod(entry.shape) for entry in manifest.linears.values())
        for bank in manifest.banks.values():
            weights += bank.num_experts * (2 * math.prod(bank.gate_up_shape) + math.prod(bank.down_shape))
    total = weights + sum(count for name, count in numel.items() if name not in own)
    resident = resident_bytes(model) + sum(resident_bytes(rule) for rule in rules_of(model))
    out: dict[str, float] = {
        "parameters": total,
        "stored_bytes": stored,
        "stored_bpw": bits_per_weight(stored, total),
        "resident_bytes": resident,
        "resident_bpw": bits_per_weight(resident, total),
    }
    if weights:
        out["compressed_bpw"] = bits_per_weight(sum(sizes[name] for name in own), weights)
    return out
