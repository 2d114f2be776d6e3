# SPDX-License-Identifier: Apache-2.0
"""Manifest: which modules of a checkpoint are compressed and how; it lives in config.json as `quantization_config`.

Enough to rebuild every stored tensor's name, dtype and shape without reading one, and compact: linears are listed
once per (spec, shape), experts of a bank as ranges per spec. Names are those of the files, without `.weight`.
No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moepress.errors import CheckpointError
from moepress.format.spec import PROJECTIONS, WeightSpec, check_shape

QUANT_METHOD = "moepress"
FORMAT_VERSION = 1
EXPERTS_GUARD = "moepress; this checkpoint needs: pip install moepress, then `import moepress` before loading it"
"""The experts implementation that compressed folders ask for, so that transformers alone refuses them."""
MAX_EXPERTS = 1 << 16
"""More experts than this in one layer is taken for damage, not for a model."""

Shape = tuple[int, int]
Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Stored tensor name -> (safetensors dtype, shape)."""


@dataclass(frozen=True)
class LinearEntry:
    """One compressed linear layer."""

    spec: WeightSpec
    shape: Shape


@dataclass(frozen=True)
class BankEntry:
    """The routed experts of one layer: per expert one spec for gate and up together and one for down."""

    gate_up_shape: Shape
    down_shape: Shape
    gate_up: tuple[WeightSpec, ...]
    down: tuple[WeightSpec, ...]

    @property
    def num_experts(self) -> int:
        return len(self.down)

    def specs(self, projection: str) -> tuple[WeightSpec, ...]:
        return self.down if projection == "down" else self.gate_up

    def shape(self, projection: str) -> Shape:
        return self.down_shape if projection == "down" else self.gate_up_shape

    def buckets(self, projection: str) -> dict[str, list[int]]:
        """Tag -> expert ids in slot order: the experts that share a spec are stored stacked."""
        buckets: dict[str, list[int]] = {}
        for expert, spec in enumerate(self.specs(projection)):
            buckets.setdefault(spec.tag, []).append(expert)
        return dict(sorted(buckets.items()))


@dataclass(frozen=True)
class Manifest:
    """Everything that is compressed in one checkpoint, by module name."""

    linears: Mapping[str, LinearEntry] = field(default_factory=dict)
    banks: Mapping[str, BankEntry] = field(default_factory=dict)

    def stored(self) -> Stored:
        """Every tensor that the compressed modules own, in a fixed order."""
        out: Stored = {}
        for name, entry in self.linears.items():
            out |= {f"{name}.{part}": value for part, value in entry.spec.parts(*entry.shape).items()}
        for name, bank in self.banks.items():
            for projection, tag, experts in bank_buckets(bank):
                parts = WeightSpec.parse(tag).parts(*bank.shape(projection))
                for part, (dtype, shape) in parts.items():
                    out[f"{name}.{projection}.{tag}.{part}"] = (dtype, (len(experts), *shape))
        return out

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` dictionary; `from_config` is its inverse."""
        groups: dict[tuple[str, Shape], list[str]] = {}
        for name, entry in self.linears.items():
            groups.setdefault((entry.spec.tag, entry.shape), []).append(name)
        linears = [{"spec": tag, "shape": list(shape), "names": names} for (tag, shape), names in groups.items()]
        banks = {name: _bank_to_config(bank) for name, bank in self.banks.items()}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "linears": linears,
            "banks": banks,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Manifest:
        """Raises CheckpointError for another method, a newer format or a description that contradicts itself."""
        if config.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"quant_method is {config.get('quant_method')!r}, not {QUANT_METHOD!r}")
        version = config.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version is {version!r} and this moepress reads {FORMAT_VERSION}; "
                "upgrade moepress or compress the source again"
            )
        try:
            return cls(_linears_from_config(config["linears"]), _banks_from_config(config["banks"]))
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"quantization_config is damaged: {error!r}; compress the source again") from error


def bank_buckets(bank: BankEntry) -> Iterator[tuple[str, str, list[int]]]:
    """(projection, tag, expert ids) of every bucket of a bank."""
    for projection in PROJECTIONS:
        for tag, experts in bank.buckets(projection).items():
            yield projection, tag, experts


def encode_ids(ids: Iterable[int]) -> str:
    """Sorted integers as ranges: [0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def decode_ids(text: str, limit: int) -> list[int]:
    """The inverse of `encode_ids`; refuses ids at or above `limit` before building a list of them."""
    ids: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        a, b = int(first), int(last or first)
        if not 0 <= a <= b < limit:
            raise ValueError(f"expert range {run!r} is outside 0..{limit - 1}")
        ids.extend(range(a, b + 1))
    return ids


def _bank_to_config(bank: BankEntry) -> dict[str, Any]:
    def side(projection: str) -> dict[str, Any]:
        experts = {tag: encode_ids(ids) for tag, ids in bank.buckets(projection).items()}
        return {"shape": list(bank.shape(projection)), "experts": experts}

    return {"num_experts": bank.num_experts, "gate_up": side("gate"), "down": side("down")}


def _linears_from_config(groups: Any) -> dict[str, LinearEntry]:
    linears: dict[str, LinearEntry] = {}
    for group in groups:
        entry = LinearEntry(WeightSpec.parse(group["spec"]), _shape(group["shape"]))
        names = group["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{names!r:.60} is not a list of names")
        for name in names:
            if name in linears:
                raise ValueError(f"linear {name} is listed twice")
            check_shape(name, entry.spec, *entry.shape)
            linears[name] = entry
    return linears


def _banks_from_config(banks: Any) -> dict[str, BankEntry]:
    out = {}
    for name, bank in banks.items():
        count = _positive(bank["num_experts"], below=MAX_EXPERTS)
        gate_up, down = bank["gate_up"], bank["down"]
        out[str(name)] = entry = BankEntry(
            _shape(gate_up["shape"]), _shape(down["shape"]),
            _specs(name, gate_up["experts"], count), _specs(name, down["experts"], count),
        )  # fmt: skip
        for projection, tag, _ in bank_buckets(entry):
            check_shape(f"{name}.{projection}", WeightSpec.parse(tag), *entry.shape(projection))
    return out


def _specs(name: str, experts: Mapping[str, str], count: int) -> tuple[WeightSpec, ...]:
    found: dict[int, WeightSpec] = {}
    for tag, text in experts.items():
        spec = WeightSpec.parse(tag)
        for expert in decode_ids(text, count):
            if expert in found:
                raise ValueError(f"{name}: expert {expert} has two specs")
            found[expert] = spec
    missing = [e for e in range(count) if e not in found]
    if missing:
        raise ValueError(f"{name}: experts {encode_ids(missing)} have no spec")
    return tuple(found[e] for e in range(count))


def _shape(value: Any) -> Shape:
    n, k = value
    return _positive(n), _positive(k)


def _positive(value: Any, below: int = 2**31) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < below:
        raise ValueError(f"{value!r} is not a positive dimension")
    return value
