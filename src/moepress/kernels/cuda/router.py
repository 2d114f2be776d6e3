# SPDX-License-Identifier: Apache-2.0
"""Launches `route`: a router, with a learned selector or without, for few tokens."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch

from moepress.kernels.cuda.bank import structure
from moepress.kernels.cuda.compiler import Request, Warmed
from moepress.kernels.cuda.compiler import warm as compile_all
from moepress.kernels.cuda.functions import find_function, is_bf16
from moepress.kernels.cuda.launch import architecture
from moepress.kernels.router.cuda import Selection
from moepress.kernels.router.reference import Routed, Routing

_Arguments = structure(
    "_Arguments", "x weight logits ids weights projection sensitivity offset power dial", "",
    "weights_wide renormalises rescales each tokens slots num_experts columns blocks shares inverse run",
    "scaling",
)  # fmt: skip
SOURCE = "router.cu"
CLUSTER, WARPS, SELECTOR_WARPS, TOKENS = 8, 16, 4, 8
"""Thread blocks of a cluster, warps of a thread block, a selector's warps besides, and tokens of a cluster at most."""
SHARED_BYTES = 227 * 1024 - 1024 - 32
"""Dynamic shared memory of a thread block at most: less what the system has, and the kernel's own."""
_ROWS, _SPAN = 16, 32
"""Experts and columns of a warp's step."""


class Kind(NamedTuple):
    """What decides which instance a layer needs; `projections` are the selector's, 0 without."""

    experts: int
    projections: int
    float32_logits: bool


class Shape(NamedTuple):
    """How the work of one launch is shared: the last arguments of the kernel, and its dynamic shared memory."""

    each: int
    """Tokens of a cluster."""
    blocks: int
    """Of 16 experts."""
    shares: int
    """Parts of the columns that a thread block has, one for a warp."""
    run: int
    """Spans of columns of a part."""
    shared_bytes: int


@cache
def shape_of(tokens: int, columns: int, experts: int, projections: int) -> Shape:
    blocks = -(-experts // _ROWS)
    shares = max(WARPS // blocks, 1)
    floats = CLUSTER * 32 * _per_lane(experts) + shares * blocks * _ROWS  # of a token
    table = 0
    if projections:
        features = projections + 1
        floats += (CLUSTER + SELECTOR_WARPS // -(-projections // 8)) * features + experts + 2
        table = experts * features
    each = min(tokens, TOKENS, (SHARED_BYTES // 4 - table) // floats)  # 7 with 512 experts and 32 projections
    run = -(-columns // (_SPAN * CLUSTER * shares))
    return Shape(each, blocks, shares, run, 4 * (each * floats + table))


def launch_route(x: torch.Tensor, weight: torch.Tensor, routing: Routing, selection: Selection | None) -> Routed:
    """x [T, H], weight [E, H] in the same of bf16 and fp16, T from 1 on -> logits, weights and ids of the router."""
    (tokens, columns), experts = x.shape, len(weight)
    kind, _ = needed(weight, routing, selection)
    shape = shape_of(tokens, columns, experts, kind.projections)
    logits = x.new_empty(tokens, experts, dtype=torch.float32 if routing.float32_logits else x.dtype)
    weights = x.new_empty(
        tokens, routing.top_k, dtype=torch.float32 if routing.float32_weights or routing.float32_logits else x.dtype
    )
    ids = torch.empty(tokens, routing.top_k, dtype=torch.int64, device=x.device)
    selector: tuple[Any, ...] = (None,) * 5
    if selection is not None:
        selector = tuple(tensor.data_ptr() for tensor in (*selection.costs, selection.dial))
    arguments = _Arguments(
        *(tensor.data_ptr() for tensor in (x, weight, logits, ids, weights)), *selector,
        int(weights.dtype == torch.float32), int(routing.renormalises),
        int(selection is not None and selection.renormalises), shape.each, tokens, routing.top_k, experts, columns,
        shape.blocks, shape.shares, (1 << 16) // shape.blocks + 1, shape.run, routing.scaling,
    )  # fmt: skip
    function = find_function(SOURCE, route_instance(x.dtype, kind), x.device.index)
    clusters = -(-tokens // shape.each)
    warps = WARPS + (SELECTOR_WARPS if kind.projections else 0)
    function.launch(
        CLUSTER * clusters, 32 * warps, shape.shared_bytes, (arguments,), cluster=CLUSTER, programmatic=True
    )
    return logits, weights, ids


def route_instance(dtype: torch.dtype, kind: Kind) -> str:
    wide = "true" if kind.float32_logits else "false"
    return f"route<{is_bf16(dtype)}, {wide}, {_per_lane(kind.experts)}, {kind.projections}, {CLUSTER}>"


def needed(weight: torch.Tensor, routing: Routing, selection: Selection | None) -> tuple[Kind, torch.device]:
    """What `warm` takes, of the arguments of a launch."""
    projections = 0 if selection is None else len(selection.costs.projection)
    return Kind(len(weight), projections, routing.float32_logits), weight.device


def warm(dtype: torch.dtype, kinds: Iterable[tuple[Kind, torch.device]]) -> Warmed:
    """Compiles what routers can need for any number of tokens; of each, what it is, and where."""
    return compile_all(Request(SOURCE, route_instance(dtype, kind), architecture(device)) for kind, device in kinds)


def _per_lane(experts: int) -> int:
    """Experts of a lane, a power of two."""
    return 1 << (-(-experts // 32) - 1).bit_length()
