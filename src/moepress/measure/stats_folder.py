# SPDX-License-Identifier: Apache-2.0
"""The folder of a calibration: what it holds when it is complete, and how an unfinished one is continued.

    statistics.json          what was measured; written last, so where it is the rest is complete
    tokens.safetensors       ids int32 [windows, length]
    gradients.safetensors    weight name -> F float32 [N], where whole-model gradients were taken

and, until then

    run.json                 the run's fingerprint, written first
    layers/00012.json        one layer's part
    work/                    hidden states (moepress.measure.walk)
    lock                     held by the process that writes

Every file appears whole or not at all. A run that is continued ends in the same bytes as one that was not cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moepress.errors import CalibrationError, PlanError, ResumeError
from moepress.measure.corpus import windows_digest
from moepress.plan.statistics import Header, Statistics

STATISTICS, TOKENS, GRADIENTS = "statistics.json", "tokens.safetensors", "gradients.safetensors"
RUN, LAYERS, WORK, LOCK = "run.json", "layers", "work", "lock"


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A complete calibration."""

    statistics: Statistics
    ids: torch.Tensor
    """int64 [windows, length]: the text that it was measured on."""
    gradients: Mapping[str, torch.Tensor] | None
    """Weight name -> F, float32 [N]; None where sensitivities were measured layer by layer."""


def read_stats(folder: str | Path) -> Stats:
    """Raises CalibrationError for a folder that is no calibration's, is unfinished or damaged."""
    folder = Path(folder)
    statistics = read_statistics(folder)
    ids = _read_ids(folder)
    if windows_digest(ids) != statistics.settings.get("text"):
        raise CalibrationError(f"{folder / TOKENS} holds other ids than {STATISTICS} says; calibrate again")
    gradients = read_tensors(folder / GRADIENTS) if statistics.kind == "fisher" else None
    return Stats(statistics=statistics, ids=ids, gradients=gradients)


def recorded_kind(folder: str | Path) -> str | None:
    """The kind of sensitivities that a run, finished or not, was begun with; None where there is none."""
    return (recorded(Path(folder)) or {}).get("kind")


def fingerprint_of(header: Header | Statistics) -> dict[str, str]:
    """What a continued run must share with the first one, as named values."""
    settings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.settings.items()}
    return {"source": header.source, "kind": header.kind} | settings


def recorded(folder: Path) -> dict[str, str] | None:
    """The fingerprint of the run that wrote here, or None where none did."""
    if (folder / STATISTICS).exists():
        return fingerprint_of(read_statistics(folder))
    if not (folder / RUN).exists():
        return None
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ResumeError(f"{folder / RUN} is damaged; remove {folder} and start over")
    return found


def read_statistics(folder: Path) -> Statistics:
    """The file alone. Raises CalibrationError for a folder that is no calibration's, is unfinished or damaged."""
    path = folder / STATISTICS
    if (folder / RUN).exists() and not path.exists():
        count = len(list((folder / LAYERS).glob("*.json")))
        raise CalibrationError(
            f"{folder} is an unfinished calibration ({count} layers done); finish it with moepress calibrate --resume"
        )
    try:
        return Statistics.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalibrationError(
            f"{folder} holds no {STATISTICS}; make one with moepress calibrate SRC --text FILE -o {folder}"
        ) from error
    except (OSError, UnicodeDecodeError, PlanError) as error:
        raise CalibrationError(f"{path} is damaged: {error}") from error


def _read_ids(folder: Path) -> torch.Tensor:
    ids = read_tensors(folder / TOKENS).get("ids")
    if ids is None or ids.dtype != torch.int32 or ids.ndim != 2:
        raise CalibrationError(f"{folder / TOKENS} holds no ids [windows, length] in int32; calibrate again")
    return ids.long()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, as copies; CalibrationError where there is none to read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CalibrationError(f"{path} is missing or damaged: {error}; calibrate again") from error
