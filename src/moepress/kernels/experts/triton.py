# SPDX-License-Identifier: Apache-2.0
"""A layer's routed experts in Triton, straight from the stored parts: the fallback that `linear/triton.py` describes.

Pairs of token and expert are put in the experts' order and cut into blocks of one expert each, on the device, without
a transfer to the host. Then, for each bucket of experts that share a spec,

    t = x v^T, twice  ->  h = silu(x gate^T) * (x up^T)        t = h v^T  ->  parts = weight * (h down^T)

where t is for compensators only, and every program looks up its block's expert and leaves where another bucket has it.
At last the parts of a token are added in float32, in the order of its slots. h, t and parts are rounded to x's dtype.

Legend: T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels, R rank. A pair is
numbered token * k + slot; its place is where it stands in the experts' order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts
from moepress.kernels.banks import needs_operation, no_gradient
from moepress.kernels.linear import triton as dense
from moepress.kernels.linear.triton import (
    base,
    constants,
    factor,
    flatten,
    named,
    project_constants,
    spec_of,
    tile_for,
)
from moepress.kernels.problem import SILU

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without Triton
    triton = None
else:
    from moepress.kernels.linear.triton import add_factor_product, multiply

MAX_PAIRS = 1 << 16
"""More are run in turns, which bounds the memory of h and parts."""
FEW_TOKENS = 4
"""Up to here pairs are not sorted: each is a block, and the few that share an expert find it in the cache."""
COMBINED = 512
"""Channels that a program of the last kernel adds up."""


class Bucket(NamedTuple):
    """Weights of one spec: the stored parts with a leading dimension, as `StoredParts` has them."""

    spec: WeightSpec
    parts: Parts


class Blocks(NamedTuple):
    """Which pairs run together: block b has the places first[b] to last[b] - 1, all of expert[b].

    A block whose expert is not in 0..E-1 runs nothing.
    """

    pairs: torch.Tensor
    """int64 [P]: place -> pair."""
    expert: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    """[blocks] each."""


def why_not(device: torch.device, dtype: torch.dtype, bits: Iterable[int], activation: str = SILU) -> str | None:
    """None where the kernels can run, else the reason they cannot. `bits` are the widths that occur in the layer."""
    if activation != SILU:
        return f"Triton kernels of experts know the activation {SILU}, not {activation}"
    return next((reason for each in bits if (reason := dense.why_not(device, dtype, each))), None)


def slot_table(where: Sequence[tuple[int, int]], device: torch.device | str) -> torch.Tensor:
    """int32 [buckets, E]: an expert's slot in a bucket, -1 where the bucket does not have it.

    `where`: expert -> (number of its bucket, slot), as `Projection.places()` gives it. To be made once and kept:
    building it takes a transfer to the device.
    """
    table = torch.full((1 + max(bucket for bucket, _ in where), len(where)), -1, dtype=torch.int32)
    for expert, (bucket, slot) in enumerate(where):
        table[bucket, expert] = slot
    return table.to(device)


def triton_experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate: Sequence[Bucket],
    up: Sequence[Bucket],
    gate_up_slots: torch.Tensor,
    down: Sequence[Bucket],
    down_slots: torch.Tensor,
    intermediate: int,
) -> torch.Tensor:
    """x [T, H] in bf16, fp16 or fp32, ids (integers) and weights [T, k] -> [T, H] in x's dtype, without gradients.

    `gate` and `up` are buckets of the same specs in the same order; `gate_up_slots` and `down_slots` are their
    `slot_table`s. Ids outside 0..E-1 run nothing. Weights of any dtype are used as they are.
    """
    x, ids, weights = x.contiguous(), expert_ids.contiguous(), expert_weights.contiguous()
    if not needs_operation():
        return _experts(x, ids, weights, gate, up, gate_up_slots, down, down_slots, intermediate)
    hidden = x.shape[1]
    return experts_op(
        x, ids, weights, _flatten([*gate, *up], intermediate, hidden), gate_up_slots, _tags(gate),
        _flatten(down, hidden, intermediate), down_slots, _tags(down), intermediate,
    )  # fmt: skip


def _experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: Sequence[Bucket],
    up: Sequence[Bucket],
    gate_up_slots: torch.Tensor,
    down: Sequence[Bucket],
    down_slots: torch.Tensor,
    intermediate: int,
) -> torch.Tensor:
    if not ids.numel():
        return torch.zeros_like(x)
    y, tokens = torch.empty_like(x), max(1, MAX_PAIRS // ids.shape[1])
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, whichever it is
        for start in range(0, len(x), tokens):
            turn = slice(start, start + tokens)
            run = _Run(x[turn], ids[turn], len(gate_up_slots[0]))
            h = x.new_empty(ids[turn].numel(), intermediate)
            for a, b, slots in zip(gate, up, gate_up_slots, strict=True):
                run.gate_up(a, b, slots, h)
            parts = x.new_empty(len(h), x.shape[1])
            for bucket, slots in zip(down, down_slots, strict=True):
                run.down(bucket, slots, h, weights[turn], parts)
            run.combine(parts, y[turn])
    return y


@torch.library.custom_op("moepress::triton_experts", mutates_args=())
def experts_op(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    gate_up_slots: torch.Tensor,
    gate_up_tags: str,
    down: list[torch.Tensor],
    down_slots: torch.Tensor,
    down_tags: str,
    intermediate: int,
) -> torch.Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H]; all parts of gate, then of up, and of down, as the tags say."""
    gate = _buckets(gate_up[: len(gate_up) // 2], gate_up_tags, intermediate, x.shape[1])
    up = _buckets(gate_up[len(gate_up) // 2 :], gate_up_tags, intermediate, x.shape[1])
    others = _buckets(down, down_tags, x.shape[1], intermediate)
    return _experts(x, ids, weights, gate, up, gate_up_slots, others, down_slots, intermediate)


@experts_op.register_fake
def _(x, *others):
    return torch.empty_like(x)


experts_op.register_autograd(no_gradient)


def _tags(buckets: Sequence[Bucket]) -> str:
    return ",".join(bucket.spec.tag for bucket in buckets)


def _flatten(buckets: Sequence[Bucket], out_features: int, in_features: int) -> list[torch.Tensor]:
    return [part for spec, parts in buckets for part in flatten(parts, spec, out_features, in_features)]


def _buckets(tensors: list[torch.Tensor], tags: str, out_features: int, in_features: int) -> list[Bucket]:
    buckets, start = [], 0
    for spec in map(spec_of, tags.split(",")):
        stop = start + len(spec.parts(out_features, in_features))
        buckets.append(Bucket(spec, named(tensors[start:stop], spec, out_features, in_features)))
        start = stop
    return buckets


# ---------------------------------------------------------------------------------------------- blocks of pairs


def few_blocks(ids: torch.Tensor) -> Blocks:
    """ids [T, k] -> a block for each pair."""
    number = torch.arange(ids.numel() + 1, device=ids.device)
    return Blocks(number[:-1], ids.flatten(), number[:-1], number[1:])


def sorted_blocks(ids: torch.Tensor, experts: int, rows: int) -> Blocks:
    """ids [T, k] -> as many blocks of up to `rows` pairs as any routing can need; surplus ones have the expert E."""
    ordered, pairs = torch.sort(ids.flatten(), stable=True)
    # ids out of range are before the first edge and after the last
    edges = torch.searchsorted(ordered, torch.arange(experts + 1, dtype=ids.dtype, device=ids.device))
    blocks = (edges.diff() + rows - 1) // rows
    ends = blocks.cumsum(0)
    number = torch.arange(min(len(pairs), len(pairs) // rows + experts), device=ids.device)
    expert = torch.searchsorted(ends, number, right=True)
    known = expert.clamp(max=experts - 1)
    first = edges[known] + (number - ends[known] + blocks[known]) * rows
    return Blocks(pairs, expert, first, edges[known + 1])


class _Run:
    """The launches for tokens whose pairs are in one set of blocks."""

    def __init__(self, x: torch.Tensor, ids: torch.Tensor, experts: int) -> None:
        """x [T, H], ids [T, k]."""
        few = len(x) <= FEW_TOKENS
        self.x, self.ids, self.experts = x, ids, experts
        self.tile = tile_for(1 if few else ids.numel() / experts, x.dtype)
        self.blocks = few_blocks(ids) if few else sorted_blocks(ids, experts, self.tile.rows)

    def gate_up(self, gate: Bucket, up: Bucket, slots: torch.Tensor, h: torch.Tensor) -> None:
        """Writes silu(x gate^T) * (x up^T) of the bucket's experts into h [P, I], by place."""
        n, k = h.shape[1], self.x.shape[1]
        matrices = (self._matrix(each, slots, self.x, self.ids.shape[1]) for each in (gate, up))
        _gate_up_kernel[self._grid(n, self.tile.columns)](
            self.x, h, *matrices, *self.blocks, slots, self.experts, N=n, K=k, SLOTS=self.ids.shape[1],
            **constants(gate.spec, self.tile),
        )  # fmt: skip

    def down(
        self, bucket: Bucket, slots: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, parts: torch.Tensor
    ) -> None:
        """Writes weight * (h down^T) of the bucket's experts into parts [P, H], by pair."""
        n, k = parts.shape[1], h.shape[1]
        _down_kernel[self._grid(n, self.tile.columns)](
            h, parts, self._matrix(bucket, slots, h, 0), weights, *self.blocks, slots, self.experts, N=n, K=k,
            **constants(bucket.spec, self.tile),
        )  # fmt: skip

    def combine(self, parts: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the parts [P, H] of each token into y [T, H]."""
        _combine_kernel[(len(y), triton.cdiv(y.shape[1], COMBINED))](
            parts, self.ids, y, self.experts, N=y.shape[1], SLOTS=self.ids.shape[1], COLUMNS=COMBINED
        )

    def _matrix(
        self, bucket: Bucket, slots: torch.Tensor, x: torch.Tensor, per_row: int
    ) -> tuple[torch.Tensor | None, ...]:
        """What `multiply` takes. A row of x has `per_row` consecutive pairs; 0: x has a row for each place."""
        spec, parts = bucket
        if not spec.rank:
            return *base(parts), None, None, None
        t, fixed = x.new_empty(self.ids.numel(), spec.rank), project_constants(spec, self.tile)
        _project_kernel[self._grid(spec.rank, fixed["COLUMNS"])](
            x, t, *factor(parts, spec, "v"), *self.blocks, slots, self.experts, K=x.shape[1], SLOTS=per_row, **fixed
        )
        return *base(parts), *factor(parts, spec, "u"), t

    def _grid(self, n: int, columns: int) -> tuple[int, int]:
        return len(self.blocks.expert), triton.cdiv(n, columns)


# ---------------------------------------------------------------------------------------------- kernels

if triton is not None:

    @triton.jit
    def _block(expert_ptr, first_ptr, last_ptr, slots_ptr, experts, ROWS: tl.constexpr):
        """This program's slot in the bucket, -1 for none; its places and which of them are in the block."""
        block = tl.program_id(0)
        expert = tl.load(expert_ptr + block)
        slot = tl.load(slots_ptr + expert, (expert >= 0) & (expert < experts), other=-1).to(tl.int64)
        place = tl.load(first_ptr + block) + tl.arange(0, ROWS)
        return slot, place, place < tl.load(last_ptr + block)

    @triton.jit
    def _gate_up_kernel(
        x_ptr, h_ptr, gate, up, pairs_ptr, expert_ptr, first_ptr, last_ptr, slots_ptr, experts,
        N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
        BITS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, FACTOR_BITS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
    ):  # fmt: skip
        slot, place, inside = _block(expert_ptr, first_ptr, last_ptr, slots_ptr, experts, ROWS)
        if slot < 0:
            return
        row = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        token = tl.load(pairs_ptr + place, inside, other=0) // SLOTS
        x_ptr += token * K
        g = multiply(
            x_ptr, place, inside, gate, slot, row, N, K, BITS, GROUP, RANK, FACTOR_BITS, STEP, RANK_STEP
        )  # fmt: skip
        u = multiply(
            x_ptr, place, inside, up, slot, row, N, K, BITS, GROUP, RANK, FACTOR_BITS, STEP, RANK_STEP
        )  # fmt: skip
        h = g / (1.0 + tl.exp(-g)) * u
        tl.store(h_ptr + place[:, None] * N + row[None, :], h, inside[:, None] & (row < N)[None, :])

    @triton.jit
    def _down_kernel(
        h_ptr, parts_ptr, down, weights_ptr, pairs_ptr, expert_ptr, first_ptr, last_ptr, slots_ptr, experts,
        N: tl.constexpr, K: tl.constexpr,
        BITS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, FACTOR_BITS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
    ):  # fmt: skip
        slot, place, inside = _block(expert_ptr, first_ptr, last_ptr, slots_ptr, experts, ROWS)
        if slot < 0:
            return
        row = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        pair = tl.load(pairs_ptr + place, inside, other=0)
        weight = tl.load(weights_ptr + pair, inside, other=0.0).to(tl.float32)
        sums = multiply(
            h_ptr + place * K, place, inside, down, slot, row, N, K, BITS, GROUP, RANK, FACTOR_BITS, STEP, RANK_STEP
        )
        out = parts_ptr + pair[:, None] * N + row[None, :]
        tl.store(out, sums * weight[:, None], inside[:, None] & (row < N)[None, :])

    @triton.jit
    def _project_kernel(
        x_ptr, t_ptr, v_ptr, v_scale_ptr, pairs_ptr, expert_ptr, first_ptr, last_ptr, slots_ptr, experts,
        K: tl.constexpr, RANK: tl.constexpr, SLOTS: tl.constexpr, FACTOR_BITS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """t = x v^T by place."""
        slot, place, inside = _block(expert_ptr, first_ptr, last_ptr, slots_ptr, experts, ROWS)
        if slot < 0:
            return
        row = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        if SLOTS > 0:
            x_ptr += tl.load(pairs_ptr + place, inside, other=0) // SLOTS * K
        else:
            x_ptr += place * K
        t = tl.zeros([ROWS, COLUMNS], tl.float32)
        t = add_factor_product(t, x_ptr, inside, v_ptr, v_scale_ptr, slot, row, RANK, K, FACTOR_BITS, STEP)
        tl.store(t_ptr + place[:, None] * RANK + row[None, :], t, inside[:, None] & (row < RANK)[None, :])

    @triton.jit
    def _combine_kernel(
        parts_ptr, ids_ptr, y_ptr, experts, N: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """y[token] = the parts of its pairs that ran, added in float32 in the order of slots."""
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([COLUMNS], tl.float32)
        for slot in range(SLOTS):
            pair = token * SLOTS + slot
            expert = tl.load(ids_ptr + pair)
            ran = (expert >= 0) & (expert < experts) & (column < N)
            sums += tl.load(parts_ptr + pair * N + column, ran, other=0.0).to(tl.float32)
        tl.store(y_ptr + token * N + column, sums, column < N)
