# SPDX-License-Identifier: Apache-2.0
"""verify: is a compressed folder, byte by byte, what it says it is; and what did each weight lose."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moepress.checkpoint.reader import CONFIG, CheckpointReader, read_json
from moepress.checkpoint.side import SIDE_MANIFEST, SIDE_VERSION, seal
from moepress.errors import CheckpointError, PlanError
from moepress.format.manifest import Manifest
from moepress.graph.view import WeightRef
from moepress.plan.plan import Plan, check_plan, manifest_of
from moepress.progress import Progress, silent
from moepress.quantize.job import relative_error
from moepress.source import Source, open_source


@dataclass(frozen=True)
class Verification:
    """`problems` is empty for a sound folder; `errors` holds |W - W'| / |W| by weight when a source was given."""

    problems: tuple[str, ...]
    files: int
    tensors: int
    errors: dict[str, float] = field(default_factory=dict)


def verify_checkpoint(
    target: str | Path, against: str | Path | None = None, *, progress: Progress = silent
) -> Verification:
    """Checks every file, shape and checksum of a compressed folder; with `against`, every weight's error too.

    Raises CheckpointError where the folder is too damaged to be read at all.
    """
    folder = Path(target)
    side = read_json(folder / SIDE_MANIFEST) if (folder / SIDE_MANIFEST).exists() else None
    if side is None:
        raise CheckpointError(f"{folder} has no {SIDE_MANIFEST}: not written by `moepress compress`, or it was lost")
    if side.get("side_version") != SIDE_VERSION:
        raise CheckpointError(
            f"{SIDE_MANIFEST} has version {side.get('side_version')!r}, this moepress reads {SIDE_VERSION}; upgrade it"
        )
    problems = _check_files(folder, side)
    with CheckpointReader(folder) as reader:
        manifest = Manifest.from_config(_section(reader.config, "quantization_config", CONFIG))
        problems += _check_shapes(reader, manifest)
        problems += _check_digests(reader, _section(side, "tensors", SIDE_MANIFEST), progress)
        errors: dict[str, float] = {}
        if against is not None and not problems:
            with open_source(against) as src:
                errors = _weight_errors(src, reader, manifest, side, progress)
        return Verification(tuple(problems), len(_section(side, "files", SIDE_MANIFEST)), len(reader.tensors), errors)


def _check_files(folder: Path, side: dict[str, Any]) -> list[str]:
    problems = []
    if (folder / SIDE_MANIFEST).read_bytes() != seal({k: v for k, v in side.items() if k != "sha256"}):
        problems.append(f"{SIDE_MANIFEST} has changed since it was written")
    for name in _section(side, "files", SIDE_MANIFEST):
        path, entry = folder / name, _section(side["files"], name, SIDE_MANIFEST)
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != entry.get("sha256"):
            problems.append(f"{name} has changed: {path.stat().st_size} bytes now, {entry.get('bytes')} when written")
    for name in _section(side, "shards", SIDE_MANIFEST):
        path, entry = folder / name, _section(side["shards"], name, SIDE_MANIFEST)
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry.get("bytes"):
            problems.append(f"{name} has {path.stat().st_size} bytes, {entry.get('bytes')} when written")
        elif _header_digest(path) != entry.get("header_sha256"):
            problems.append(f"the header of {name} has changed since it was written")
    return problems


def _header_digest(path: Path) -> str:
    # tensors have digests of their own; what remains of a shard is its header
    with path.open("rb") as file:
        length = file.read(8)
        size = min(int.from_bytes(length, "little"), path.stat().st_size)
        return hashlib.sha256(length + file.read(size)).hexdigest()


def _check_shapes(reader: CheckpointReader, manifest: Manifest) -> list[str]:
    found = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
    wanted = manifest.stored()
    problems = [f"{name} is missing" for name in wanted if name not in found]
    return problems + [
        f"{name} is {found[name]} in the files and {expected} by {CONFIG}"
        for name, expected in wanted.items()
        if name in found and found[name] != expected
    ]


def _check_digests(reader: CheckpointReader, digests: dict[str, str], progress: Progress) -> list[str]:
    problems = [f"tensor {name} is missing" for name in digests if name not in reader.tensors]
    problems += [f"tensor {name} was not written by moepress" for name in reader.tensors if name not in digests]
    with progress("verifying", sum(info.num_bytes for info in reader.tensors.values())) as advance:
        for name, info in reader.tensors.items():
            data = reader.load(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            if name in digests and hashlib.sha256(data).hexdigest() != digests[name]:
                problems.append(f"tensor {name} in {info.file} has changed since it was written")
            advance(info.num_bytes)
    return problems


def _weight_errors(
    src: Source, reader: CheckpointReader, manifest: Manifest, side: dict[str, Any], progress: Progress
) -> dict[str, float]:
    plan = Plan.from_json(json.dumps(side.get("plan")))
    if plan.source != src.digest:
        raise PlanError(f"{reader.folder} was made from a source with other names or shapes than {src.folder}")
    check_plan(plan, src.graph)
    if manifest_of(plan, src.graph) != manifest:
        raise CheckpointError(f"{CONFIG} and the plan in {SIDE_MANIFEST} disagree; compress the source again")
    errors = {}
    with progress("comparing", sum(ref.numel for ref in src.graph.weights)) as advance:
        for ref in src.graph.weights:
            if spec := plan.weights[ref.name]:
                errors[ref.name] = relative_error(src.weight(ref), load_parts(reader, manifest, ref), spec)
            advance(ref.numel)
    return errors


def load_parts(reader: CheckpointReader, manifest: Manifest, ref: WeightRef) -> dict[str, torch.Tensor]:
    """The stored parts of one weight, out of its bucket where it is an expert's."""
    if ref.bank is None:
        spec = manifest.linears[ref.module].spec
        return {part: reader.load(f"{ref.module}.{part}") for part in spec.parts(*ref.shape)}
    assert ref.expert is not None, f"{ref.name} is in a bank but has no expert number"
    bank = manifest.banks[ref.bank]
    spec = bank.specs(ref.projection)[ref.expert]
    slot = bank.buckets(ref.projection)[spec.tag].index(ref.expert)
    prefix = f"{ref.bank}.{ref.projection}.{spec.tag}"
    return {part: reader.load(f"{prefix}.{part}", slot) for part in spec.parts(*ref.shape)}


def _section(body: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    value = body.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} has no usable {key!r} section; compress the source again")
    return value
