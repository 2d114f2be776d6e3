# SPDX-License-Identifier: Apache-2.0
"""Plan: the fate of every weight, as data that people read, edit and compare. Pure, no torch.

A plan names each weight's spec by its tag (`b3g64r16f3`) or says `keep`; a weight that another method than the plan's
compresses says which before its tag (`hqq b3g64`). It carries the digest of the source's names and shapes, so that it
cannot be applied to another model by mistake; editing tags by hand is fine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from moepress.errors import PlanError
from moepress.format.manifest import BankEntry, LinearEntry, Manifest
from moepress.format.spec import WeightSpec, check_shape
from moepress.graph.view import ROUTED, ModelGraph, WeightRef
from moepress.plan.ranks import Evidence, assign_ranks
from moepress.plan.settings import CALIBRATED, MAX_ITERATIONS, METHODS, Settings

PLAN_VERSION = 1
KEEP = "keep"
COMPENSATED = ("milo", "hqq", *CALIBRATED)
"""Methods that can have compensators: milo fits them in turns with the codes, the others to calibration data."""


@dataclass(frozen=True)
class Plan:
    """`weights` maps a weight's name to its spec, or to None where it is kept as it is."""

    source: str
    """Digest of the source's tensor names, dtypes and shapes."""
    method: str
    iterations: int
    refit: bool
    weights: Mapping[str, WeightSpec | None]
    notes: Mapping[str, Any] = field(default_factory=dict)
    """For people: the settings it came from and the sizes predicted. Never read back."""
    methods: Mapping[str, str] = field(default_factory=dict)
    """Weight -> its method where that is not the plan's."""
    statistics: str = ""
    """The folder of calibration statistics it was made from, for `compress` to read; a hint, not a decision."""

    def __post_init__(self) -> None:
        """Drops methods that say nothing new. Raises PlanError for those of weights that the plan does not compress."""
        for name in self.methods:
            if self.weights.get(name) is None:
                raise PlanError(
                    f"the plan gives {name} the method {self.methods[name]} but no spec; drop it from methods or "
                    "give the weight a spec"
                )
        own = {name: method for name, method in self.methods.items() if method != self.method}
        object.__setattr__(self, "methods", own)

    def method_of(self, name: str) -> str:
        """The method that compresses this weight: its own or the plan's."""
        return self.methods.get(name, self.method)

    def tag_of(self, name: str) -> str:
        """What the plan file says of a weight: `keep`, its tag, or method and tag. KeyError for an unknown name."""
        spec = self.weights[name]
        if spec is None:
            return KEEP
        return label_of(self.methods[name], spec) if name in self.methods else spec.tag

    def to_json(self) -> str:
        """One line a weight; `from_json` is the inverse but for `notes`."""
        tags = {name: self.tag_of(name) for name in self.weights}
        head = {"moepress_plan": PLAN_VERSION, "source": self.source, "method": self.method}
        body = head | {
            "iterations": self.iterations,
            "refit": self.refit,
            **({"statistics": self.statistics} if self.statistics else {}),
            "notes": dict(self.notes),
            "weights": tags,
        }
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises PlanError for anything that is not a plan of this version."""
        try:
            body = json.loads(text)
            if body["moepress_plan"] != PLAN_VERSION:
                raise PlanError(f"plan version {body['moepress_plan']!r}; this moepress reads {PLAN_VERSION}")
            if not isinstance(body["refit"], bool):
                raise PlanError(f"plan: refit is {body['refit']!r}, neither true nor false")
            decided = {name: _parse_tag(tag) for name, tag in body["weights"].items()}
            plan = cls(
                str(body["source"]),
                str(body["method"]),
                int(body["iterations"]),
                body["refit"],
                {name: spec for name, (_, spec) in decided.items()},
                dict(body["notes"]),
                {name: method for name, (method, _) in decided.items() if method},
                str(body.get("statistics", "")),
            )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise PlanError(f"not a moepress plan: {error!r}; write one with `moepress plan SRC -o FILE`") from error
        if plan.method not in METHODS:
            raise PlanError(f"plan: method {plan.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if not 0 <= plan.iterations <= MAX_ITERATIONS:
            raise PlanError(f"plan: iterations {plan.iterations} is not between 0 and {MAX_ITERATIONS}")
        return plan

    def digest(self) -> str:
        """sha256 of the decisions: two plans with equal digests give equal bytes."""
        decided = {name: self.tag_of(name) for name in self.weights}
        text = json.dumps([self.source, self.method, self.iterations, self.refit, sorted(decided.items())])
        return hashlib.sha256(text.encode()).hexdigest()


def calibrated_weights(plan: Plan) -> list[str]:
    """The weights that calibration statistics are needed for."""
    return [
        name
        for name, spec in plan.weights.items()
        if spec and (plan.method_of(name) in CALIBRATED or (spec.rank and plan.method_of(name) != "milo"))
    ]


def label_of(method: str, spec: WeightSpec) -> str:
    """`<method> <tag>`: one choice for one weight, such as `gptq b3g64r16f4`."""
    return f"{method} {spec.tag}"


def parse_label(label: str) -> tuple[str, WeightSpec]:
    """The inverse of `label_of`. Raises PlanError for an unknown method, and for ranks with one that has none."""
    method, space, tag = label.partition(" ")
    if not space or method not in METHODS:
        raise PlanError(
            f"{label!r} is not a method and a spec; write one of {', '.join(METHODS)}, a space and a tag: hqq b3g64"
        )
    spec = WeightSpec.parse(tag)
    _check_rank(label, spec, method)
    return method, spec


def make_plan(graph: ModelGraph, source: str, settings: Settings, evidence: Evidence) -> Plan:
    """Settings and evidence to a plan for every weight of the graph. Raises PlanError as `check_plan` does."""
    kept = kept_by(graph, settings.keep)
    base = WeightSpec(bits=settings.bits, group_size=settings.group_size)
    chosen = [ref for ref in graph.weights if ref.name not in kept]
    ranks = assign_ranks(settings.ranks, chosen, base, settings.factor_bits, evidence)
    weights = {ref.name: _spec(settings, ranks[ref.name]) if ref.name in ranks else None for ref in graph.weights}
    notes = {"settings": settings.as_dict()}
    plan = Plan(source, settings.method, settings.iterations, settings.refit, weights, notes)
    check_plan(plan, graph)
    return plan


def kept_by(graph: ModelGraph, patterns: tuple[str, ...]) -> set[str]:
    """Names of the weights that `--keep` patterns match: name patterns, roles or groups. PlanError for an idle one."""
    unused = [p for p in patterns if not any(_is_kept(ref, (p,)) for ref in graph.weights)]
    if unused:
        raise PlanError(
            f"--keep {unused[0]!r} matches no weight; give a name pattern, a role (attn.q) or a group (expert)"
        )
    return {ref.name for ref in graph.weights if _is_kept(ref, patterns)}


def check_plan(plan: Plan, graph: ModelGraph) -> None:
    """Raises PlanError unless the plan decides every weight of the graph, once, in a way that can be stored."""
    missing = [ref.name for ref in graph.weights if ref.name not in plan.weights]
    if missing:
        raise PlanError(f'the plan says nothing of {_some(missing)}; add a spec or "keep" for each')
    unknown = sorted(set(plan.weights) - {ref.name for ref in graph.weights})
    if unknown:
        raise PlanError(f"the plan names {_some(unknown)}, which the source does not have")
    for ref in graph.weights:
        spec = plan.weights[ref.name]
        if spec:
            check_shape(ref.name, spec, *ref.shape)
            _check_rank(ref.name, spec, plan.method_of(ref.name))
    _check_banks(plan, graph)


def manifest_of(plan: Plan, graph: ModelGraph) -> Manifest:
    """What the target's config.json will say."""
    linears: dict[str, LinearEntry] = {}
    banks: dict[str, dict[tuple[int, str], WeightRef]] = {}
    for ref in graph.weights:
        spec = plan.weights[ref.name]
        if spec is None:
            continue
        if ref.bank is None:
            linears[ref.module] = LinearEntry(spec, ref.shape)
        else:
            assert ref.expert is not None, f"{ref.name} is in a bank but has no expert number"
            banks.setdefault(ref.bank, {})[ref.expert, ref.projection] = ref
    return Manifest(linears, {name: _bank(plan, refs) for name, refs in banks.items()})


def source_digest(model_type: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """sha256 over a checkpoint's tensor names, dtypes and shapes."""
    text = json.dumps([model_type, sorted((name, dtype, list(shape)) for name, (dtype, shape) in tensors.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _bank(plan: Plan, refs: Mapping[tuple[int, str], WeightRef]) -> BankEntry:
    count = max(expert for expert, _ in refs) + 1

    def specs(projection: str) -> tuple[WeightSpec, ...]:
        found = [plan.weights[refs[expert, projection].name] for expert in range(count)]
        return tuple(spec for spec in found if spec)

    return BankEntry(refs[0, "gate"].shape, refs[0, "down"].shape, specs("gate"), specs("down"))


def _check_banks(plan: Plan, graph: ModelGraph) -> None:
    banks: dict[str, dict[tuple[int | None, str], WeightRef]] = {}
    for ref in graph.weights:
        if ref.bank is not None:
            banks.setdefault(ref.bank, {})[ref.expert, ref.projection] = ref
    for name, refs in banks.items():
        kept = [ref.name for ref in refs.values() if plan.weights[ref.name] is None]
        if kept and len(kept) < len(refs):
            raise PlanError(
                f"{name}: {_some(kept)} would stay at full size beside compressed experts; keep all or none"
            )
        for (expert, projection), ref in refs.items():
            up = refs[expert, "up"]
            # equal tags are equal specs and equal methods
            if projection == "gate" and plan.tag_of(ref.name) != plan.tag_of(up.name):
                raise PlanError(
                    f"{ref.name} and {up.name} must share one spec and one method; the plan gives "
                    f"{plan.tag_of(ref.name)} and {plan.tag_of(up.name)}"
                )


def _parse_tag(tag: str) -> tuple[str, WeightSpec | None]:
    """A plan file's entry -> (its own method or "", its spec)."""
    if tag == KEEP:
        return "", None
    if isinstance(tag, str) and " " in tag:
        return parse_label(tag)
    return "", WeightSpec.parse(tag)


def _check_rank(name: str, spec: WeightSpec, method: str) -> None:
    if spec.rank and method not in COMPENSATED:
        raise PlanError(
            f"{name}: rank {spec.rank} needs one of the methods {', '.join(COMPENSATED)}, not {method}; "
            "change the method or drop the rank"
        )


def _spec(settings: Settings, rank: int) -> WeightSpec:
    factor_bits = settings.factor_bits if rank else 0
    return WeightSpec(bits=settings.bits, group_size=settings.group_size, rank=rank, factor_bits=factor_bits)


def _is_kept(ref: WeightRef, patterns: tuple[str, ...]) -> bool:
    aliases = {"routed": ROUTED, "attention": "attn"}
    return any(fnmatchcase(ref.name, p) or fnmatchcase(ref.role, p) or ref.group == aliases.get(p, p) for p in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
