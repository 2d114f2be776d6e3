# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' front: dense layers and whole layers of experts whose weights are in records.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.

    one token     gemv<GATE_UP> -> gemv<DOWN>                                                                 one.py
    more          sort_pairs -> prepare_rows -> grouped<GATE_UP> (-> prepare_rows) -> grouped<DOWN> -> combine   many.py

Every launch is programmatic: a kernel starts while the one before it ends, fetches weights, and waits for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import RecordBank
from moepress.kernels.cuda.compiler import Request, Warmed
from moepress.kernels.cuda.compiler import warm as compile_all
from moepress.kernels.cuda.functions import is_bf16, processors_of
from moepress.kernels.cuda.launch import architecture
from moepress.kernels.cuda.many import find_tile, grouped, grouped_instance, prepare, run_many
from moepress.kernels.cuda.one import gemv, gemv_instance
from moepress.kernels.records import RecordLayout

MAX_EXPERTS, MAX_SLOTS = 512, 32
MAX_PAIRS = 1 << 16
"""Pairs that one block sorts in its shared memory; more tokens are run in turns."""
DTYPES = (torch.bfloat16, torch.float16)


def why_not_linear(device: torch.device, dtype: torch.dtype, layout: RecordLayout) -> str | None:
    """None where `linear` can run, else the reason it cannot."""
    if device.type != "cuda":
        return f"CUDA kernels need a CUDA device, and this layer is on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"CUDA kernels are for compute capability 9.0, and {device} has {'.'.join(map(str, capability))}"
    if dtype not in DTYPES:
        return f"CUDA kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if layout.columns % 8:
        return f"CUDA kernels need in_features that are a multiple of 8, not {layout.columns}"
    return None


def why_not_experts(
    device: torch.device,
    dtype: torch.dtype,
    gate_up: Sequence[RecordLayout],
    down: Sequence[RecordLayout],
    top_k: int,
    activation: str,
) -> str | None:
    """None where `experts` can run, else the reason it cannot."""
    for layout in (*gate_up, *down):
        if reason := why_not_linear(device, dtype, layout):
            return reason
    if activation != "silu":
        return f"CUDA kernels of experts know the activation silu, not {activation}"
    if top_k > MAX_SLOTS:
        return f"CUDA kernels of experts take at most {MAX_SLOTS} experts a token, not {top_k}"
    return None


def linear(x: torch.Tensor, bank: RecordBank, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    """x [M, K], bf16 or fp16, contiguous -> x W^T (+ bias) [M, N] in x's dtype, accumulated in float32."""
    y = x.new_empty(len(x), out_features)
    if len(x) == 1 and gemv("DENSE", x, y, bank, out_features, bias=bias):
        return y
    columns = bank.layouts[0].padded_columns
    if columns != x.shape[1]:
        x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    tile, stages = find_tile(x, bank, "DENSE", choose.dense_tiles(bank.shape, len(x), processors_of(x.device.index)))
    sums = prepare(x, bank, len(x)) if tile.scales_after else None
    grouped("DENSE", tile, stages, x, sums, y, bank, out_features, len(x), bias=bias)
    return y


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: RecordBank,
    down: RecordBank,
    intermediate: int,
) -> torch.Tensor:
    """x [T, H], ids [T, k] (int64 or int32), weights [T, k] (float32 or x's dtype) -> [T, H] in x's dtype.

    Ids outside 0..E-1 run nothing. Each expert's result is rounded to x's dtype once and added in float32 (for one
    token it is not rounded). KernelError for more than 512 experts.
    """
    if (count := len(gate_up.where)) > MAX_EXPERTS:
        raise KernelError(f"CUDA kernels of experts take at most {MAX_EXPERTS} experts a layer, not {count}")
    y = torch.empty_like(x)
    if len(x) == 1:
        h = x.new_empty(ids.shape[1], intermediate)
        slots = {"ids": ids, "slots": ids.shape[1]}
        if gemv("GATE_UP", x, h, gate_up, intermediate, **slots):
            if not gemv("DOWN", h, y, down, x.shape[1], weights=weights, **slots):
                run_many(x, ids, weights, gate_up, down, intermediate, y)
            return y
    step = MAX_PAIRS // ids.shape[1]
    for at in range(0, len(x), step):
        part = slice(at, at + step)
        run_many(x[part], ids[part], weights[part], gate_up, down, intermediate, y[part])
    return y


def warm(
    linears: Sequence[Sequence[RecordLayout]],
    banks: Sequence[tuple[Sequence[RecordLayout], Sequence[RecordLayout], int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Warmed:
    """Compiles, in parallel, all that these layers can need for any number of tokens; loads nothing.

    `linears` are layouts of dense layers, `banks` those of gate and up, of down, and the experts a token.
    """
    arch, processors = architecture(device), processors_of(device.index)
    requests = set()
    for layouts in linears:
        requests |= set(_instances("DENSE", choose.Bank(tuple(layouts)), dtype, 1, processors))
    for gate_up, down, slots in banks:
        requests |= set(_instances("GATE_UP", choose.Bank(tuple(gate_up)), dtype, slots, processors))
        requests |= set(_instances("DOWN", choose.Bank(tuple(down)), dtype, slots, processors))
        requests |= {("route.cu", "sort_pairs"), ("route.cu", f"combine<{is_bf16(dtype)}>")}
    return compile_all(Request(source, instance, arch) for source, instance in sorted(requests))


def _instances(
    mode: choose.Mode, bank: choose.Bank, dtype: torch.dtype, slots: int, processors: int
) -> Iterator[tuple[str, str]]:
    blocks = bank.row_blocks * (slots if mode == "GATE_UP" else 1)
    yield "gemv.cu", gemv_instance(mode, bank, dtype, blocks, processors)
    yield "route.cu", f"prepare_rows<{bank.uniform_bits}, {bank.any.group_size}, {is_bf16(dtype)}>"
    for tokens in (2, 16, 64, 1024):
        dense = mode == "DENSE"
        tiles = choose.dense_tiles(bank, tokens, processors) if dense else choose.expert_tiles(bank, tokens)
        yield "grouped.cu", grouped_instance(mode, bank, dtype, tiles[0])


__all__ = ["RecordBank", "experts", "linear", "warm", "why_not_experts", "why_not_linear"]
