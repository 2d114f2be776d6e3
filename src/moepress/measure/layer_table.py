# SPDX-License-Identifier: Apache-2.0
"""LayerTable: one layer of a calibration walk as LayerStatistics.

Nothing that was measured on an expert with too few tokens is used but their number. Its weights are quantised as if
all inputs were alike, and its losses are |E|^2 times the means that the layer's other experts have of what M and F hold
(of all experts' F and M = 1 where no expert has enough), times its own share of tokens, of which it is granted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moepress.format.weight import affine
from moepress.graph.view import ROUTED, WeightRef
from moepress.measure.calibration import CalibrationSettings
from moepress.measure.compensated import compensated_losses
from moepress.measure.expert_losses import ExpertLosses
from moepress.measure.layer_pass import LayerPass
from moepress.measure.tables import Entry, Job, batches_of, error_of, is_short, quantised, weighted_error
from moepress.plan.statistics import ExpertStats, LayerStatistics

Rows = Mapping[str, torch.Tensor]
"""Weight name -> F [N]."""
Advance = Callable[[float], None]


def measure_layer(
    layer: LayerPass, settings: CalibrationSettings, rows: Rows, factor: float, advance: Advance
) -> LayerStatistics:
    """All of a layer's stages; with the compressed feed its weights are replaced on the way.

    `rows` are sensitivities of the layer's weights, and a predicted loss is `factor` times sum_n F_n (E M E^T)_nn.
    """
    rows = _without_gaps(layer.refs, rows)
    table, losses = _Table(settings, rows), ExpertLosses(layer, settings.method)
    for stage in layer.stages():
        for batch in batches_of(stage, stage[0].device):
            jobs = [Job(site=site, fed=not is_short(site, settings.min_tokens)) for site in batch]
            for entry in quantised(jobs, settings):
                table.add(entry)
                if entry.ref.group == ROUTED:
                    losses.keep(entry)
                if settings.replaces and entry.width == settings.feed_width:
                    base = entry.base
                    new = affine(base.codes, base.scale, base.zero, entry.width[1])
                    entry.job.site.replace(entry.ref.name, new)
            for job in jobs:
                table.end(job)
                job.site.release()
                advance(sum(ref.numel for ref in job.site.refs))
        losses.end_stage(stage)
    return LayerStatistics(
        layer=layer.number,
        experts=_experts(layer, losses),
        errors=table.errors(layer.refs, factor),
        residual=layer.residual,
        short=tuple(table.short),
    )


def plain_errors(entry: Entry, settings: CalibrationSettings, rows: torch.Tensor | None) -> dict[str, float]:
    """Label -> sum_n F_n (E M E^T)_nn of a weight at one width, alone and with compensators, and at the widths that are
    extrapolated from it."""
    menu, extrapolated = settings.menu(entry.ref), settings.extrapolated(entry.ref)
    if entry.width not in menu or entry.width in extrapolated:
        return {}
    loss = weighted_error(entry, rows)
    found = {menu[entry.width]: loss}
    found |= {menu[wide]: ratio * loss for wide, (narrow, ratio) in extrapolated.items() if narrow == entry.width}
    if labels := settings.compensated(entry.ref, entry.width):
        moment = entry.job.site.moment if entry.job.fed else None
        left = compensated_losses(
            entry.ref.name, error_of(entry), moment, rows if entry.job.fed else None, loss, list(labels)
        )
        found |= {label: left[rank] for rank, label in labels.items()}
    return found


@dataclass
class _Fed:
    """Sums over the experts with enough tokens, of one projection."""

    count: int = 0
    moment: float = 0.0
    """Of trace M / (K tokens)."""
    rows: float = 0.0
    """Of the mean F."""


class _Table:
    """Predicted losses as they come, without the common factor."""

    def __init__(self, settings: CalibrationSettings, rows: Rows) -> None:
        self._settings, self._rows = settings, rows
        self._found: dict[str, dict[str, float]] = {}
        self._starved: dict[str, tuple[int, int]] = {}
        """Weight name -> its tokens and all tokens."""
        self._fed: dict[str, _Fed] = {}
        self.short: list[str] = []

    def add(self, entry: Entry) -> None:
        """One weight at one width."""
        rows = self._rows[entry.ref.name].to(entry.weight.device) if entry.job.fed else None
        self._found.setdefault(entry.ref.name, {}).update(plain_errors(entry, self._settings, rows))

    def end(self, job: Job) -> None:
        """A site whose weights are all added."""
        site = job.site
        if site.refs[0].group != ROUTED:
            return
        per_token = site.moment.diagonal().mean(dtype=torch.float64).item() / site.tokens if job.fed else 0.0
        for ref in site.refs:
            if job.fed:
                fed = self._fed.setdefault(ref.projection, _Fed())
                fed.count += 1
                fed.moment += per_token
                fed.rows += self._rows[ref.name].mean(dtype=torch.float64).item()
            else:
                self._starved[ref.name] = site.tokens, site.total
        if not job.fed and site.refs[0].projection == "down":
            self.short.append(f"{site.refs[0].bank}.{site.refs[0].expert}")

    def errors(self, refs: Sequence[WeightRef], factor: float) -> dict[str, dict[str, float]]:
        """Weight name -> label -> predicted loss, in an order that the walk's memory cannot change."""
        return {
            ref.name: {
                label: self._found[ref.name][label] * factor * self._stand_in(ref, refs)
                for label in self._settings.labels(ref)
            }
            for ref in refs
        }

    def _stand_in(self, ref: WeightRef, refs: Sequence[WeightRef]) -> float:
        """What a starved weight's |E|^2 is multiplied by; 1 for all others."""
        if ref.name not in self._starved:
            return 1.0
        tokens, total = self._starved[ref.name]
        fed = self._fed.get(ref.projection)
        if fed is not None:
            return fed.rows / fed.count * fed.moment / fed.count * max(tokens, 1)
        alike = [self._rows[each.name].mean().item() for each in refs if _alike(each, ref)]
        return sum(alike) / len(alike) * max(tokens, 1) / total


def _alike(a: WeightRef, b: WeightRef) -> bool:
    return a.group == b.group == ROUTED and a.projection == b.projection


def _without_gaps(refs: Iterable[WeightRef], rows: Rows) -> dict[str, torch.Tensor]:
    """The layer's rows, where experts that the tokens of F never reached have the mean of the others.

    The walk has more tokens than F; some may reach them, and F = 0 would call their errors free.
    """
    refs = list(refs)
    own = {ref.name: rows[ref.name] for ref in refs}
    for ref in refs:
        if ref.group == ROUTED and not own[ref.name].any():
            seen = [rows[each.name].mean() for each in refs if _alike(each, ref) and rows[each.name].any()]
            if seen:
                own[ref.name] = torch.full_like(rows[ref.name], float(torch.stack(seen).mean()))
    return own


def _experts(layer: LayerPass, losses: ExpertLosses) -> dict[str, tuple[ExpertStats, ...]]:
    bank = next((ref.bank for ref in layer.refs if ref.bank is not None), None)
    if bank is None:
        return {}
    use = layer.routing
    assert use is not None, f"{bank} has experts and no routing"
    return {
        bank: tuple(
            ExpertStats(
                tokens=int(use.tokens[expert]),
                weight_before=float(use.weight_before[expert]),
                weight_after=float(use.weight_after[expert]),
                loss=losses.found[expert],
            )
            for expert in range(len(use.tokens))
        )
    }
