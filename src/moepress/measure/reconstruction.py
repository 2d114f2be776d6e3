# SPDX-License-Identifier: Apache-2.0
"""Relative squared reconstruction errors: what each choice of a menu costs a weight, from the weight alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from moepress.format.spec import WeightSpec
from moepress.format.weight import dequantize
from moepress.graph.view import WeightRef
from moepress.progress import Progress, silent
from moepress.quantize.job import check_finite, compress_weight
from moepress.quantize.parallel import run_jobs

SAMPLE = 1 << 19
"""Elements of a weight that are compressed to measure it, as evenly spaced rows. Groups lie inside rows, so a row's
error does not depend on others; of half a million elements the relative error is known to 1 %."""


def relative_errors(
    refs: Sequence[WeightRef],
    load: Callable[[WeightRef], torch.Tensor],
    choices: Mapping[str, tuple[str, WeightSpec]],
    *,
    device: torch.device,
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Weight name -> label -> |W - W'|^2 / |W|^2, for `choices` label -> (data-free method, spec).

    A spec with a compensator is fitted to the whole weight. Raises CheckpointError for NaN or Inf.
    """
    errors: dict[str, dict[str, float]] = {}
    with progress("measuring errors", sum(ref.numel for ref in refs)) as advance:
        jobs: Iterable[Callable[[], dict[str, float]]] = (partial(_measure, ref, load, choices, device) for ref in refs)
        for ref, found in zip(refs, run_jobs(jobs, device), strict=True):
            errors[ref.name] = found
            advance(ref.numel)
    return errors


def _measure(
    ref: WeightRef,
    load: Callable[[WeightRef], torch.Tensor],
    choices: Mapping[str, tuple[str, WeightSpec]],
    device: torch.device,
) -> dict[str, float]:
    weight = load(ref).to(device)
    check_finite(ref.name, weight)
    sample = weight[:: max(1, weight.numel() // SAMPLE)].float()
    found = {}
    for label, (method, spec) in choices.items():
        measured = weight.float() if spec.rank else sample
        parts = compress_weight(ref.name, measured, spec, method).parts
        lost = dequantize(parts, spec, *measured.shape).sub_(measured).square_().sum(dtype=torch.float64)
        total = measured.square().sum(dtype=torch.float64)
        # rounded, so that the order of sums on another machine cannot move a plan
        found[label] = round((lost / total).item(), 7) if total else 0.0
    return found
