# SPDX-License-Identifier: Apache-2.0
"""Statistics: what calibration measured, as data that planning and compressing read. Pure, no torch.

Calibration walks through the layers and stores each one's `LayerStatistics` as it goes; `Statistics.join` makes one of
them. Both read and write JSON. Reading is strict: an unknown or missing key, a number that is no finite number of at
least 0, or a label that names no method and spec raises PlanError.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moepress.errors import PlanError
from moepress.plan.plan import parse_label

STATISTICS_VERSION = 1

Losses = Mapping[str, Mapping[int, float]]
Errors = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class ExpertStats:
    """What one routed expert saw, and what compressing it alone does to its layer."""

    tokens: int
    """Tokens that chose the expert."""
    weight_before: float
    """Sum over these tokens of the routing weight before it is normalised over the chosen experts."""
    weight_after: float
    """The same after that normalisation and scaling: what the expert's output was multiplied by."""
    loss: Losses
    """Quantiser -> width in bits -> PMQ's epsilon: the norm of the change of the MoE block's output when this expert
    alone has that width (moepress.plan.pmq)."""


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """One layer's part. Fields as in `Statistics`."""

    layer: int
    experts: Mapping[str, tuple[ExpertStats, ...]] = field(default_factory=dict)
    errors: Errors = field(default_factory=dict)
    residual: float = 0.0
    short: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One line of JSON; `from_json` is the inverse."""
        body = {"layer": self.layer, "residual": self.residual, "short": list(self.short)}
        return _write("moepress_layer_statistics", body | _parts(self.experts, self.errors))

    @classmethod
    def from_json(cls, text: str) -> LayerStatistics:
        """Raises PlanError for anything that `to_json` could not have written."""
        body = _read("moepress_layer_statistics", text, {"layer", "residual", "short", "experts", "errors"})
        return cls(
            layer=_count("layer", body["layer"]),
            experts=_experts(body["experts"]),
            errors=_errors(body["errors"]),
            residual=_number("residual", body["residual"]),
            short=_strings("short", body["short"]),
        )


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all layers have in common. Fields as in `Statistics`."""

    source: str
    tokens: int
    settings: Mapping[str, Any]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """One model's calibration."""

    source: str
    """Digest of the source's tensor names, dtypes and shapes, as in a Plan."""
    tokens: int
    """Tokens of calibration text."""
    settings: Mapping[str, Any]
    """How it was measured: plain JSON values."""
    experts: Mapping[str, tuple[ExpertStats, ...]]
    """Bank -> its experts, in order."""
    errors: Errors
    """Weight name -> label ("gptq b3g64": method, space, tag) -> predicted loss of choosing it, in one currency for
    all weights: the planner adds them up."""
    residual: Mapping[int, float]
    """Layer -> mean square of the residual stream that enters it: what makes losses of layers comparable."""
    short: tuple[str, ...]
    """Experts that too few tokens chose for what was measured on them to mean much, by name."""
    kind: str
    """What the losses are, such as "fisher" or "output"."""

    @classmethod
    def join(cls, layers: Iterable[LayerStatistics], header: Header) -> Statistics:
        """The layers in their order by number, however they are given. PlanError where two tell of the same thing."""
        ordered = sorted(layers, key=lambda part: part.layer)
        _no_twice("layer", (part.layer for part in ordered))
        _no_twice("bank", (name for part in ordered for name in part.experts))
        _no_twice("weight", (name for part in ordered for name in part.errors))
        return cls(
            source=header.source,
            tokens=header.tokens,
            settings=dict(header.settings),
            experts={name: experts for part in ordered for name, experts in part.experts.items()},
            errors={name: errors for part in ordered for name, errors in part.errors.items()},
            residual={part.layer: part.residual for part in ordered},
            short=tuple(name for part in ordered for name in part.short),
            kind=header.kind,
        )

    def to_json(self) -> str:
        """One line of JSON; `from_json` is the inverse."""
        body = {
            "source": self.source,
            "tokens": self.tokens,
            "settings": dict(self.settings),
            "kind": self.kind,
            "residual": {str(layer): value for layer, value in self.residual.items()},
            "short": list(self.short),
        }
        return _write("moepress_statistics", body | _parts(self.experts, self.errors))

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """Raises PlanError for anything that `to_json` could not have written."""
        keys = {"source", "tokens", "settings", "kind", "residual", "short", "experts", "errors"}
        body = _read("moepress_statistics", text, keys)
        residual = _mapping("residual", body["residual"])
        return cls(
            source=_string("source", body["source"]),
            tokens=_count("tokens", body["tokens"]),
            settings=_mapping("settings", body["settings"]),
            experts=_experts(body["experts"]),
            errors=_errors(body["errors"]),
            residual={_key("residual", layer): _number("residual", value) for layer, value in residual.items()},
            short=_strings("short", body["short"]),
            kind=_string("kind", body["kind"]),
        )

    def digest(self) -> str:
        """sha256 of everything measured."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _parts(experts: Mapping[str, tuple[ExpertStats, ...]], errors: Errors) -> dict[str, Any]:
    return {
        "experts": {bank: [_expert_to_json(each) for each in own] for bank, own in experts.items()},
        "errors": {name: dict(own) for name, own in errors.items()},
    }


def _expert_to_json(expert: ExpertStats) -> dict[str, Any]:
    loss = {quantiser: {str(width): value for width, value in own.items()} for quantiser, own in expert.loss.items()}
    weights = {"weight_before": expert.weight_before, "weight_after": expert.weight_after}
    return {"tokens": expert.tokens, **weights, "loss": loss}


def _write(marker: str, body: Mapping[str, Any]) -> str:
    try:
        return json.dumps({marker: STATISTICS_VERSION, **body}, allow_nan=False) + "\n"
    except (ValueError, TypeError) as error:
        raise PlanError(f"statistics cannot be written: {error}; a measured number is not finite") from error


def _read(marker: str, text: str, keys: set[str]) -> dict[str, Any]:
    try:
        body = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, TypeError, RecursionError) as error:
        raise PlanError(f"not moepress statistics: {error}; calibrate again") from error
    if not isinstance(body, dict) or marker not in body:
        raise PlanError(f"not moepress statistics: {marker} is missing; calibrate again")
    if type(body[marker]) is not int or body[marker] != STATISTICS_VERSION:
        raise PlanError(f"statistics version {body[marker]!r}; this moepress reads {STATISTICS_VERSION}")
    return _exactly("statistics", body, keys | {marker})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        _no_twice("key", (key for key, _ in pairs))
    return body


def _experts(value: Any) -> dict[str, tuple[ExpertStats, ...]]:
    return {bank: tuple(_expert(bank, each) for each in _list(bank, own)) for bank, own in _items("experts", value)}


def _expert(bank: str, value: Any) -> ExpertStats:
    body = _exactly(bank, value, {"tokens", "weight_before", "weight_after", "loss"})
    loss = {
        quantiser: {_key(bank, width): _number(bank, number) for width, number in _items(bank, own)}
        for quantiser, own in _items(bank, body["loss"])
    }
    return ExpertStats(
        tokens=_count(f"{bank}: tokens", body["tokens"]),
        weight_before=_number(f"{bank}: weight_before", body["weight_before"]),
        weight_after=_number(f"{bank}: weight_after", body["weight_after"]),
        loss=loss,
    )


def _errors(value: Any) -> dict[str, dict[str, float]]:
    errors: dict[str, dict[str, float]] = {}
    for name, own in _items("errors", value):
        errors[name] = {label: _number(f"{name}: {label}", number) for label, number in _items(name, own)}
    for label in {label for own in errors.values() for label in own}:
        parse_label(label)
    return errors


# values, each checked


def _exactly(what: str, value: Any, keys: set[str]) -> dict[str, Any]:
    body = _mapping(what, value)
    if body.keys() != keys:
        missing, unknown = sorted(keys - body.keys()), sorted(body.keys() - keys)
        raise PlanError(f"{what}: keys {missing} are missing and {unknown} are unknown; calibrate again")
    return body


def _mapping(what: str, value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else _odd(what, value, "an object")


def _items(what: str, value: Any) -> Iterable[tuple[str, Any]]:
    return _mapping(what, value).items()


def _list(what: str, value: Any) -> list[Any]:
    return value if isinstance(value, list) else _odd(what, value, "a list")


def _string(what: str, value: Any) -> str:
    return value if isinstance(value, str) else _odd(what, value, "a text")


def _strings(what: str, value: Any) -> tuple[str, ...]:
    return tuple(_string(what, each) for each in _list(what, value))


def _count(what: str, value: Any) -> int:
    return value if type(value) is int and value >= 0 else _odd(what, value, "a whole number of at least 0")


def _number(what: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        _odd(what, value, "a finite number of at least 0")
    try:
        return float(value)
    except OverflowError:
        _odd(what, value, "a finite number of at least 0")


def _key(what: str, text: str) -> int:
    """The number behind an object's key, in the one form that is written."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and str(int(text)) == text):
        _odd(f"{what}: key", text, "a whole number")
    return int(text)


def _odd(what: str, value: Any, wanted: str) -> NoReturn:
    raise PlanError(f"statistics: {what} is {value!r:.60}, not {wanted}; calibrate again")


def _no_twice(what: str, names: Iterable[object]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PlanError(f"statistics tell of {what} {twice[0]!r} twice; remove one of them")
