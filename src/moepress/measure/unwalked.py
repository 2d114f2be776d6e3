# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for layers that no calibration token passes: a next-token layer, which transformers does not run.

A planner needs a menu for every weight. Those of such a layer are quantised as if all inputs and all rows counted
alike; then a weight's losses are scaled such that their mean over labels is the mean, over labels and weights, of its
role in the last layer that was walked (of all its roles where that layer has none of this one, per element). Its
experts get the mean use and the mean PMQ losses of that layer's, and its residual stream is taken to be that one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from moepress.graph.view import ROUTED, WeightRef
from moepress.measure.calibration import CalibrationSettings
from moepress.measure.layer_table import Advance, plain_errors
from moepress.measure.site import Site
from moepress.measure.tables import Job, batches_of, quantised
from moepress.plan.statistics import Errors, ExpertStats, LayerStatistics

Load = Callable[[WeightRef], torch.Tensor]


def stand_in(
    refs: Sequence[WeightRef],
    last: LayerStatistics,
    last_refs: Sequence[WeightRef],
    load: Load,
    settings: CalibrationSettings,
    device: torch.device,
    advance: Advance,
) -> LayerStatistics:
    """One layer's statistics, from its weights and the last walked layer's; `load` gives float32 on the device."""
    plain = _plain(refs, load, settings, device, advance)
    target = _mean_losses(last.errors, last_refs)
    errors = {}
    for ref in refs:
        own = {label: plain[ref.name][label] for label in settings.labels(ref)}
        total = sum(own.values())
        goal = target.get(ref.role, target[""] * ref.numel)
        scale = goal * len(own) / total if total else 0.0
        errors[ref.name] = {label: loss * scale for label, loss in own.items()}
    return LayerStatistics(
        layer=refs[0].layer, experts=_experts(refs, last), errors=errors, residual=last.residual, short=()
    )


def _plain(
    refs: Sequence[WeightRef], load: Load, settings: CalibrationSettings, device: torch.device, advance: Advance
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {ref.name: {} for ref in refs}
    for routed in (False, True):
        stage = [_site(ref, load, device) for ref in refs if (ref.group == ROUTED) == routed]
        for batch in batches_of(stage, device):
            for entry in quantised([Job(site=site, fed=False) for site in batch], settings):
                found[entry.ref.name].update(plain_errors(entry, settings, None))
            advance(sum(site.refs[0].numel for site in batch))
    return found


def _site(ref: WeightRef, load: Load, device: torch.device) -> Site:
    """A site that no token reaches."""
    return Site((ref,), 0, 1, lambda: iter(()), load, lambda ref, tensor: None, device)


def _mean_losses(errors: Errors, refs: Iterable[WeightRef]) -> dict[str, float]:
    """Role -> mean loss over its weights and labels; under "" the mean of all per element."""
    by_role: dict[str, list[float]] = {}
    per_element: list[float] = []
    for ref in refs:
        losses = errors[ref.name].values()
        if losses:
            by_role.setdefault(ref.role, []).append(sum(losses) / len(losses))
            per_element.append(by_role[ref.role][-1] / ref.numel)
    means = {role: sum(own) / len(own) for role, own in by_role.items()}
    return means | {"": sum(per_element) / max(len(per_element), 1)}


def _experts(refs: Sequence[WeightRef], last: LayerStatistics) -> dict[str, tuple[ExpertStats, ...]]:
    banks: dict[str, int] = {}
    for ref in refs:
        if ref.bank is not None and ref.expert is not None:
            banks[ref.bank] = max(banks.get(ref.bank, 0), ref.expert + 1)
    like = [expert for own in last.experts.values() for expert in own]
    return {bank: (_mean_expert(like),) * count for bank, count in banks.items() if like}


def _mean_expert(experts: Sequence[ExpertStats]) -> ExpertStats:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(experts)

    first: Mapping[str, Mapping[int, float]] = experts[0].loss
    return ExpertStats(
        tokens=round(mean(e.tokens for e in experts)),
        weight_before=mean(e.weight_before for e in experts),
        weight_after=mean(e.weight_after for e in experts),
        loss={q: {bits: mean(e.loss[q][bits] for e in experts) for bits in own} for q, own in first.items()},
    )
