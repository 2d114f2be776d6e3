# SPDX-License-Identifier: Apache-2.0
"""The product on one page: a source folder, a plan, one weight at a time, a target folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moepress.checkpoint.layout import Layout, lay_out
from moepress.checkpoint.writer import CheckpointWriter, Piece, refuse_existing, remove_work
from moepress.errors import CheckpointError, PlanError, ReadError, WriteError
from moepress.format.manifest import Manifest, bank_buckets
from moepress.graph.view import WeightRef
from moepress.measure.weights import excess_kurtosis
from moepress.plan.plan import Plan, check_plan, make_plan, manifest_of
from moepress.plan.ranks import Evidence, needs
from moepress.plan.settings import Settings
from moepress.progress import Progress, silent
from moepress.quantize.job import CompressedWeight, check_finite, compress_weight
from moepress.quantize.parallel import run_jobs
from moepress.report import already_complete, summarise, target_files
from moepress.source import Source, open_source
from moepress.version import __version__


@dataclass(frozen=True)
class Result:
    """What a run did: the plan, the sizes written and the relative error of each weight."""

    plan: Plan
    summary: Mapping[str, Any]
    errors: Mapping[str, float]
    resumed: int
    """Weights and tensors that an earlier, unfinished run had done."""


def compress_checkpoint(
    source: str | Path,
    target: str | Path,
    settings: Settings | None = None,
    *,
    plan: Plan | None = None,
    frequencies: Mapping[str, Sequence[float]] | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: Progress = silent,
) -> Result:
    """Compresses the checkpoint in `source` into the new folder `target`, weight by weight.

    Takes settings or a ready plan. `frequencies` (bank name -> token counts) serve the frequency rank policy. The
    target appears only when it is complete; `resume` continues a run that was cut off and ends in the same bytes.
    Raises CheckpointError, PlanError or ResumeError with nothing published.
    """
    if not resume:
        refuse_existing(Path(target))  # before the source is measured and hashed, which can take minutes
    with open_source(source) as src:
        plan = _resolve(src, settings, plan, frequencies or {}, device, progress)
        manifest = manifest_of(plan, src.graph)
        layout = layout_of(src, plan, manifest)
        fingerprint = _fingerprint(src, plan, device, progress)
        if resume and (errors := already_complete(Path(target), fingerprint)) is not None:
            remove_work(Path(target))
            return Result(plan, summarise(src, plan, layout), errors, len(src.graph.weights))
        with CheckpointWriter(target, layout, fingerprint, resume=resume) as out:
            resumed = len(out.done)
            try:
                _compress_weights(src, plan, manifest, out, device, progress)
                _copy_tensors(src, plan, out)
            except (ReadError, WriteError):  # may pass; --resume goes on from here
                raise
            except CheckpointError:
                out.discard()  # a damaged source can never be finished
                raise
            errors = {name: info["error"] for name, info in sorted(out.done.items()) if "error" in info}
            summary = summarise(src, plan, layout)
            for name, data in target_files(
                src, plan, manifest, layout, fingerprint, errors, out.tensor_digests()
            ).items():
                out.add_file(name, data)
            out.publish()
    return Result(plan, summary, errors, resumed)


def plan_checkpoint(
    source: str | Path,
    settings: Settings,
    *,
    frequencies: Mapping[str, Sequence[float]] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Plan:
    """The decisions that `compress_checkpoint` would take, with the exact bytes it would write in `notes`."""
    with open_source(source) as src:
        plan = _resolve(src, settings, None, frequencies or {}, device, progress)
        layout = layout_of(src, plan, manifest_of(plan, src.graph))
        notes = dict(plan.notes) | {"predicted": summarise(src, plan, layout)}
        return replace(plan, notes=notes)


def layout_of(src: Source, plan: Plan, manifest: Manifest) -> Layout:
    """Where every tensor of the target will lie: kept ones as they are (FP8 as bfloat16), the rest as stored parts."""
    tensors = {name: _float_info(src, name) for name in _kept_names(src, plan)} | manifest.stored()
    return lay_out(dict(sorted(tensors.items(), key=lambda item: _layer_order(item[0]))))


def _resolve(
    src: Source,
    settings: Settings | None,
    plan: Plan | None,
    frequencies: Mapping[str, Sequence[float]],
    device: str | torch.device,
    progress: Progress,
) -> Plan:
    if (settings is None) == (plan is None):
        raise PlanError("give either settings or a plan")
    if settings is not None:
        measured = measure_kurtosis(src, device, progress) if "kurtosis" in needs(settings.ranks) else {}
        return make_plan(src.graph, src.digest, settings, Evidence(measured, frequencies))
    assert plan is not None
    if plan.source != src.digest:
        raise PlanError(f"the plan is for a source with digest {plan.source[:12]}, {src.folder} has {src.digest[:12]}")
    check_plan(plan, src.graph)
    return plan


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


def _compress_weights(
    src: Source, plan: Plan, manifest: Manifest, out: CheckpointWriter, device: str | torch.device, progress: Progress
) -> None:
    slots = _slots(manifest)
    open_refs = [ref for ref in src.graph.weights if plan.weights[ref.name] and ref.name not in out.done]

    def job(ref: WeightRef) -> CompressedWeight:
        spec = plan.weights[ref.name]
        assert spec is not None, f"{ref.name} is kept and has no job"
        weight = src.weight(ref).to(device)
        return compress_weight(ref.name, weight, spec, plan.method, plan.iterations, plan.refit)

    with progress("compressing", sum(ref.numel for ref in open_refs)) as advance:
        jobs = (partial(job, ref) for ref in open_refs)
        for ref, done in zip(open_refs, run_jobs(jobs, torch.device(device)), strict=True):
            info = {"error": round(done.error, 6), "alternations": done.alternations}
            out.put(ref.name, _pieces(ref, done.parts, slots), info)
            advance(ref.numel)


def _copy_tensors(src: Source, plan: Plan, out: CheckpointWriter) -> None:
    for name in _kept_names(src, plan):
        if name not in out.done:
            tensor = src.reader.load_float(name)
            if tensor.is_floating_point():
                check_finite(name, tensor)
            out.put(name, [(name, None, tensor)])


def _pieces(ref: WeightRef, parts: Mapping[str, torch.Tensor], slots: Mapping[Any, tuple[str, int]]) -> list[Piece]:
    if ref.bank is None:
        return [(f"{ref.module}.{part}", None, tensor) for part, tensor in parts.items()]
    tag, slot = slots[ref.bank, ref.projection, ref.expert]
    return [(f"{ref.bank}.{ref.projection}.{tag}.{part}", slot, tensor) for part, tensor in parts.items()]


def _slots(manifest: Manifest) -> dict[tuple[str, str, int], tuple[str, int]]:
    """(bank, projection, expert) -> (tag, slot)."""
    return {
        (name, projection, expert): (tag, slot)
        for name, bank in manifest.banks.items()
        for projection, tag, experts in bank_buckets(bank)
        for slot, expert in enumerate(experts)
    }


def _kept_names(src: Source, plan: Plan) -> list[str]:
    kept = [tensor.name for tensor in src.graph.kept]
    uncompressed = {ref.tensor: None for ref in src.graph.weights if plan.weights[ref.name] is None}
    return kept + list(uncompressed)


def _float_info(src: Source, name: str) -> tuple[str, tuple[int, ...]]:
    info = src.reader.tensors[name]
    return ("BF16" if info.dtype == "F8_E4M3" else info.dtype), info.shape


def _layer_order(name: str) -> tuple[int, str]:
    layer = re.search(r"\.(\d{1,5})\.", name)
    return (int(layer.group(1)) if layer else -1, name)


def _fingerprint(src: Source, plan: Plan, device: str | torch.device, progress: Progress) -> dict[str, str]:
    """What a resumed run must share with the one it continues, most telling first."""
    specs = Counter(spec.tag if spec else "keep" for spec in plan.weights.values())
    settings = {
        "method": plan.method,
        "weights": ", ".join(f"{count} x {tag}" for tag, count in specs.most_common(8)),
        "iterations": str(plan.iterations),
        "refit": str(plan.refit),
        "device": torch.device(device).type,
        "moepress": __version__,
        "torch": torch.__version__,
    }
    digests = {f"source file {name}": digest for name, digest in src.file_digests(progress).items()}
    return settings | digests | {"plan": plan.digest()}
