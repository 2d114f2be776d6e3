# SPDX-License-Identifier: Apache-2.0
"""Tables for people, and the same numbers as dictionaries for --json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

from moepress.cli.app import mebibytes, table
from moepress.graph.view import ROUTED, ModelGraph, WeightRef
from moepress.plan.compare import Description, Row, compare_plans, describe, kind_of
from moepress.plan.plan import KEEP, Plan
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


def show_plan_file(plan: Plan, graph: ModelGraph | None = None) -> dict[str, Any]:
    """`plan --show`: what a plan file says, by role. The graph is not needed; with it, bytes of edited plans are told.

    Returns the same as a dictionary.
    """
    found = describe(plan, graph)
    heads = ("weights", "matrices", "bits", "ranks", "methods", "bytes", "bits/weight", "predicted loss")
    title = f"method {plan.method}, source {plan.source[:12]}, digest {plan.digest()[:12]}"
    table(title, heads, [_plan_row(row) for row in found.rows], text=(0, 2, 3, 4))
    for line in _plan_lines(found):
        print(line)
    roles = {row.name: _row_entry(row) for row in found.rows}
    totals = {"bytes": found.bytes, "loss": found.loss, "edited": found.edited, "facts": dict(found.facts)}
    return {"method": plan.method, "source": plan.source, "digest": plan.digest(), **totals, "roles": roles}


def show_difference(old: Plan, new: Plan, graph: ModelGraph | None = None, limit: int = 20) -> dict[str, Any]:
    """`plan --diff`: what changes from an old plan to a new one, the first `limit` weights by name.

    Returns the same as a dictionary, with every weight.
    """
    found = compare_plans(old, new, graph)
    for key, (before, after) in found.heads.items():
        print(f"{key}: {before} -> {after}")
    moves = [(kind, *move, count) for kind, moved in found.moved.items() for move, count in moved.items()]
    if moves:
        table(f"{len(found.changed)} weights change", ("weights", "from", "to", "matrices"), moves, text=(0, 1, 2))
    else:
        print("no weight changes")
    for name, before, after in found.changed[:limit]:
        print(f"  {name}: {before} -> {after}")
    if len(found.changed) > limit:
        print(f"  and {len(found.changed) - limit} more")
    sizes = [mebibytes(each) if each is not None else "unknown" for each in found.bytes]
    print(f"compressed weights: {sizes[0]} -> {sizes[1]}")
    return {
        "heads": {key: list(pair) for key, pair in found.heads.items()},
        "moved": [dict(zip(("weights", "from", "to", "matrices"), move, strict=True)) for move in moves],
        "changed": {name: [before, after] for name, before, after in found.changed},
        "bytes": list(found.bytes),
    }


def show_errors(errors: Mapping[str, float]) -> None:
    """Relative errors by kind of weight, and the worst ones."""
    if not errors:
        return
    groups: dict[str, list[float]] = {}
    for name, error in errors.items():
        groups.setdefault(kind_of(name), []).append(error)
    rows = [[kind, len(e), f"{median(e):.4f}", f"{max(e):.4f}"] for kind, e in sorted(groups.items())]
    table("relative error |W - W'| / |W|", ("weight", "matrices", "median", "largest"), rows)
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    print("largest: " + ", ".join(f"{name} {errors[name]:.4f}" for name in worst))


def _plan_row(row: Row) -> list[str]:
    kept = {KEEP: row.labels[KEEP]} if KEEP in row.labels else {}
    methods = Counter[str]()
    for label, count in row.labels.items():
        methods[label.split(" ")[0]] += 0 if label == KEEP else count
    return [
        row.name,
        str(row.matrices),
        _counts(row.widths | kept),
        _counts(row.ranks) if any(row.ranks) else "",
        _counts(+methods),
        "" if row.bytes is None else mebibytes(row.bytes),
        "" if row.bpw is None else f"{row.bpw:.3f}",
        "" if row.loss is None else f"{row.loss:.4g}" + ("" if row.share is None else f" ({row.share:.1%})"),
    ]


def _counts(counts: Mapping[Any, int]) -> str:
    # one value for all needs no count; else "2: 30, 3: 68"
    return str(next(iter(counts))) if len(counts) == 1 else ", ".join(f"{key}: {n}" for key, n in counts.items())


def _plan_lines(found: Description) -> list[str]:
    lines = []
    if found.edited:
        lines.append("edited since it was planned: the sizes and losses noted then no longer hold")
    if found.bytes is not None:
        weights = sum(row.weights or 0 for row in found.rows)
        bpw = f", {8 * found.bytes / weights:.3f} bits per weight" if weights else ""
        lines.append(f"{mebibytes(found.bytes)} of compressed weights{bpw}")
    facts = found.facts
    if found.loss is not None:
        bound = f", at least {facts['lower_bound']:.4g} at this size" if "lower_bound" in facts else ""
        price = f"; one more MiB would save {facts['loss_per_byte'] * 2**20:.3g}" if "loss_per_byte" in facts else ""
        lines.append(f"predicted loss {found.loss:.4g}{bound}{price}")
    return lines


def _row_entry(row: Row) -> dict[str, Any]:
    numbers = {"weights": row.weights, "bytes": row.bytes, "bpw": row.bpw, "loss": row.loss, "share": row.share}
    return {"matrices": row.matrices, "labels": dict(row.labels), **numbers}


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
