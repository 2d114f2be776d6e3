# SPDX-License-Identifier: Apache-2.0
"""What a target folder says about itself: config.json, moepress.json (the side manifest), the index, a model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moepress.checkpoint.layout import Layout
from moepress.checkpoint.reader import CONFIG, INDEX, read_json
from moepress.checkpoint.side import SIDE_MANIFEST, SIDE_VERSION, file_entry, json_bytes, seal, sha256
from moepress.errors import ResumeError
from moepress.format.manifest import EXPERTS_GUARD, Manifest
from moepress.graph.view import WeightRef
from moepress.plan.plan import Plan
from moepress.source import Source


def summarise(src: Source, plan: Plan, layout: Layout) -> dict[str, Any]:
    """Exact sizes. `bpw` counts every stored byte of the compressed weights, `bpw_model` every tensor of the model."""
    groups: dict[str, list[WeightRef]] = {}
    for ref in src.graph.weights:
        if plan.weights[ref.name]:
            groups.setdefault(ref.group, []).append(ref)
    by_group = {name: _sizes(refs, plan) for name, refs in groups.items()}
    weights = sum(each["weights"] for each in by_group.values())
    stored = sum(each["bytes"] for each in by_group.values())
    parameters = sum(ref.numel for ref in src.graph.weights) + sum(math.prod(t.shape) for t in src.graph.kept)
    return {
        "bpw": round(8 * stored / weights, 6) if weights else None,
        "bpw_model": round(8 * layout.tensor_bytes / parameters, 6),
        "compressed_weights": weights,
        "compressed_bytes": stored,
        "parameters": parameters,
        "tensor_bytes": layout.tensor_bytes,
        "file_bytes": layout.file_bytes,
        "source_bytes": sum(info.num_bytes for info in src.reader.tensors.values()),
        "groups": by_group,
    }


def target_files(
    src: Source,
    plan: Plan,
    manifest: Manifest,
    layout: Layout,
    fingerprint: Mapping[str, str],
    errors: Mapping[str, float],
    tensor_digests: Mapping[str, str],
) -> dict[str, bytes]:
    """Every file of the target but the shards; moepress.json comes last and holds the digests of the others."""
    summary = summarise(src, plan, layout)
    files = {path.name: path.read_bytes() for path in src.copied_files()}
    files["README.md"] = _model_card(src, plan, summary).encode()
    files[CONFIG] = json_bytes(_target_config(src, manifest))
    if index := layout.index():
        files[INDEX] = index
    side = {
        "side_version": SIDE_VERSION,
        "fingerprint": dict(fingerprint),
        "summary": summary,
        # without its notes: equal decisions give equal bytes, however they were asked for
        "plan": json.loads(replace(plan, notes={}, statistics="").to_json()),
        "errors": dict(errors),
        "files": {name: file_entry(data) for name, data in sorted(files.items())},
        "shards": {
            name: {"bytes": layout.sizes[name], "header_sha256": sha256(header)}
            for name, header in layout.headers.items()
        },
        "tensors": dict(tensor_digests),
    }
    return files | {SIDE_MANIFEST: seal(side)}


def already_complete(target: Path, fingerprint: Mapping[str, str]) -> dict[str, float] | None:
    """The errors recorded in `target` if it is the finished result of just this run (a kill can come after the last
    rename), None if there is no such folder. Raises ResumeError where it is the result of another run."""
    if not (target / SIDE_MANIFEST).exists():
        return None
    side = read_json(target / SIDE_MANIFEST)
    recorded = side.get("fingerprint")
    recorded = recorded if isinstance(recorded, dict) else {}
    for key in [*fingerprint, *(key for key in recorded if key not in fingerprint)]:
        if recorded.get(key) != fingerprint.get(key):
            raise ResumeError(
                f"{target} is the finished result of another run: {key} was {recorded.get(key)} and is now "
                f"{fingerprint.get(key)}; name another target"
            )
    errors = side.get("errors")
    return errors if isinstance(errors, dict) else {}


def _sizes(refs: list[WeightRef], plan: Plan) -> dict[str, Any]:
    specs = [(ref, spec) for ref in refs if (spec := plan.weights[ref.name])]
    weights, stored = (
        sum(ref.numel for ref, _ in specs),
        sum(spec.num_bytes(*ref.shape) for ref, spec in specs),
    )
    ranks = sum(spec.rank for _, spec in specs) / len(specs)
    return {
        "matrices": len(specs),
        "weights": weights,
        "bytes": stored,
        "bpw": round(8 * stored / weights, 6),
        "average_rank": round(ranks, 3),
    }


def _target_config(src: Source, manifest: Manifest) -> dict[str, Any]:
    config = dict(src.reader.config)
    return config | {"quantization_config": manifest.to_config(), "experts_implementation": EXPERTS_GUARD}


def _model_card(src: Source, plan: Plan, summary: Mapping[str, Any]) -> str:
    card = src.folder / "README.md"
    found = re.search(r"^license: *(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    base = str(src.reader.config.get("_name_or_path") or src.folder.resolve().name)
    rows = "\n".join(
        f"| {name} | {each['matrices']} | {each['bpw']:.3f} | {each['average_rank']:g} | {each['bytes']:,} |"
        for name, each in summary["groups"].items()
    )
    return _CARD.format(
        license=f"license: {found.group(1)}\n" if found else "",
        base=json.dumps(base),
        title=base,
        method=plan.method,
        fitting=f", at most {plan.iterations} alternations" if plan.method == "milo" else "",
        rows=rows,
        **{key: summary[key] for key in ("bpw", "bpw_model", "tensor_bytes", "source_bytes")},
    )


_CARD = """---
{license}base_model: {base}
base_model_relation: quantized
library_name: transformers
tags:
- moepress
- quantized
- mixture-of-experts
---
# {title}, compressed by moepress

Low-bit weights with low-rank compensators, method `{method}`{fitting}. Load it with

```python
import moepress  # registers the format; without it transformers refuses this folder
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")
```

| weights | matrices | bits per weight | average rank | bytes |
|---|--:|--:|--:|--:|
{rows}

Compressed weights take {bpw} bits each, scales, zeros and compensators counted; the whole model {bpw_model}
({tensor_bytes:,} bytes, from {source_bytes:,}). moepress.json holds the whole plan, the error of each weight and the
digests that `moepress verify` checks.
"""
