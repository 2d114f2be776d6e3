# SPDX-License-Identifier: Apache-2.0
"""The product on one page: a source folder, a plan, one weight at a time, a target folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moepress.checkpoint.writer import CheckpointWriter, Piece, refuse_existing, remove_work
from moepress.errors import CheckpointError, PlanError, ReadError, WriteError
from moepress.format.manifest import Manifest, bank_buckets
from moepress.graph.view import WeightRef
from moepress.measure.corpus import evenly, windows_digest
from moepress.measure.stats_folder import Stats
from moepress.plan.plan import Plan, calibrated_weights, check_plan, manifest_of
from moepress.plan.settings import Settings
from moepress.planning import kept_names, layout_of, plan_settings, read_stats_of
from moepress.progress import Progress, silent
from moepress.quantize.job import CompressedWeight, check_finite, compress_weight
from moepress.quantize.parallel import run_jobs
from moepress.report import already_complete, summarise, target_files
from moepress.sequential import Store, compress_sequentially
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
    statistics: str | Path | None = None,
    device: str | torch.device = "cpu",
    memory: int = 4 << 30,
    windows: int | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Result:
    """Compresses the checkpoint in `source` into the new folder `target`, weight by weight.

    Takes settings or a ready plan. `frequencies` (bank name -> token counts) serve the frequency rank policy. Weights
    that gptq or compensated hqq compress are fitted to the text in `statistics` (a folder of `calibrate`; by default
    the one the plan names), or to `windows` evenly spaced windows of it, layer by layer in about `memory` bytes. The
    target appears only when it is complete; `resume` continues a run that was cut off and ends in the same bytes.
    Raises CheckpointError, CalibrationError, PlanError or ResumeError with nothing published.
    """
    if not resume:
        refuse_existing(Path(target))  # before the source is measured and hashed, which can take minutes
    with open_source(source) as src:
        plan = _resolve(src, settings, plan, frequencies or {}, device, progress)
        manifest = manifest_of(plan, src.graph)
        layout = layout_of(src, plan, manifest)
        stats = _statistics(src, plan, statistics, windows)
        fingerprint = _fingerprint(src, plan, stats, device, progress)
        if resume and (errors := already_complete(Path(target), fingerprint)) is not None:
            remove_work(Path(target))
            return Result(plan, summarise(src, plan, layout), errors, len(src.graph.weights))
        with CheckpointWriter(target, layout, fingerprint, resume=resume) as out:
            resumed = len(out.done)
            try:
                if stats:
                    options: dict[str, Any] = {"device": torch.device(device), "memory": memory, "progress": progress}
                    compress_sequentially(src, plan, stats, out, _storing(manifest, out), **options)
                else:
                    _compress_weights(src, plan, out, _storing(manifest, out), device, progress)
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
        return plan_settings(src, settings, frequencies, device, progress)
    assert plan is not None
    if plan.source != src.digest:
        raise PlanError(f"the plan is for a source with digest {plan.source[:12]}, {src.folder} has {src.digest[:12]}")
    check_plan(plan, src.graph)
    return plan


def _statistics(src: Source, plan: Plan, folder: str | Path | None, windows: int | None) -> Stats | None:
    """The calibration that the plan needs, or None where it needs none."""
    wanted = calibrated_weights(plan)
    if not wanted:
        return None
    folder = folder or plan.statistics
    if not folder:
        raise PlanError(
            f"{wanted[0]} ({plan.method_of(wanted[0])}) and {len(wanted) - 1} more weights are fitted to calibration "
            "text; run `moepress calibrate SRC --text FILE -o stats/` and give --stats stats/, or use --method milo"
        )
    stats = read_stats_of(folder, src)
    if windows is None:
        return stats
    if not 1 <= windows <= len(stats.ids):
        raise PlanError(f"--windows is {windows}; {folder} holds 1 to {len(stats.ids)} windows")
    return replace(stats, ids=evenly(stats.ids, windows))


def _compress_weights(
    src: Source, plan: Plan, out: CheckpointWriter, store: Store, device: str | torch.device, progress: Progress
) -> None:
    open_refs = [ref for ref in src.graph.weights if plan.weights[ref.name] and ref.name not in out.done]

    def job(ref: WeightRef) -> CompressedWeight:
        spec = plan.weights[ref.name]
        assert spec is not None, f"{ref.name} is kept and has no job"
        weight = src.weight(ref).to(device)
        return compress_weight(ref.name, weight, spec, plan.method_of(ref.name), plan.iterations, plan.refit)

    with progress("compressing", sum(ref.numel for ref in open_refs)) as advance:
        jobs = (partial(job, ref) for ref in open_refs)
        for ref, done in zip(open_refs, run_jobs(jobs, torch.device(device)), strict=True):
            store(ref, done)
            advance(ref.numel)


def _storing(manifest: Manifest, out: CheckpointWriter) -> Store:
    slots = _slots(manifest)

    def store(ref: WeightRef, done: CompressedWeight) -> None:
        info = {"error": round(done.error, 6), "alternations": done.alternations}
        out.put(ref.name, _pieces(ref, done.parts, slots), info)

    return store


def _copy_tensors(src: Source, plan: Plan, out: CheckpointWriter) -> None:
    for name in kept_names(src, {name for name, spec in plan.weights.items() if spec is None}):
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


def _fingerprint(
    src: Source, plan: Plan, stats: Stats | None, device: str | torch.device, progress: Progress
) -> dict[str, str]:
    """What a resumed run must share with the one it continues, most telling first."""
    specs = Counter(plan.tag_of(name) for name in plan.weights)
    settings = {
        "method": plan.method,
        "weights": ", ".join(f"{count} x {tag}" for tag, count in specs.most_common(8)),
        "iterations": str(plan.iterations),
        "refit": str(plan.refit),
        **({"calibration": windows_digest(stats.ids)} if stats else {}),
        "device": torch.device(device).type,
        "moepress": __version__,
        "torch": torch.__version__,
    }
    digests = {f"source file {name}": digest for name, digest in src.file_digests(progress).items()}
    return settings | digests | {"plan": plan.digest()}
