# SPDX-License-Identifier: Apache-2.0
"""Tables for people, and the same numbers as dictionaries for --json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

from moepress.cli.app import mebibytes, table
from moepress.graph.view import ROUTED, WeightRef
from moepress.plan.plan import Plan
from moepress.source import Source


def show_inventory(src: Source, kurtosis: Mapping[str, float]) -> dict[str, Any]:
    """`inspect`'s tables."""
    by_role: dict[str, list[WeightRef]] = {}
    for ref in src.graph.weights:
        by_role.setdefault(ref.role, []).append(ref)
    roles = {role: _role_entry(src, refs, kurtosis) for role, refs in by_role.items()}
    kept: dict[str, dict[str, Any]] = {}
    for tensor in src.graph.kept:
        entry = kept.setdefault(tensor.role, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += src.reader.tensors[tensor.name].num_bytes
    rows = [
        [role, e["matrices"], e["shapes"], f"{e['weights']:,}", mebibytes(e["bytes"]), e["kurtosis_text"], "compress"]
        for role, e in roles.items()
    ]
    rows += [[role, e["tensors"], "", "", mebibytes(e["bytes"]), "", "keep"] for role, e in kept.items()]
    title = f"{src.folder} ({src.graph.family.model_type})"
    heads = ("role", "tensors", "shape", "weights", "bytes", "kurtosis: median (range)", "fate")
    table(title, heads, rows, text=(0, 2, 5, 6))
    routed = [ref for ref in src.graph.weights if ref.group == ROUTED]
    total = sum(info.num_bytes for info in src.reader.tensors.values())
    covered = sum(e["bytes"] for e in roles.values())
    print(f"coverage: {covered / total:.1%} of {mebibytes(total)} would be compressed, {len(routed)} routed expert "
          f"matrices of {len({ref.bank for ref in routed})} layers among them")  # fmt: skip
    body = {role: {k: v for k, v in e.items() if k != "kurtosis_text"} for role, e in roles.items()}
    return {"model_type": src.graph.family.model_type, "bytes": total, "compressible_bytes": covered,
            "roles": body, "kept": kept}  # fmt: skip


def show_plan(plan: Plan, summary: Mapping[str, Any] | None = None) -> None:
    """What was decided, by group of roles."""
    summary = summary or plan.notes["predicted"]
    rows = [
        [
            name,
            e["matrices"],
            f"{e['weights']:,}",
            f"{e['bpw']:.3f}",
            f"{e['average_rank']:g}",
            mebibytes(e["bytes"]),
        ]
        for name, e in summary["groups"].items()
    ]
    table(f"method {plan.method}", ("weights", "matrices", "count", "bits/weight", "mean rank", "bytes"), rows)
    kept = [name for name, spec in plan.weights.items() if spec is None]
    asked = f"; kept as asked: {len(kept)} weights ({kept[0]}, ...)" if kept else ""
    bpw = f"{summary['bpw']:.3f}" if summary["bpw"] else "no"
    print(f"coverage: {summary['compressed_weights'] / summary['parameters']:.1%} of {summary['parameters']:,} "
          f"parameters compressed{asked}")  # fmt: skip
    print(f"{bpw} bits per compressed weight, {summary['bpw_model']:.3f} per parameter of the whole model; "
          f"{mebibytes(summary['file_bytes'])} from {mebibytes(summary['source_bytes'])}")  # fmt: skip


def show_errors(errors: Mapping[str, float]) -> None:
    """Relative errors by kind of weight, and the worst ones."""
    if not errors:
        return
    groups: dict[str, list[float]] = {}
    for name, error in errors.items():
        groups.setdefault(_kind(name), []).append(error)
    rows = [[kind, len(e), f"{median(e):.4f}", f"{max(e):.4f}"] for kind, e in sorted(groups.items())]
    table("relative error |W - W'| / |W|", ("weight", "matrices", "median", "largest"), rows)
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    print("largest: " + ", ".join(f"{name} {errors[name]:.4f}" for name in worst))


def _kind(name: str) -> str:
    # model.layers.3.mlp.experts.5.up_proj.weight -> mlp.experts.*.up_proj
    words = ["*" if word.isdigit() else word for word in name.removesuffix(".weight").split(".")]
    return ".".join(words[words.index("*") + 1 :] if "*" in words else words).split("#")[0]


def _role_entry(src: Source, refs: list[WeightRef], kurtosis: Mapping[str, float]) -> dict[str, Any]:
    shapes = Counter(ref.shape for ref in refs)
    values = [kurtosis[ref.name] for ref in refs if ref.name in kurtosis]
    weights = sum(ref.numel for ref in refs)
    item = src.reader.tensors[refs[0].tensor]
    entry: dict[str, Any] = {
        "matrices": len(refs),
        "shapes": ", ".join(f"{n}x{k}" for n, k in shapes),
        "weights": weights,
        "bytes": weights * item.num_bytes // item.numel,
        "kurtosis_text": "",
    }
    if values:
        low, middle, high = min(values), median(values), max(values)
        entry["kurtosis"] = {"min": low, "median": middle, "max": high}
        entry["kurtosis_text"] = f"{middle:.2f} ({low:.2f} .. {high:.2f})"
    return entry
