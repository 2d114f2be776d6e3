# SPDX-License-Identifier: Apache-2.0
"""A compensator's factors in records, so that kernels read them at their stored width: t = v x, y += u t.

A factor has one scale per 64 consecutive elements, whatever its rows. Where 64 divides K, and R divides 64 or 64
divides R, a group never spreads over rows in pieces, and both factors are ordinary matrices with groups of 64 and the
middle code as zero. Other ranks have no records.
"""

from __future__ import annotations

import torch

from moepress.format.packing import unpack_codes
from moepress.format.spec import FACTOR_GROUP, WeightSpec
from moepress.format.weight import Parts
from moepress.kernels.records import RecordLayout, pack_records


def why_not_records(spec: WeightSpec, in_features: int) -> str | None:
    """None where the factors of a weight can be records, else the reason they cannot."""
    if spec.factor_bits == 16:
        return "factors of 16 bits are multiplied as they are"
    if in_features % FACTOR_GROUP:
        return f"the scales of v need in_features that are a multiple of {FACTOR_GROUP}, not {in_features}"
    if spec.rank % 8 or (spec.rank % FACTOR_GROUP and FACTOR_GROUP % spec.rank):
        return f"the scales of u need a rank of 8, 16, 32 or a multiple of {FACTOR_GROUP}, not {spec.rank}"
    return None


def factor_layouts(spec: WeightSpec, out_features: int, in_features: int) -> tuple[RecordLayout, RecordLayout]:
    """Of v [R, K] and u [N, R]."""
    v = RecordLayout(spec.rank, in_features, spec.factor_bits, FACTOR_GROUP)
    return v, RecordLayout(out_features, spec.rank, spec.factor_bits, FACTOR_GROUP)


def pack_factors(
    parts: Parts, spec: WeightSpec, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored parts of u and v -> uint8 records of v and of u, [*layout.shape] each. Not for `why_not_records`."""
    layouts = factor_layouts(spec, out_features, in_features)
    v, u = (
        _pack(parts[f"{name}_packed"], parts[f"{name}_scale"], each) for name, each in zip("vu", layouts, strict=True)
    )
    return v, u


def _pack(packed: torch.Tensor, scale: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    rows, columns = layout.rows, layout.columns
    codes = unpack_codes(packed, layout.bits, rows * columns).view(rows, columns)
    if columns >= FACTOR_GROUP:
        scale = scale.view(rows, -1)
    else:  # one group has the scale of several rows
        scale = scale.repeat_interleave(FACTOR_GROUP // columns)[:rows, None]
    zero = torch.full_like(scale, 2.0 ** (layout.bits - 1))
    return pack_records(codes, scale.contiguous(), zero, layout)
