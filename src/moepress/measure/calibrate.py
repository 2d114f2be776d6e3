# SPDX-License-Identifier: Apache-2.0
"""Calibrate: one streamed pass over a text, from a checkpoint to a folder of statistics.

Predicted losses of all weights are in one currency, so that a planner may add them up: with whole-model gradients
("fisher") nats a token, 1/2 sum_n F_n (E M E^T)_nn; else ("local") noise relative to the residual stream,
sum_n F_n (E M E^T)_nn times a factor of the layer (moepress.measure.probe.end_factors).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from moepress.errors import CalibrationError, ResumeError
from moepress.graph.view import ROUTED, ModelGraph, WeightRef
from moepress.measure.calibration import CalibrationSettings
from moepress.measure.corpus import windows_digest
from moepress.measure.layer_pass import LayerPass
from moepress.measure.layer_table import Advance, Rows, measure_layer
from moepress.measure.probe import end_factors
from moepress.measure.stats_folder import WORK
from moepress.measure.stats_writer import Part, StatsFolder
from moepress.measure.unwalked import stand_in
from moepress.measure.walk import Walk
from moepress.plan.statistics import Header, LayerStatistics, Statistics
from moepress.progress import Progress, silent
from moepress.version import __version__

FISHER_FACTOR = 0.5
_SMALL = 1 << 20
"""Elements; smaller kept tensors are part of what a source is recognised by."""


class Source(Protocol):
    """The part of moepress.source.Source that is needed here."""

    @property
    def reader(self) -> Any: ...

    @property
    def graph(self) -> ModelGraph: ...

    @property
    def digest(self) -> str: ...

    def weight(self, ref: WeightRef) -> torch.Tensor: ...


def calibrate(
    source: Source,
    ids: torch.Tensor,
    folder: str | Path,
    settings: CalibrationSettings | None = None,
    *,
    gradients: Rows | Callable[[], Rows] | None = None,
    device: str | torch.device = "cpu",
    memory: int = 4 << 30,
    resume: bool = False,
    progress: Progress = silent,
) -> Statistics:
    """Measures `source` on windows of token ids [windows, length] and writes the new `folder`.

    `gradients` are Fisher rows of every weight (moepress.measure.gradients), or a function that takes them, which is
    called only if the folder does not hold them yet; without, sensitivities are measured layer by layer. About `memory`
    bytes are used, as by `Walk`. `resume` continues an unfinished run, or returns what a finished one has.
    Raises CalibrationError, CheckpointError, WriteError or ResumeError.
    """
    settings, device = settings or CalibrationSettings(), torch.device(device)
    kind = "local" if gradients is None else "fisher"
    # before the folder is made, so that a model that cannot be walked leaves none
    record = _record(source, ids, settings, device)
    fingerprint = hashlib.sha256(json.dumps([kind, record]).encode()).hexdigest()
    walk = Walk(source, ids, folder=Path(folder) / WORK, device=device, memory=memory, fingerprint=fingerprint)
    record["unwalked"] = unwalked = sorted({ref.layer for ref in source.graph.weights if ref.layer >= walk.depth})
    header = Header(source=source.digest, tokens=ids.numel(), settings=record, kind=kind)
    with StatsFolder(folder, header, resume=resume) as out:
        if out.finished is not None:
            return out.finished
        out.store_ids(ids)
        rows = _settled(gradients, out, source.graph, walk.depth)
        parts = out.parts()
        start = _first_open(walk, parts)
        open_refs = [ref for ref in source.graph.weights if ref.layer >= start]
        with progress("calibrating", sum(ref.numel for ref in open_refs)) as advance:
            for layer in walk.layers(start) if start < walk.depth else ():
                parts[layer.number] = _measure(layer, settings, rows, advance)
                layer.finish()
                out.store_part(parts[layer.number])
            done = _in_one_currency([parts[number] for number in range(walk.depth)])
            for number in unwalked:
                if number not in parts:
                    own = _stand_in(source, settings, number, done[-1], device, advance)
                    parts[number] = Part(statistics=own, attn_o=None)
                    out.store_part(parts[number])
        statistics = Statistics.join([*done, *(parts[number].statistics for number in unwalked)], header)
        out.publish(statistics)
    return statistics


def _measure(layer: LayerPass, settings: CalibrationSettings, rows: Rows | None, advance: Advance) -> Part:
    if rows is not None:
        return Part(statistics=measure_layer(layer, settings, rows, FISHER_FACTOR, advance), attn_o=None)
    own = layer.sensitivities(windows=settings.probe_windows, seed=settings.seed)
    (out,) = (own[ref.name] for ref in layer.refs if ref.role == "attn.o")
    statistics = measure_layer(layer, settings, own, 1.0, advance)
    return Part(statistics=statistics, attn_o=out.mean(dtype=torch.float64).item())


def _in_one_currency(parts: Sequence[Part]) -> list[LayerStatistics]:
    """All walked layers; losses by sensitivities of single layers times what makes layers comparable."""
    known = [part.attn_o for part in parts if part.attn_o is not None]
    factors = end_factors(known) if known else [1.0] * len(parts)
    return [_times(part.statistics, factor) for part, factor in zip(parts, factors, strict=True)]


def _times(part: LayerStatistics, factor: float) -> LayerStatistics:
    errors = {name: {label: loss * factor for label, loss in own.items()} for name, own in part.errors.items()}
    return replace(part, errors=errors)


def _record(source: Source, ids: torch.Tensor, settings: CalibrationSettings, device: torch.device) -> dict[str, Any]:
    """Everything that decides the numbers, but for the weights themselves."""
    return {
        "windows": int(ids.shape[0]),
        "length": int(ids.shape[-1]),
        "text": windows_digest(ids),
        **settings.as_dict(),
        "values": _values_digest(source),
        "device": device.type,
        "moepress": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _values_digest(source: Source) -> str:
    """sha256 of small tensors and of the first row of every weight that is no routed expert's: cheap, and no two
    models of one architecture agree in all of them."""
    digest = hashlib.sha256()

    def add(tensor: torch.Tensor) -> None:
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())

    for kept in source.graph.kept:
        tensor = source.reader.load(kept.name)
        if tensor.numel() <= _SMALL:
            add(tensor)
    for ref in source.graph.weights:
        if ref.group != ROUTED:
            add(source.reader.load(ref.tensor)[:1])
    return digest.hexdigest()


def _settled(
    gradients: Rows | Callable[[], Rows] | None, out: StatsFolder, graph: ModelGraph, depth: int
) -> Rows | None:
    """The Fisher rows that the folder holds or now gets, checked."""
    if gradients is None:
        return None
    stored = out.gradients()
    if stored is None:
        given = gradients() if callable(gradients) else gradients
        _check_rows(given, graph, depth)
        out.store_gradients(given)
        return out.gradients()
    _check_rows(stored, graph, depth)
    if isinstance(gradients, Mapping):
        differing = next((n for n in gradients | stored if not _equal(gradients.get(n), stored.get(n))), None)
        if differing is not None:
            raise ResumeError(f"cannot resume {out.path}: the gradients of {differing} are not those it was begun with")
    return stored


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a.to("cpu", torch.float32), b)


def _check_rows(rows: Rows, graph: ModelGraph, depth: int) -> None:
    for ref in graph.weights:
        if ref.layer >= depth:
            continue
        own = rows.get(ref.name)
        if own is None or tuple(own.shape) != ref.shape[:1]:
            found = "none" if own is None else str(tuple(own.shape))
            raise CalibrationError(
                f"{ref.name}: gradients of shape {ref.shape[:1]} are needed and there are {found}; "
                "take them from this model with squared_gradients"
            )
        if not (torch.isfinite(own).all() and (own >= 0).all()):
            raise CalibrationError(f"{ref.name}: its gradients are not all finite and at least 0; take them anew")


def _first_open(walk: Walk, done: Mapping[int, Part]) -> int:
    """The last layer that the walk can start from without missing one that is not done; the depth where all are."""
    missing = next((number for number in range(walk.depth) if number not in done), walk.depth)
    if missing == walk.depth:
        return missing
    return max(boundary for boundary in walk.boundaries() if boundary <= missing)


def _stand_in(
    source: Source,
    settings: CalibrationSettings,
    number: int,
    last: LayerStatistics,
    device: torch.device,
    advance: Advance,
) -> LayerStatistics:
    """Statistics of a layer that the walk does not reach."""

    def load(ref: WeightRef) -> torch.Tensor:
        return source.weight(ref).to(device, torch.float32)

    refs, last_refs = ([r for r in source.graph.weights if r.layer == layer] for layer in (number, last.layer))
    return stand_in(refs, last, last_refs, load, settings, device, advance)
