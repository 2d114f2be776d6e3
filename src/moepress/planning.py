# SPDX-License-Identifier: Apache-2.0
"""From a source folder to a Plan: by settings, by a byte budget, or by PMQ's integer program.

Each function opens the source, measures what its planner wants to know (kurtosis; reconstruction errors; nothing, when
statistics of a calibration are given) and hands numbers to the pure planners of `moepress.plan`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moepress.checkpoint.layout import Layout, lay_out
from moepress.errors import PlanError
from moepress.format.manifest import Manifest
from moepress.format.spec import WeightSpec
from moepress.measure.energy import routed_energy
from moepress.measure.reconstruction import relative_errors
from moepress.measure.stats_folder import Stats, read_stats
from moepress.measure.weights import excess_kurtosis
from moepress.plan.budget import Budget, parse_budget
from moepress.plan.compare import NOTE, allocation_note
from moepress.plan.joint import Menus, plan_joint, plan_pmq
from moepress.plan.plan import Plan, kept_by, label_of, make_plan, manifest_of, parse_label
from moepress.plan.priors import priors
from moepress.plan.ranks import Evidence, needs
from moepress.plan.settings import CALIBRATED, Settings
from moepress.progress import Progress, silent
from moepress.quantize.job import check_finite
from moepress.report import summarise
from moepress.source import Source, open_source

MENU_BITS = (1, 2, 3, 4, 5, 6, 8)
MENU_GROUPS = (64, 128)
MENU_METHOD = "mse"
"""What is offered without statistics. With HQQ instead the same budget loses a quarter more (docs/LOG.md)."""


def plan_checkpoint(
    source: str | Path,
    settings: Settings,
    *,
    frequencies: Mapping[str, Sequence[float]] | None = None,
    statistics: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Plan:
    """The decisions that `compress_checkpoint` would take, with the exact bytes it would write in `notes`."""
    with open_source(source) as src:
        plan = plan_settings(src, settings, frequencies or {}, device, progress)
        return _complete(src, plan, statistics)


def plan_budget(
    source: str | Path,
    budget: str,
    *,
    statistics: str | Path | None = None,
    method: str | None = None,
    bits: Sequence[int] = MENU_BITS,
    group_sizes: Sequence[int] = MENU_GROUPS,
    keep: tuple[str, ...] = (),
    menus: Menus | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Plan:
    """The joint planner (ours): the least predicted loss within `budget`, such as "2.5bpw" or "18GB".

    With `statistics` (a folder that `calibrate` wrote) predicted losses come from there, and the menu is what was
    measured, of `method` alone if it is given; `bits` and `group_sizes` are the menu without. `menus` are the data-free
    predicted losses where they are at hand already (`data_free_menus`), for several budgets in a row. Raises
    PlanError for a budget out of reach and for statistics of another model.
    """
    with open_source(source) as src:
        kept = kept_by(src.graph, keep)
        notes: dict[str, Any] = {"budget": budget, "keep": list(keep)}
        if statistics is None:
            menus = menus or data_free_menus(src, kept, method or MENU_METHOD, bits, group_sizes, device, progress)
            notes["evidence"] = "relative reconstruction error and role priors; no data"
        else:
            stats = read_stats_of(statistics, src)
            menus = _measured_menus(stats, method)
            notes["evidence"] = (
                f"output errors on {stats.statistics.tokens:,} calibration tokens ({stats.statistics.kind})"
            )
        menus = {name: menu for name, menu in menus.items() if name not in kept}
        return _complete(src, _fit(src, menus, parse_budget(budget), kept, notes), statistics)


def plan_by_pmq(
    source: str | Path, average_bits: float, *, statistics: str | Path, keep: tuple[str, ...] = (), **options: Any
) -> Plan:
    """PMQ's preset (MC#): experts at 1 to 3 bits by integer programs, the rest at 4; `options` as of `plan_pmq`."""
    with open_source(source) as src:
        stats = read_stats_of(statistics, src)
        plan = plan_pmq(src.graph, src.digest, stats.statistics, average_bits, keep=kept_by(src.graph, keep), **options)
        return _complete(src, plan, statistics)


def plan_settings(
    src: Source,
    settings: Settings,
    frequencies: Mapping[str, Sequence[float]],
    device: str | torch.device,
    progress: Progress,
) -> Plan:
    """Settings to a plan, after measuring what its rank policy needs."""
    measured = measure_kurtosis(src, device, progress) if "kurtosis" in needs(settings.ranks) else {}
    return make_plan(src.graph, src.digest, settings, Evidence(measured, frequencies))


def read_stats_of(folder: str | Path, src: Source) -> Stats:
    """The statistics in `folder`. Raises PlanError unless they were measured on this source."""
    stats = read_stats(Path(folder))
    if stats.statistics.source != src.digest:
        raise PlanError(
            f"{folder} holds statistics of a source with digest {stats.statistics.source[:12]}, {src.folder} has "
            f"{src.digest[:12]}; calibrate this model"
        )
    return stats


def measure_kurtosis(src: Source, device: str | torch.device = "cpu", progress: Progress = silent) -> dict[str, float]:
    """Excess kurtosis of every weight, by name; reads each once."""
    found = {}
    with progress("measuring kurtosis", sum(ref.numel for ref in src.graph.weights)) as advance:
        for ref in src.graph.weights:
            weight = src.weight(ref).to(device)
            check_finite(ref.name, weight)
            # rounded, so that the device's order of sums cannot move a rank
            found[ref.name] = round(excess_kurtosis(weight), 6)
            advance(ref.numel)
    return found


def layout_of(src: Source, plan: Plan, manifest: Manifest) -> Layout:
    """Where every tensor of the target will lie: kept ones as they are (FP8 as bfloat16), the rest as stored parts."""
    kept = {name for name, spec in plan.weights.items() if spec is None}
    tensors = {name: _float_info(src, name) for name in kept_names(src, kept)} | manifest.stored()
    return lay_out(dict(sorted(tensors.items(), key=lambda item: _layer_order(item[0]))))


def kept_names(src: Source, kept: set[str]) -> list[str]:
    """Stored names of the tensors that are copied."""
    own = {ref.tensor: None for ref in src.graph.weights if ref.name in kept}
    return [tensor.name for tensor in src.graph.kept] + list(own)


def _fit(
    src: Source, menus: Mapping[str, Mapping[str, float]], budget: Budget, kept: set[str], notes: Mapping[str, Any]
) -> Plan:
    numel = sum(ref.numel for ref in src.graph.weights if ref.name not in kept)
    copied = lay_out({name: _float_info(src, name) for name in kept_names(src, kept)}).tensor_bytes
    allowed = budget.bytes_for(numel, copied)
    while True:
        plan = plan_joint(src.graph, src.digest, menus, allowed, keep=kept, notes=notes)
        layout = layout_of(src, plan, manifest_of(plan, src.graph))
        over = layout.file_bytes - (budget.total_bytes or 0)
        if budget.total_bytes is None or over <= 0:
            return plan
        # what the shards' headers take, which depends on the plan; from what it used, or the same plan might come again
        allowed = layout.tensor_bytes - copied - over


def data_free_menus(
    src: Source,
    kept: Collection[str] = (),
    method: str = MENU_METHOD,
    bits: Sequence[int] = MENU_BITS,
    group_sizes: Sequence[int] = MENU_GROUPS,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Weight name -> label -> predicted loss, from the weights alone (moepress.plan.priors)."""
    if method in CALIBRATED:
        raise PlanError(f"method {method} needs statistics; run `moepress calibrate` and give --stats FOLDER")
    depth = src.reader.config.get("num_hidden_layers")
    energy = routed_energy(src.graph, src.reader.config, src.weight, partial(_gains, src))
    worth = priors(src.graph, energy, depth if isinstance(depth, int) else None)
    specs = [WeightSpec(bits=b, group_size=g) for b in bits for g in group_sizes]
    choices = {label_of(method, spec): (method, spec) for spec in specs}
    refs = [ref for ref in src.graph.weights if ref.name not in kept]
    errors = relative_errors(refs, src.weight, choices, device=torch.device(device), progress=progress)
    return {name: {label: worth[name] * error for label, error in own.items()} for name, own in errors.items()}


def _gains(src: Source, layer: int) -> torch.Tensor | None:
    """Of the norm before a layer's MLP block, under the name that all families give it."""
    name = f"model.layers.{layer}.post_attention_layernorm.weight"
    return src.reader.load_float(name).float() if name in src.reader.tensors else None


def _measured_menus(stats: Stats, method: str | None) -> dict[str, dict[str, float]]:
    found = {
        name: {label: loss for label, loss in menu.items() if method in (None, parse_label(label)[0])}
        for name, menu in stats.statistics.errors.items()
    }
    if method and not all(found.values()):
        offered = sorted({parse_label(label)[0] for menu in stats.statistics.errors.values() for label in menu})
        raise PlanError(f"the statistics have no errors of method {method}, only of {', '.join(offered)}")
    return found


def _complete(src: Source, plan: Plan, statistics: str | Path | None) -> Plan:
    layout = layout_of(src, plan, manifest_of(plan, src.graph))
    notes = {NOTE: allocation_note(plan, src.graph)} | dict(plan.notes) | {"predicted": summarise(src, plan, layout)}
    folder = str(Path(statistics).resolve()) if statistics else ""
    return replace(plan, notes=notes, statistics=folder)


def _float_info(src: Source, name: str) -> tuple[str, tuple[int, ...]]:
    info = src.reader.tensors[name]
    return ("BF16" if info.dtype == "F8_E4M3" else info.dtype), info.shape


def _layer_order(name: str) -> tuple[int, str]:
    layer = re.search(r"\.(\d{1,5})\.", name)
    return (int(layer.group(1)) if layer else -1, name)
