# SPDX-License-Identifier: Apache-2.0
"""Launches the CUDA kernels: dense layers and whole layers of experts whose weights are in records.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.

    one token     gemv<GATE_UP> -> gemv<DOWN>
    more          sort_pairs -> prepare_rows -> grouped<GATE_UP> (-> prepare_rows) -> grouped<DOWN> -> combine

Every launch is programmatic: a kernel starts while the one before it ends, fetches weights, and waits for the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Literal

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.compiler import Request, Warmed, compile_kernel
from moepress.kernels.cuda.compiler import warm as compile_all
from moepress.kernels.cuda.launch import Function, architecture
from moepress.kernels.cuda.tensor_map import TensorMap, map_rows, map_sums
from moepress.kernels.records import RecordLayout

Mode = Literal["DENSE", "GATE_UP", "DOWN"]
MAX_EXPERTS, MAX_SLOTS = 512, 32
MAX_PAIRS = 1 << 16
"""Pairs that one block sorts in its shared memory; more tokens are run in turns."""
DTYPES = (torch.bfloat16, torch.float16)


class _Bank(ctypes.Structure):
    """Where a kernel finds its matrices: a table of addresses, or a first one and the way to the next."""

    _fields_ = (
        ("experts", ctypes.c_void_p), ("first", ctypes.c_void_p), ("word_bits", ctypes.c_int),
        ("centre", ctypes.c_int), ("stride", ctypes.c_uint64),
    )  # fmt: skip


def _structure(name: str, before: str, after: str, numbers: str) -> Any:
    """A struct of pointers, a bank, pointers and ints, as the kernels' `Arguments` are."""
    fields: list[tuple[str, Any]] = [(each, ctypes.c_void_p) for each in before.split()]
    fields += [("bank", _Bank)] if after else []
    fields += [(each, ctypes.c_void_p) for each in after.split()] + [(each, ctypes.c_int) for each in numbers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Gemv = _structure(
    "_Gemv", "x y bias", "ids weights",
    "ids_wide weights_wide tokens slots num_experts n k records row_blocks stages",
)  # fmt: skip
_Grouped = _structure(
    "_Grouped", "y bias", "first pairs weights",
    "weights_wide tokens slots num_experts n ld records row_blocks stages",
)  # fmt: skip
_Sort = _structure("_Sort", "ids first sorted", "", "ids_wide count num_experts")
_Prepare = _structure("_Prepare", "x sorted sums pairs count", "", "rows k slots units record_units sum_floats")
_Combine = _structure("_Combine", "parts y ids", "", "ids_wide slots num_experts n tokens")


@dataclass(frozen=True)
class RecordBank:
    """E matrices [rows, columns] of one group size in records on one CUDA device; their widths may differ."""

    records: tuple[torch.Tensor, ...]
    """For each width, uint8 [count, *layout.shape]."""
    layouts: tuple[RecordLayout, ...]
    where: tuple[tuple[int, int], ...]
    """Expert -> (which of `records`, slot)."""
    table: torch.Tensor
    """int64 [E, 2] on the device: address; word bits and, 32 bits up, the middle code."""

    @classmethod
    def build(
        cls, records: Sequence[torch.Tensor], layouts: Sequence[RecordLayout], where: Sequence[tuple[int, int]]
    ) -> RecordBank:
        """The bank with its table. The records must be complete and stay where they are.

        Waits for the device: a kernel asks for its first records before the work ahead of it on the stream has ended.
        """
        rows = [
            (records[which][slot].data_ptr(), layouts[which].word_bits | _centre(layouts[which]) << 32)
            for which, slot in where
        ]
        table = torch.tensor(rows, dtype=torch.int64).to(records[0].device)
        torch.cuda.synchronize(records[0].device)
        return cls(tuple(records), tuple(layouts), tuple(where), table)

    @cached_property
    def shape(self) -> choose.Bank:
        return choose.Bank(self.layouts)

    @cached_property
    def argument(self) -> _Bank:
        """Uniform banks need no table: one load less before the first record is asked for."""
        if len(self.records) == 1 and all(slot == expert for expert, (_, slot) in enumerate(self.where)):
            first, layout = self.records[0], self.layouts[0]
            return _Bank(None, first.data_ptr(), layout.word_bits, _centre(layout), first[0].numel())
        return _Bank(self.table.data_ptr(), None, 0, 0, 0)


def _centre(layout: RecordLayout) -> int:
    """The middle code, which kernels take off before they scale: what is left of the zero rounds the better."""
    return 1 << (layout.bits - 1) if layout.bits > 1 else 0


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
    if len(x) == 1 and _gemv("DENSE", x, y, bank, out_features, bias=bias):
        return y
    columns = bank.layouts[0].padded_columns
    if columns != x.shape[1]:
        x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    tile, stages = _tile(x, bank, "DENSE", choose.dense_tiles(bank.shape, len(x), _processors(x.device.index)))
    sums = _prepare(x, bank, len(x)) if tile.scales_after else None
    _grouped("DENSE", tile, stages, x, sums, y, bank, out_features, len(x), bias=bias)
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
        if _gemv("GATE_UP", x, h, gate_up, intermediate, **slots):
            if not _gemv("DOWN", h, y, down, x.shape[1], weights=weights, **slots):
                _many(x, ids, weights, gate_up, down, intermediate, y)
            return y
    step = MAX_PAIRS // ids.shape[1]
    for at in range(0, len(x), step):
        part = slice(at, at + step)
        _many(x[part], ids[part], weights[part], gate_up, down, intermediate, y[part])
    return y


def _many(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: RecordBank,
    down: RecordBank,
    intermediate: int,
    y: torch.Tensor,
) -> None:
    """The sorted path, for any number of tokens."""
    tokens, slots, count = len(x), ids.shape[1], len(gate_up.where)
    pairs = tokens * slots
    first, order = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (count + 1, pairs))
    wide = int(ids.dtype == torch.int64)
    sort = _Sort(ids.data_ptr(), first.data_ptr(), order.data_ptr(), wide, pairs, count)
    _function("route.cu", "sort_pairs", x.device.index).launch(
        1, 1024, 132 * count + 2 * pairs, (sort,), programmatic=True
    )

    routed = {"first": first, "pairs": order, "slots": slots}
    tile, stages = _tile(x, gate_up, "GATE_UP", choose.expert_tiles(gate_up.shape, pairs / count))
    x_sorted = x.new_empty(pairs, gate_up.layouts[0].padded_columns)
    sums = _prepare(x, gate_up, pairs, x_sorted, wants_sums=tile.scales_after, **routed)
    columns = down.layouts[0].padded_columns
    # padding of h meets real scales and zeros in the short last group: it has to be zeros
    h = x.new_zeros(pairs, columns) if columns != intermediate else x.new_empty(pairs, columns)
    _grouped("GATE_UP", tile, stages, x_sorted, sums, h, gate_up, intermediate, tokens, **routed)

    tile, stages = _tile(x, down, "DOWN", choose.expert_tiles(down.shape, pairs / count))
    sums = _prepare(h, down, pairs, count=first[count:]) if tile.scales_after else None
    parts = x.new_empty(pairs, x.shape[1])
    _grouped("DOWN", tile, stages, h, sums, parts, down, x.shape[1], tokens, weights=weights, **routed)
    combine = _Combine(parts.data_ptr(), y.data_ptr(), ids.data_ptr(), wide, slots, count, x.shape[1], tokens)
    blocks = -(-tokens * x.shape[1] // (8 * 256))
    _function("route.cu", f"combine<{_is_bf16(x)}>", x.device.index).launch(
        min(8 * _processors(x.device.index), blocks), 256, 0, (combine,), programmatic=True
    )


def _gemv(
    mode: Mode,
    x: torch.Tensor,
    y: torch.Tensor,
    bank: RecordBank,
    columns: int,
    *,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    slots: int = 1,
) -> bool:
    """One token through `gemv`; False, and nothing launched, where its inputs do not fit into shared memory."""
    device, shape = x.device.index, bank.shape
    blocks = shape.row_blocks * (slots if mode == "GATE_UP" else 1)
    function, static = _kernel("gemv.cu", _gemv_instance(mode, shape, x.dtype, blocks, _processors(device)), device)
    rows = slots if mode == "DOWN" else 1
    stages = choose.gemv_stages(shape, rows, 1, _shared(device) - static)
    if not stages:
        return False
    layout = shape.any
    arguments = _Gemv(
        x.data_ptr(), y.data_ptr(), _address(bias), bank.argument, _address(ids), _address(weights),
        int(ids is not None and ids.dtype == torch.int64), int(weights is not None and weights.dtype == torch.float32),
        1, slots, len(bank.where), columns, x.shape[1], layout.records_per_row_block, shape.row_blocks, stages,
    )  # fmt: skip
    shared = choose.gemv_shared(shape, stages, rows, 1)
    function.launch(min(blocks, _processors(device)), 32 * choose.WARPS, shared, (arguments,), programmatic=True)
    return True


def _grouped(
    mode: Mode,
    tile: choose.Tile,
    stages: int,
    x: torch.Tensor,
    sums: torch.Tensor | None,
    y: torch.Tensor,
    bank: RecordBank,
    columns: int,
    tokens: int,
    *,
    bias: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    slots: int = 1,
) -> None:
    device, shape, layout = x.device.index, bank.shape, bank.shape.any
    function, _ = _kernel("grouped.cu", _grouped_instance(mode, shape, x.dtype, tile), device)
    arguments = _Grouped(
        y.data_ptr(), _address(bias), bank.argument, _address(first), _address(pairs), _address(weights),
        int(weights is not None and weights.dtype == torch.float32), tokens, slots, len(bank.where), columns,
        y.shape[1], layout.records_per_row_block, shape.row_blocks, stages,
    )  # fmt: skip
    x_map = map_rows(x, tile.tokens, tile.column_groups * layout.units)
    sums_map = x_map if sums is None else map_sums(sums, tile.tokens, tile.column_groups)
    shared = stages * tile.stage_bytes(shape) + choose.RESERVED
    function.launch(
        tile.blocks * _processors(device), tile.threads, shared, (arguments, x_map, sums_map), programmatic=True
    )


def _prepare(
    x: torch.Tensor,
    bank: RecordBank,
    rows: int,
    x_sorted: torch.Tensor | None = None,
    *,
    wants_sums: bool = True,
    first: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    slots: int = 1,
) -> torch.Tensor | None:
    """Sorts rows into `x_sorted` and returns the sums of their segments [records, rows, floats], each where asked."""
    shape, layout = bank.shape, bank.shape.any
    records, floats = layout.records_per_row_block, shape.record_sums
    # copies take whole tiles of rows, also beyond the last one
    sums = torch.empty((records, rows, floats), dtype=torch.float32, device=x.device) if wants_sums else None
    count = first[len(bank.where) :] if first is not None else count
    units = records * layout.units
    arguments = _Prepare(
        x.data_ptr(), _address(x_sorted), _address(sums), _address(pairs), _address(count),
        rows, x.shape[1], slots, units, layout.units, floats,
    )  # fmt: skip
    instance = f"prepare_rows<{shape.uniform_bits}, {layout.group_size}, {_is_bf16(x)}>"
    blocks = min(8 * _processors(x.device.index), -(-rows * units * 8 // 256))
    _function("route.cu", instance, x.device.index).launch(blocks, 256, 0, (arguments,), programmatic=True)
    return sums


def _tile(x: torch.Tensor, bank: RecordBank, mode: Mode, tiles: Sequence[choose.Tile]) -> tuple[choose.Tile, int]:
    """The first tile whose ring of two stages or more fits beside the kernel's own shared memory."""
    device = x.device.index
    for tile in tiles:
        _, static = _kernel("grouped.cu", _grouped_instance(mode, bank.shape, x.dtype, tile), device)
        if (stages := tile.stages(bank.shape, _shared(device) // tile.blocks - static)) >= 2:
            return tile, stages
    raise KernelError(f"no tile of {bank.shape.any} fits into {_shared(device)} bytes of shared memory")


def warm(
    linears: Sequence[Sequence[RecordLayout]],
    banks: Sequence[tuple[Sequence[RecordLayout], Sequence[RecordLayout], int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Warmed:
    """Compiles, in parallel, all that these layers can need for any number of tokens; loads nothing.

    `linears` are layouts of dense layers, `banks` those of gate and up, of down, and the experts a token.
    """
    arch, processors = architecture(device), _processors(device.index)
    requests = set()
    for layouts in linears:
        requests |= set(_instances("DENSE", choose.Bank(tuple(layouts)), dtype, 1, processors))
    for gate_up, down, slots in banks:
        requests |= set(_instances("GATE_UP", choose.Bank(tuple(gate_up)), dtype, slots, processors))
        requests |= set(_instances("DOWN", choose.Bank(tuple(down)), dtype, slots, processors))
        requests |= {("route.cu", "sort_pairs"), ("route.cu", f"combine<{_is_bf16(dtype)}>")}
    return compile_all(Request(source, instance, arch) for source, instance in sorted(requests))


def _instances(
    mode: Mode, bank: choose.Bank, dtype: torch.dtype, slots: int, processors: int
) -> Iterator[tuple[str, str]]:
    blocks = bank.row_blocks * (slots if mode == "GATE_UP" else 1)
    yield "gemv.cu", _gemv_instance(mode, bank, dtype, blocks, processors)
    yield "route.cu", f"prepare_rows<{bank.uniform_bits}, {bank.any.group_size}, {_is_bf16(dtype)}>"
    for tokens in (2, 16, 64, 1024):
        dense = mode == "DENSE"
        tiles = choose.dense_tiles(bank, tokens, processors) if dense else choose.expert_tiles(bank, tokens)
        yield "grouped.cu", _grouped_instance(mode, bank, dtype, tiles[0])


def _gemv_instance(mode: Mode, bank: choose.Bank, dtype: torch.dtype, blocks: int, processors: int) -> str:
    warps = choose.gemv_warps(blocks, processors)
    return f"gemv<{bank.template}, {_is_bf16(dtype)}, 1, {mode}, {warps}, {choose.WARPS // warps}>"


def _grouped_instance(mode: Mode, bank: choose.Bank, dtype: torch.dtype, tile: choose.Tile) -> str:
    return f"grouped<{bank.template}, {_is_bf16(dtype)}, {tile.tokens}, {mode}, {tile.template}>"


@cache
def _kernel(source: str, instance: str, device: int) -> tuple[Function, int]:
    """The kernel and its static shared bytes."""
    function = _function(source, instance, device)
    return function, function.attributes().shared_bytes


@cache
def _function(source: str, instance: str, device: int) -> Function:
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"{instance} is needed for the first time while a CUDA graph is captured, which cannot load it; run the "
            "model once before, with as many tokens"
        )
    return Function(compile_kernel(source, instance, architecture(device)), device)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache(maxsize=8)
def _bf16(dtype: torch.dtype) -> str:
    return "true" if dtype == torch.bfloat16 else "false"


def _is_bf16(x: torch.Tensor | torch.dtype) -> str:
    return _bf16(x.dtype if isinstance(x, torch.Tensor) else x)


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


__all__ = ["RecordBank", "TensorMap", "experts", "linear", "warm", "why_not_experts", "why_not_linear"]
