# SPDX-License-Identifier: Apache-2.0
"""WeightSpec: the recipe of one weight, its short tag, and the exact bytes it will take. Pure arithmetic, no torch.

Legend used throughout moepress: N out_features, K in_features, G = ceil(K / group_size) groups, R rank, E experts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moepress.errors import PlanError

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FACTOR_BITS = (3, 4, 8, 16)
FACTOR_GROUP = 64
"""Consecutive row-major elements of a factor that share one fp16 scale (MiLo's `compensator_quant_gs`)."""

PROJECTIONS = ("gate", "up", "down")
ITEM_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4,
              "BOOL": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "U32": 4, "U64": 8}  # fmt: skip
"""Bytes of one element, by safetensors' dtype names."""

_TAG = re.compile(r"b(\d{1,2})g(\d{1,4})(?:r(\d{1,6})f(\d{1,2}))?")


@dataclass(frozen=True, kw_only=True, order=True)
class WeightSpec:
    """How one weight matrix is stored. `rank == 0` means no compensator, and then `factor_bits` is 0 too."""

    bits: int
    group_size: int = 64
    rank: int = 0
    factor_bits: int = 0

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, BITS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        if type(self.rank) is not int:
            raise PlanError(f"rank {self.rank!r} is not a whole number")
        if self.rank < 0:
            raise PlanError(f"rank {self.rank} is negative; use 0 for no compensator")
        if self.rank == 0 and self.factor_bits:
            raise PlanError(f"factor_bits {self.factor_bits} without a compensator (rank 0); use 0")
        if self.rank:
            _one_of("factor_bits", self.factor_bits, FACTOR_BITS)

    @property
    def tag(self) -> str:
        """Short name such as `b3g64` or `b3g64r16f3` (3 bits, groups of 64, rank 16, INT3 factors)."""
        base = f"b{self.bits}g{self.group_size}"
        return f"{base}r{self.rank}f{self.factor_bits}" if self.rank else base

    @classmethod
    def parse(cls, tag: str) -> WeightSpec:
        """The inverse of `tag`. Raises PlanError for anything that `tag` could not have written."""
        found = _TAG.fullmatch(tag) if isinstance(tag, str) else None
        if not found:
            raise PlanError(f"{tag!r} is not a weight spec; expected a form like b3g64 or b3g64r16f3")
        bits, group_size, rank, factor_bits = (int(x or 0) for x in found.groups())
        spec = cls(bits=bits, group_size=group_size, rank=rank, factor_bits=factor_bits)
        if spec.tag != tag:
            raise PlanError(f"{tag!r} is not in canonical form; write {spec.tag!r}")
        return spec

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (safetensors dtype, shape) of every tensor that stores one (N, K) weight."""
        n, k = out_features, in_features
        groups = math.ceil(k / self.group_size)
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "packed": ("U8", (n, packed_bytes(k, self.bits))),
            "scale": ("F16", (n, groups)),
            "zero": ("F16", (n, groups)),
        }
        for name, shape in (("u", (n, self.rank)), ("v", (self.rank, k))) if self.rank else ():
            count = math.prod(shape)
            if self.factor_bits == 16:
                parts[name] = ("F16", shape)
            else:
                parts[f"{name}_packed"] = ("U8", (packed_bytes(count, self.factor_bits),))
                parts[f"{name}_scale"] = ("F16", (math.ceil(count / FACTOR_GROUP),))
        return parts

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of one (N, K) weight: codes, scales, zeros and factors."""
        parts = self.parts(out_features, in_features).values()
        return sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in parts)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits packed without waste, rounded up once to a whole byte."""
    return (count * bits + 7) // 8


def check_shape(name: str, spec: WeightSpec, out_features: int, in_features: int) -> None:
    """Raises PlanError where a spec cannot be applied to an (N, K) weight called `name`."""
    if in_features < spec.group_size:
        fits = [g for g in GROUP_SIZES if g <= in_features]
        way_out = f"use --group-size {fits[-1]} or" if fits else f"no group size of {GROUP_SIZES} fits:"
        raise PlanError(
            f"{name}: in_features {in_features} is smaller than group_size {spec.group_size}; "
            f"{way_out} leave it at full precision with --keep '{name}'"
        )
    if spec.rank > min(out_features, in_features):
        raise PlanError(
            f"{name}: rank {spec.rank} exceeds the smaller side of its shape ({out_features}, {in_features}); "
            f"use a rank of at most {min(out_features, in_features)}"
        )


def _one_of(field: str, value: int, allowed: tuple[int, ...]) -> None:
    # 3.0 and True are in (1, 2, 3), but 3.0 cannot be a width nor `True` a tag
    if type(value) is not int or value not in allowed:
        raise PlanError(f"{field} {value} is not supported; choose one of {', '.join(map(str, allowed))}")
