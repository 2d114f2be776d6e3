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
from typing import Any, NamedTuple

import torch

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts
from moepress.kernels.banks import needs_operation, no_gradient
from moepress.kernels.linear import triton as dense
from moepress.kernels.linear.triton import constants, factor, named, rank_columns, spec_of, tile
from moepress.kernels.problem import SILU

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without Triton
    triton = None
else:
    from moepress.kernels.linear.triton import add_factor_product, product

MAX_PAIRS = 1 << 16
"""More are run in turns, which bounds the memory of h and parts."""
FEW_TOKENS = 4
"""Up to here pairs are not sorted: each is a block, and the few that share an expert find it in the cache."""
COMBINED = 512
"""Channels that a program of the last kernel adds up."""


class Bucket(NamedTuple):
    """Weights of one spec: its stored parts with a leading dimension, as `StoredParts` has them."""

    spec: WeightSpec
    parts: Parts


class Blocks(NamedTuple):
    """Which pairs run together. Block b has the places first[b] to last[b] - 1, all of expert[b].

    A block whose expert is not in 0..E-1, or that has no places, runs nothing.
    """

    pairs: torch.Tensor
    """[P]: place -> pair."""
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
    """Expert -> (number of its bucket, slot), as `Projection.places()` gives it, as int32 [buckets, E].

    -1 where the bucket does not have the expert. Made once: building it takes a transfer to the device.
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
    """x [T, H] in bf16, fp16 or fp32, ids and weights [T, k] -> [T, H] in x's dtype, without gradients.

    `gate` and `up` have the same specs; *_slots are `slot_table`s of the buckets before them. Ids outside 0..E-1 run
    nothing. Weights are used in their own dtype, integer or float ids as they are.
    """
    tensors, tags = [], []
    for buckets in (gate, up, down):
        tensors.append([part for bucket in buckets for part in bucket.parts.values()])
        tags.append(",".join(bucket.spec.tag for bucket in buckets))
    assert tags[0] == tags[1], f"gate has the buckets {tags[0]}, up {tags[1]}"
    run = experts_op if needs_operation() else _experts
    return run(
        x.contiguous(), expert_ids.contiguous(), expert_weights.contiguous(), *tensors, gate_up_slots, down_slots,
        tags[0], tags[2], intermediate,
    )  # fmt: skip
