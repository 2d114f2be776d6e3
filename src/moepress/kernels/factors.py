# SPDX-License-Identifier: Apache-2.0
"""Compensators' factors in records, so that kernels read them at their stored width: t = v x, y += u t.

A factor has one scale per 64 consecutive elements, whatever its rows; records have one per 64 columns of a row, with
the middle code as zero. For v [R, K] that is the same where 64 divides K. For u [N, R] it is where R divides 64 or 64
divides R. With any other R a row's 64 columns can have two scales: then both factors hold these columns twice, u once
with those codes that have the first scale, once with the others, and zeros in their places, and v the same rows twice.

Experts' gate and up, both (N, K), are multiplied at once, so their factors are those of one weight: v of gate above v
of up, and u in the weights' row order (`records.interleave`), with zeros where a row of one meets columns of the other.
Ranks differ from expert to expert; all matrices of a layer have the largest, R, and the rest is zeros:

    v [2 R, K]   r rows of gate           u [2 N, 2 R]   8 rows of gate:  r columns of gate, R - r and R zeros
                 R - r rows of zeros                     8 rows of up:    R zeros, r columns of up, R - r zeros
                 r rows of up                            ...
                 R - r rows of zeros

A zero is the middle code, and in groups that hold nothing else, scale 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from moepress.format.packing import unpack_codes
from moepress.format.spec import FACTOR_GROUP, WeightSpec
from moepress.format.weight import Parts
from moepress.kernels.packing import pack_codes
from moepress.kernels.records import Base, RecordLayout, interleave, interleaved_rows

LEAST = 8
"""Kernels take columns by eights."""


def why_not_records(specs: Iterable[WeightSpec], in_features: int) -> str | None:
    """None where the factors of weights that run together can be records, else the reason they cannot.

    `specs` are those of a dense layer, or of all experts' gate and up, or down; no rank is no obstacle.
    """
    widths = {spec.factor_bits for spec in specs if spec.rank}
    if len(widths) > 1:
        return f"the factors of one layer have several widths: {', '.join(map(str, sorted(widths)))} bits"
    if 16 in widths:
        return "factors of 16 bits have no records"
    if widths and in_features % FACTOR_GROUP:
        return f"the scales of v need in_features that are a multiple of {FACTOR_GROUP}, not {in_features}"
    return None


def stored_rank(rank: int) -> int:
    """Rows of v and columns of u that a compensator of this rank has in records: 8, 16, 32 or a multiple of 64."""
    return max(LEAST, rank) if _is_aligned(rank) else 2 * FACTOR_GROUP * math.ceil(rank / FACTOR_GROUP)


def _is_aligned(rank: int) -> bool:
    """Whether 64 columns of a row of u have one scale."""
    return rank % FACTOR_GROUP == 0 or FACTOR_GROUP % rank == 0


@dataclass(frozen=True)
class FactorShape:
    """The two matrices that the factors of a weight (N, K) become: of one that stands alone, or of gate and up."""

    out_features: int
    in_features: int
    rank: int
    """R, the largest of the experts' `stored_rank`s."""
    bits: int
    halves: int = 1
    """Weights that are multiplied at once: 2 for gate and up, else 1."""

    @classmethod
    def of(
        cls, specs: Iterable[WeightSpec], out_features: int, in_features: int, halves: int = 1
    ) -> FactorShape | None:
        """For all experts of these specs; None where none has a compensator, or its factors cannot be records."""
        ranked = [spec for spec in specs if spec.rank]
        if not ranked or why_not_records(ranked, in_features):
            return None
        most = max(stored_rank(spec.rank) for spec in ranked)
        return cls(out_features, in_features, most, ranked[0].factor_bits, halves)

    @property
    def layouts(self) -> tuple[RecordLayout, RecordLayout]:
        """Of v [halves R, K] and u [N, R], or of gate's and up's [interleaved_rows(N), 2 R]."""
        rows = self.out_features if self.halves == 1 else interleaved_rows(self.out_features)
        width = self.halves * self.rank
        v = RecordLayout(width, self.in_features, self.bits, FACTOR_GROUP)
        return v, RecordLayout(rows, width, self.bits, FACTOR_GROUP)

    def pack(self, halves: Sequence[Parts], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored parts of the factors, of `rank` each, for each half -> uint8 records of v and u [..., *layout.shape].

        Errors of `pack_codes`.
        """
        assert len(halves) == self.halves, f"{self.halves} weights are multiplied at once, got {len(halves)}"
        v_layout, u_layout = self.layouts
        v = (torch.cat(alike, -2) for alike in zip(*(self._v(parts, rank) for parts in halves), strict=True))
        each = [self._u(parts, rank, half) for half, parts in enumerate(halves)]
        u = each[0] if self.halves == 1 else (interleave(*alike) for alike in zip(*each, strict=True))
        return pack_codes(*v, v_layout), pack_codes(*u, u_layout)

    def _v(self, parts: Parts, rank: int) -> Base:
        """v of one half, padded to R rows."""
        codes, scale, zero = _rows_of_v(parts, self.bits, rank, self.in_features)
        below = (0, 0, 0, self.rank - codes.shape[-2])
        return pad(codes, below, value=_middle(self.bits)), pad(scale, below), pad(zero, below)

    def _u(self, parts: Parts, rank: int, half: int) -> Base:
        """u of one half in its columns, which begin at half * R. Where a row has several groups, they begin one."""
        read = _aligned_u if _is_aligned(rank) else _parted_u
        codes, scale, zero = read(parts, self.bits, self.out_features, rank)
        left, groups = half * self.rank, self.layouts[1].groups
        beside = left, self.halves * self.rank - left - codes.shape[-1]
        first = left // FACTOR_GROUP
        others = first, groups - first - scale.shape[-1]
        return pad(codes, beside, value=_middle(self.bits)), pad(scale, others), pad(zero, others)


def _rows_of_v(parts: Parts, bits: int, rank: int, columns: int) -> Base:
    """v [..., R, K] as records have it: `stored_rank` rows where those are chunks of 64 and each is there twice."""
    codes, scale = _codes(parts, "v", bits, rank, columns), parts["v_scale"].unflatten(-1, (rank, -1))
    if not _is_aligned(rank):
        below = (0, 0, 0, -rank % FACTOR_GROUP)
        codes, scale = _each_chunk_twice(pad(codes, below, value=_middle(bits))), _each_chunk_twice(pad(scale, below))
    return codes, scale, torch.full_like(scale, _middle(bits))


def _each_chunk_twice(x: torch.Tensor) -> torch.Tensor:
    chunks = x.unflatten(-2, (-1, FACTOR_GROUP))
    return torch.stack((chunks, chunks), -3).flatten(-4, -2)


def _aligned_u(parts: Parts, bits: int, rows: int, rank: int) -> Base:
    """u [..., N, R] where each 64 columns of a row have one scale."""
    scale = parts["u_scale"]
    if rank >= FACTOR_GROUP:
        scale = scale.unflatten(-1, (rows, -1))
    else:  # one scale is that of several rows
        scale = scale.repeat_interleave(FACTOR_GROUP // rank, -1)[..., :rows, None]
    return _codes(parts, "u", bits, rows, rank), scale.contiguous(), torch.full_like(scale, _middle(bits))


def _parted_u(parts: Parts, bits: int, rows: int, rank: int) -> Base:
    """u [..., N, R] in chunks of 64 columns, each there twice: codes with its first scale in a row, and the others."""
    codes, stored = _codes(parts, "u", bits, rows, rank), parts["u_scale"]
    aside = (0, -rank % FACTOR_GROUP)
    places = torch.arange(rows * rank, device=codes.device).view(rows, rank)
    group = pad(places // FACTOR_GROUP, aside, value=-1).unflatten(-1, (-1, FACTOR_GROUP))
    chunks = pad(codes, aside, value=_middle(bits)).unflatten(-1, (-1, FACTOR_GROUP))
    first = group[..., :1]
    here = torch.stack((group == first, group == first + 1), -2)  # row, chunk, which scale, column
    scales = stored[..., torch.cat((first, first + 1), -1).clamp(max=stored.shape[-1] - 1)]
    scale = torch.where(here.any(-1), scales, 0).flatten(-2)
    both = torch.where(here, chunks.unsqueeze(-2), _middle(bits)).flatten(-3)
    return both, scale, torch.full_like(scale, _middle(bits))


def _codes(parts: Parts, name: str, bits: int, rows: int, columns: int) -> torch.Tensor:
    return unpack_codes(parts[f"{name}_packed"], bits, rows * columns).unflatten(-1, (rows, columns))


def _middle(bits: int) -> int:
    return 1 << (bits - 1)
