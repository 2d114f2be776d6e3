# SPDX-License-Identifier: Apache-2.0
"""What a plan says, in numbers by role, and how two plans differ. Pure, no torch.

Bytes and roles need the shapes and names of a model, which a plan file does not hold. So planners leave a summary in
the plan's notes, under `allocation`, with the digest of the decisions that it is about. A plan that was edited by hand
since has another digest: its summary is not believed, and weights are counted by the pattern of their names instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moepress.errors import PlanError
from moepress.format.spec import WeightSpec
from moepress.graph.view import ModelGraph, WeightRef
from moepress.plan.plan import KEEP, Plan, label_of

NOTE = "allocation"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The weights of one role, or of one pattern of names."""

    name: str
    labels: Mapping[str, int]
    """`<method> <tag>` or `keep` -> how many weights."""
    weights: int | None = None
    """Numbers in the compressed matrices."""
    bytes: int | None = None
    """Stored bytes of the compressed matrices."""
    loss: float | None = None
    """Predicted loss."""
    share: float | None = None
    """That loss over the whole plan's."""

    @property
    def matrices(self) -> int:
        return sum(self.labels.values())

    @property
    def bpw(self) -> float | None:
        """Stored bits per compressed weight."""
        return 8 * self.bytes / self.weights if self.bytes is not None and self.weights else None

    @property
    def widths(self) -> dict[int, int]:
        """Bits -> how many matrices, by rising bits."""
        return _count({label: spec.bits for label, spec in self._specs()}, self.labels)

    @property
    def ranks(self) -> dict[int, int]:
        """Rank -> how many matrices, by rising rank; those without a compensator under 0."""
        return _count({label: spec.rank for label, spec in self._specs()}, self.labels)

    def _specs(self) -> list[tuple[str, WeightSpec]]:
        return [(label, WeightSpec.parse(label.split(" ")[-1])) for label in self.labels if label != KEEP]


@dataclass(frozen=True, kw_only=True)
class Description:
    """A plan by role; totals are None where the plan file alone does not tell them."""

    rows: tuple[Row, ...]
    edited: bool
    """Whether the plan differs from what its notes are about."""
    bytes: int | None = None
    loss: float | None = None
    facts: Mapping[str, Any]
    """What else the planner noted: budget, lower bound, gap, price."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What changes from an old plan to a new one."""

    moved: Mapping[str, Mapping[tuple[str, str], int]]
    """Pattern of names -> (old label, new label) -> how many weights."""
    changed: tuple[tuple[str, str, str], ...]
    """(weight, old label, new label), in the plan's order; a weight that one plan lacks is `absent` there."""
    heads: Mapping[str, tuple[Any, Any]]
    """Fields of the whole plan that differ: source, iterations, refit."""
    bytes: tuple[int | None, int | None]
    """Stored bytes of the compressed weights of both, where known."""


def label_in(plan: Plan, name: str) -> str:
    """`<method> <tag>` with the method always spelt out, or `keep`."""
    spec = plan.weights[name]
    return label_of(plan.method_of(name), spec) if spec else KEEP


def kind_of(name: str) -> str:
    """A weight's name without layer and numbers: model.layers.3.mlp.experts.5.up_proj.weight is mlp.experts.*.up_proj.

    Of a stacked tensor's slot the projection stays: layers.0.moe.input_linear.weight#7.gate is moe.input_linear.gate.
    """
    stem, _, slot = name.partition("#")
    words = ["*" if word.isdigit() else word for word in stem.removesuffix(".weight").split(".")]
    words = words[words.index("*") + 1 :] if "*" in words else words
    return ".".join([*words, *slot.split(".")[1:]])


def summary_by_role(plan: Plan, graph: ModelGraph, losses: Mapping[str, float] | None = None) -> tuple[Row, ...]:
    """Exact numbers of every role, in forward order. `losses` holds each weight's predicted loss, where known."""
    by_role: dict[str, list[WeightRef]] = {}
    for ref in graph.weights:
        by_role.setdefault(ref.role, []).append(ref)
    losses = losses or {}
    known = all(name in losses for name, spec in plan.weights.items() if spec) and bool(losses)
    total = sum(losses[name] for name, spec in plan.weights.items() if spec) if known else 0.0
    rows = []
    for role, refs in by_role.items():
        specs = [(ref, spec) for ref in refs if (spec := plan.weights[ref.name])]
        loss = sum(losses[ref.name] for ref, _ in specs) if known else None
        rows.append(
            Row(
                name=role,
                labels=dict(sorted(Counter(label_in(plan, ref.name) for ref in refs).items())),
                weights=sum(ref.numel for ref, _ in specs),
                bytes=sum(spec.num_bytes(*ref.shape) for ref, spec in specs),
                loss=loss,
                share=loss / total if loss is not None and total else None,
            )
        )
    return tuple(rows)


def allocation_note(
    plan: Plan, graph: ModelGraph, losses: Mapping[str, float] | None = None, **facts: Any
) -> dict[str, Any]:
    """What a planner puts into `notes["allocation"]`; `facts` are plain JSON values."""
    rows = summary_by_role(plan, graph, losses)
    roles = {
        row.name: {
            "labels": dict(row.labels), "weights": row.weights, "bytes": row.bytes,
            "bpw": None if row.bpw is None else round(row.bpw, 6), "loss": row.loss, "share": row.share,
        }
        for row in rows
    }  # fmt: skip
    stored = sum(row.bytes or 0 for row in rows)
    return {"decisions": plan.digest(), "bytes": stored, **facts, "roles": roles}


def describe(plan: Plan, graph: ModelGraph | None = None) -> Description:
    """By role, from the graph or else from the plan's notes; by pattern of names where neither tells."""
    note = plan.notes.get(NOTE)
    note = note if isinstance(note, dict) else None
    fresh = note is not None and note.get("decisions") == plan.digest()
    if note is not None and fresh:
        try:
            return _from_note(note)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"plan: its notes on the allocation are damaged ({error!r}); remove them") from error
    if graph is not None:
        rows = summary_by_role(plan, graph)
        return Description(rows=rows, edited=note is not None, bytes=sum(row.bytes or 0 for row in rows), facts={})
    kinds: dict[str, Counter[str]] = {}
    for name in plan.weights:
        kinds.setdefault(kind_of(name), Counter())[label_in(plan, name)] += 1
    rows = tuple(Row(name=kind, labels=dict(sorted(labels.items()))) for kind, labels in kinds.items())
    return Description(rows=rows, edited=note is not None, facts={})


def compare_plans(old: Plan, new: Plan, graph: ModelGraph | None = None) -> Difference:
    """Every weight whose label differs. A plan's default method is part of each label."""
    names = list(dict.fromkeys([*old.weights, *new.weights]))
    changed = []
    moved: dict[str, Counter[tuple[str, str]]] = {}
    for name in names:
        before, after = (label_in(plan, name) if name in plan.weights else "absent" for plan in (old, new))
        if before != after:
            changed.append((name, before, after))
            moved.setdefault(kind_of(name), Counter())[before, after] += 1
    heads = {key: (getattr(old, key), getattr(new, key)) for key in ("source", "iterations", "refit")}
    return Difference(
        moved={kind: dict(counts.most_common()) for kind, counts in moved.items()},
        changed=tuple(changed),
        heads={key: pair for key, pair in heads.items() if pair[0] != pair[1]},
        bytes=(describe(old, graph).bytes, describe(new, graph).bytes),
    )


def _from_note(note: Mapping[str, Any]) -> Description:
    rows = tuple(
        Row(
            name=name,
            labels={str(label): int(count) for label, count in body["labels"].items()},
            weights=body["weights"],
            bytes=body["bytes"],
            loss=body["loss"],
            share=body["share"],
        )
        for name, body in note["roles"].items()
    )
    facts = {key: value for key, value in note.items() if key not in {"decisions", "bytes", "roles"}}
    return Description(rows=rows, edited=False, bytes=int(note["bytes"]), loss=note.get("loss"), facts=facts)


def _count(values: Mapping[str, int], labels: Mapping[str, int]) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for label, value in values.items():
        counts[value] += labels[label]
    return dict(sorted(counts.items()))
