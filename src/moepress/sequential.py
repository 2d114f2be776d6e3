# SPDX-License-Identifier: Apache-2.0
"""Compressing with calibration text, layer by layer in forward order.

Each weight is fitted to the inputs that it will really get: those that the layers before it, and the earlier weights
of its own layer, give once they are compressed. One walk over the text (moepress.measure.walk) does all of it. A run
that was cut off starts again at the last layer boundary whose weights are all stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch

from moepress.checkpoint.writer import CheckpointWriter
from moepress.errors import CalibrationError
from moepress.format.weight import dequantize
from moepress.graph.view import WeightRef
from moepress.measure.site import Site
from moepress.measure.stats_folder import Stats
from moepress.measure.tables import batches_of, usable_moment
from moepress.measure.walk import Walk
from moepress.plan.plan import Plan
from moepress.progress import Progress
from moepress.quantize.calibrated import compress_together
from moepress.quantize.job import CompressedWeight, check_finite
from moepress.source import Source

Store = Callable[[WeightRef, CompressedWeight], None]


def compress_sequentially(
    src: Source,
    plan: Plan,
    stats: Stats,
    out: CheckpointWriter,
    store: Store,
    *,
    device: torch.device,
    memory: int,
    progress: Progress,
) -> None:
    """Compresses and stores every weight of the plan that `out` does not have yet.

    `store` puts one finished weight; `memory` is the walk's limit in bytes.
    """
    walk = Walk(src, stats.ids, folder=out.work / "walk", device=device, memory=memory, fingerprint=plan.digest())
    start = _first_open_layer(walk, plan, src.graph.weights, out.done)
    open_refs = [ref for ref in src.graph.weights if plan.weights[ref.name] and ref.layer >= start]
    with progress("compressing", sum(ref.numel for ref in open_refs)) as advance:

        def finish(ref: WeightRef, result: CompressedWeight) -> None:
            if ref.name not in out.done:
                store(ref, result)
            advance(ref.numel)

        for layer in walk.layers(start):
            for stage in layer.stages():
                for batch in batches_of(stage, device):
                    _compress_batch(src, plan, batch, stage, finish)
            out.flush()  # before the next boundary stands for this layer
            layer.finish()
        for ref in open_refs:
            if ref.layer >= walk.depth:
                _compress_unseen(src, plan, ref, device, finish)


def _compress_batch(src: Source, plan: Plan, batch: Sequence[Site], stage: Sequence[Site], finish: Store) -> None:
    own = [[ref for ref in site.refs if plan.weights[ref.name]] for site in batch]
    chosen = [(site, refs) for site, refs in zip(batch, own, strict=True) if refs]
    if not chosen:
        return
    weights = [{ref.name: site.weights[ref.name] for ref in refs} for site, refs in chosen]
    moments = [usable_moment(site, stage) for site, _ in chosen]
    for (site, _), moment in zip(chosen, moments, strict=True):
        if not torch.isfinite(moment.diagonal()).all():
            _blame(src, plan, site)
    results = _compress(plan, weights, moments)
    for site, refs in chosen:
        for ref in refs:
            result = results[ref.name]
            spec = plan.weights[ref.name]
            assert spec is not None, f"{ref.name} is kept and has no result"
            site.replace(ref.name, dequantize(result.parts, spec, *ref.shape))
            finish(ref, result)
        site.release()


def _blame(src: Source, plan: Plan, site: Site) -> NoReturn:
    """Says what made a site's inputs NaN or infinite: a damaged tensor that is kept, as a rule."""
    for kept in src.graph.kept:
        tensor = src.reader.load_float(kept.name)
        if tensor.is_floating_point():
            check_finite(kept.name, tensor)
    for ref in src.graph.weights:
        if plan.weights[ref.name] is None:
            check_finite(ref.name, src.weight(ref))
    raise CalibrationError(
        f"{site.refs[0].name} reads values that are not finite, and no tensor is damaged: the model overflows float32 "
        "on this text; check that its config.json is its own, or use --method milo"
    )


def _compress_unseen(src: Source, plan: Plan, ref: WeightRef, device: torch.device, finish: Store) -> None:
    """A weight that no calibration token reaches (a next-token layer): as if all its inputs were alike."""
    weight = src.weight(ref).to(device, torch.float32)
    finish(ref, _compress(plan, [{ref.name: weight}], [torch.eye(ref.shape[1], device=device)])[ref.name])


def _compress(
    plan: Plan, weights: Sequence[Mapping[str, torch.Tensor]], moments: Sequence[torch.Tensor]
) -> dict[str, CompressedWeight]:
    names = [name for each in weights for name in each]
    specs = {name: spec for name in names if (spec := plan.weights[name])}
    methods = {name: plan.method_of(name) for name in names}
    return compress_together(weights, moments, specs, methods, plan.iterations, plan.refit)


def _first_open_layer(walk: Walk, plan: Plan, refs: Sequence[WeightRef], done: Mapping[str, object]) -> int:
    """The furthest boundary before which every weight is stored."""

    def unfinished() -> Iterator[int]:
        for ref in refs:
            if plan.weights[ref.name] and ref.name not in done:
                yield ref.layer

    limit = min(unfinished(), default=walk.depth)
    return max(boundary for boundary in walk.boundaries() if boundary <= limit)
