# SPDX-License-Identifier: Apache-2.0
"""y = x W^T (+ bias) for one compressed weight in Triton, straight from the stored parts (FORMAT.md, Stored tensors).

The fallback for GPUs that the CUDA kernels do not take: nothing is repacked, and memory is what the format stores. A
program multiplies some rows of x by some rows of W and walks their columns. It unpacks codes, dequantises in float32 as
the format says, rounds once to x's dtype and multiplies with sums in float32. A compensator is a product before,
t = x v^T, rounded to x's dtype, and t u^T added to the same sums. No sum depends on the order in which programs run:
results repeat bitwise.

What has no leading underscore also makes the kernels of experts.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from typing import NamedTuple

import torch

from moepress.format.spec import BITS, FACTOR_GROUP, WeightSpec
from moepress.format.weight import Parts
from moepress.kernels.banks import needs_operation, no_gradient

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without Triton
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)
"""Of the NVIDIA GPUs that Triton compiles for."""
RANK_STEP = 16
"""Columns of t u^T that are multiplied at once: the least that tensor cores take, because ranks are small."""


class Tile(NamedTuple):
    """What one program multiplies: rows of x, rows of W, and how many columns at once (a power of two, 32 or more)."""

    rows: int
    columns: int
    step: int
    warps: int


def why_not(device: torch.device, dtype: torch.dtype, bits: int) -> str | None:
    """None where the kernels can run on such inputs and codes of `bits` bits, else the reason they cannot."""
    if triton is None:
        return "Triton is not installed"
    if bits not in BITS:
        return f"Triton kernels know codes of {', '.join(map(str, BITS))} bits, not {bits}"
    if dtype not in DTYPES:
        return f"Triton kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not isinstance(_linear_kernel, triton.JITFunction):  # TRITON_INTERPRET=1: NumPy does the work, on any device
        return "Triton's interpreter does not know bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"Triton kernels need a GPU, and this layer is on {device.type}"
    if dtype == torch.float32:  # one accumulator for all columns: 10 times torch's error on an H200, K = 2048
        return "Triton kernels take bfloat16 and float16 on a GPU, and float32 in the interpreter alone"
    return _why_not_gpu(device)


@cache
def _why_not_gpu(device: torch.device) -> str | None:
    if not torch.version.hip and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        wanted, has = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, found))
        return f"Triton kernels need compute capability {wanted}, and {device} has {has}"
    if "CC" not in os.environ and not shutil.which("gcc") and not shutil.which("clang"):
        return "Triton needs a C compiler (gcc or clang) to launch kernels, and finds none"
    return None


def triton_linear(
    x: torch.Tensor,
    parts: Parts,
    spec: WeightSpec,
    out_features: int,
    in_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] in bf16, fp16 or fp32 -> [..., N] in that dtype; as `reference.compressed_linear`, without gradients.

    All is added in float32 and rounded once. An input that Triton cannot take is an error of Triton: ask `why_not`.
    """
    flat = x.reshape(-1, in_features).contiguous()
    if needs_operation():
        y = linear_op(flat, flatten(parts, spec, out_features, in_features), spec.tag, out_features, bias)
    else:
        y = _linear(flat, parts, spec, out_features, bias)
    return y.view(*x.shape[:-1], out_features)


def _linear(
    x: torch.Tensor, parts: Parts, spec: WeightSpec, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    rows, k = x.shape
    y = x.new_empty(rows, out_features)
    if not rows:
        return y
    tile = tile_for(rows, x.dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU, whichever it is
        t = _project(x, parts, spec, tile) if spec.rank else None
        _linear_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(out_features, tile.columns))](
            x, y, bias, (*base(parts), *factor(parts, spec, "u"), t), rows, N=out_features, K=k, **constants(spec, tile)
        )
    return y


def _project(x: torch.Tensor, parts: Parts, spec: WeightSpec, tile: Tile) -> torch.Tensor:
    """t = x v^T [M, R] in x's dtype."""
    rows, k = x.shape
    t, fixed = x.new_empty(rows, spec.rank), project_constants(spec, tile)
    _project_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(spec.rank, fixed["COLUMNS"]))](
        x, t, *factor(parts, spec, "v"), rows, K=k, **fixed
    )
    return t


@torch.library.custom_op("moepress::triton_linear", mutates_args=())
def linear_op(
    x: torch.Tensor, tensors: list[torch.Tensor], tag: str, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, K] -> [M, N]; `tensors` are the parts of the spec of that tag, in the order of `WeightSpec.parts`."""
    spec = spec_of(tag)
    return _linear(x, named(tensors, spec, out_features, x.shape[1]), spec, out_features, bias)


@linear_op.register_fake
def _(x, tensors, tag, out_features, bias):
    return x.new_empty(x.shape[0], out_features)


linear_op.register_autograd(no_gradient)


# ---------------------------------------------------------------------------------------------- what a launch needs

spec_of = cache(WeightSpec.parse)


def flatten(parts: Parts, spec: WeightSpec, out_features: int, in_features: int) -> list[torch.Tensor]:
    """The parts of a spec in the order of `WeightSpec.parts`."""
    return [parts[name] for name in spec.parts(out_features, in_features)]


def named(tensors: list[torch.Tensor], spec: WeightSpec, out_features: int, in_features: int) -> Parts:
    """The inverse of `flatten`."""
    return dict(zip(spec.parts(out_features, in_features), tensors, strict=True))


def tile_for(rows: float, dtype: torch.dtype) -> Tile:
    """The tile where `rows` rows of x meet a matrix, on average."""
    if dtype == torch.float32:  # twice the shared memory, and no tensor cores to feed
        return Tile(16 if rows <= 16 else 32, 32, 64, 4)
    if rows <= 16:
        # reading W is all the work: many programs, and few steps, because each waits for its codes
        return Tile(16, 16, 256, 4)
    if rows <= 32:
        return Tile(32, 32, 128, 4)
    return Tile(64, 64, 64, 4) if rows <= 64 else Tile(128, 64, 64, 8)


def constants(spec: WeightSpec, tile: Tile) -> dict[str, int]:
    """What of a spec and a tile is compiled into a kernel."""
    return {
        "BITS": spec.bits, "GROUP": spec.group_size, "RANK": spec.rank, "FACTOR_BITS": spec.factor_bits,
        "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.step, "RANK_STEP": RANK_STEP, "num_warps": tile.warps,
    }  # fmt: skip


def project_constants(spec: WeightSpec, tile: Tile) -> dict[str, int]:
    """The same for t = x v^T."""
    return {
        "RANK": spec.rank, "FACTOR_BITS": spec.factor_bits,
        "ROWS": tile.rows, "COLUMNS": 16 if spec.rank <= 16 else 32, "STEP": tile.step, "num_warps": tile.warps,
    }  # fmt: skip


def base(parts: Parts) -> tuple[torch.Tensor, ...]:
    """packed, scale and zero."""
    return tuple(parts[name].contiguous() for name in ("packed", "scale", "zero"))


def factor(parts: Parts, spec: WeightSpec, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Factor `name`, u or v: its values or codes, and their scales; None for what the spec does not have."""
    if not spec.rank:
        return None, None
    if spec.factor_bits == 16:
        return parts[name].contiguous(), None
    return parts[f"{name}_packed"].contiguous(), parts[f"{name}_scale"].contiguous()


# ---------------------------------------------------------------------------------------------- kernels

if triton is not None:
    _FACTOR_GROUP = tl.constexpr(FACTOR_GROUP)

    @triton.jit
    def codes(stream_ptr, index, inside, BITS: tl.constexpr):
        """Codes number `index` of a stream of BITS-bit codes, int32; anything where not `inside`.

        Only bytes that hold a bit of the code are read, and so none beyond the row that the code is in.
        """
        bit = index * BITS
        byte, shift = bit >> 3, (bit & 7).to(tl.int32)
        word = tl.load(stream_ptr + byte, inside, other=0).to(tl.int32)
        if 8 % BITS != 0:
            goes_on = inside & (shift > 8 - BITS)
            word |= tl.load(stream_ptr + byte + 1, goes_on, other=0).to(tl.int32) << 8
        return (word >> shift) & ((1 << BITS) - 1)

    @triton.jit
    def row_codes(packed_ptr, start, whole, K: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
        """Codes start to start + STEP - 1 of rows of K, int32 [STEP, rows]; anything beyond a row, which is not read.

        packed_ptr: pointers to rows, used where `whole`. Eight codes are one little-endian integer of BITS bytes, and
        `start` is a multiple of eight. Columns come first so that neighbouring threads read neighbouring bytes.
        """
        if BITS == 8:
            column = start + tl.arange(0, STEP)
            return codes(packed_ptr[None, :], column[:, None], (column < K)[:, None] & whole[None, :], BITS)
        word = tl.zeros([STEP // 8, packed_ptr.shape[0]], tl.int32 if BITS <= 4 else tl.int64)
        for i in tl.static_range(BITS):
            byte = (start // 8 + tl.arange(0, STEP // 8)) * BITS + i
            there = (byte < (K * BITS + 7) // 8)[:, None] & whole[None, :]
            word |= tl.load(packed_ptr[None, :] + byte[:, None], there, other=0).to(word.dtype) << (8 * i)
        # the mask also removes the sign bits that the shift brings in
        eight = (word[:, None, :] >> (tl.arange(0, 8) * BITS)[None, :, None]) & ((1 << BITS) - 1)
        return eight.to(tl.int32).reshape([STEP, packed_ptr.shape[0]])

    @triton.jit
    def product(
        x_ptr, inside, packed_ptr, scale_ptr, zero_ptr, slot, row, N: tl.constexpr, K: tl.constexpr,
        BITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """x W^T without the compensator, float32: one row for each of x_ptr, one column for each `row` of W.

        x_ptr: pointers to rows of K values, used where `inside`. W (N, K) is number `slot` of stacked ones. `row` and
        `slot` are int64.
        """
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        PIECE: tl.constexpr = min(STEP, GROUP)  # of one group
        whole, matrix_row = row < N, slot * N + row
        packed_ptr += matrix_row * ((K * BITS + 7) // 8)
        scale_ptr += matrix_row * GROUPS
        zero_ptr += matrix_row * GROUPS
        sums = tl.zeros([x_ptr.shape[0], row.shape[0]], tl.float32)
        for start in range(0, K, STEP):
            group = start // GROUP + tl.arange(0, STEP // PIECE)
            there = (group < GROUPS)[:, None] & whole[None, :]
            zero = tl.load(zero_ptr[None, :] + group[:, None], there, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr[None, :] + group[:, None], there, other=0.0).to(tl.float32)
            code = row_codes(packed_ptr, start, whole, K, BITS, STEP).to(tl.float32)
            pieces = code.reshape([STEP // PIECE, PIECE, row.shape[0]])
            weight = ((pieces - zero[:, None, :]) * scale[:, None, :]).reshape([STEP, row.shape[0]])
            column = start + tl.arange(0, STEP)
            weight = tl.where((column < K)[:, None], weight, 0.0)  # fp16 can overflow there, and 0 * inf is no 0
            x = tl.load(x_ptr[:, None] + column[None, :], inside[:, None] & (column < K)[None, :], other=0.0)
            sums = tl.dot(x, weight.to(x.dtype), sums, input_precision="ieee")
        return sums

    @triton.jit
    def add_factor_product(
        sums, x_ptr, inside, values_ptr, scale_ptr, slot, row, N: tl.constexpr, K: tl.constexpr,
        BITS: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """sums + x F^T for a factor F (N, K), which is v or u; otherwise as `product`.

        A factor is one stream from its first element to its last, with a scale for each 64 of them, so that its rows
        begin anywhere in a byte.
        """
        if BITS < 16:
            values_ptr += slot * ((N * K * BITS + 7) // 8)
            scale_ptr += slot * ((N * K + _FACTOR_GROUP - 1) // _FACTOR_GROUP)
        else:
            values_ptr += slot * (N * K)
        for start in range(0, K, STEP):
            column = start + tl.arange(0, STEP)
            real = (column < K)[:, None] & (row < N)[None, :]
            index = row[None, :] * K + column[:, None]
            if BITS < 16:
                code = codes(values_ptr, index, real, BITS) - (1 << (BITS - 1))
                scale = tl.load(scale_ptr + index // _FACTOR_GROUP, real, other=0.0).to(tl.float32)
                value = tl.where(real, code.to(tl.float32) * scale, 0.0)
            else:
                value = tl.load(values_ptr + index, real, other=0.0).to(tl.float32)
            x = tl.load(x_ptr[:, None] + column[None, :], inside[:, None] & (column < K)[None, :], other=0.0)
            sums = tl.dot(x, value.to(x.dtype), sums, input_precision="ieee")
        return sums

    @triton.jit
    def multiply(
        x_ptr, place, inside, matrix, slot, row, N: tl.constexpr, K: tl.constexpr,
        BITS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, FACTOR_BITS: tl.constexpr,
        STEP: tl.constexpr, RANK_STEP: tl.constexpr,
    ):  # fmt: skip
        """`product` with the compensator. `matrix` is (packed, scale, zero, u, u_scale, t); t has x v^T by `place`."""
        sums = product(x_ptr, inside, matrix[0], matrix[1], matrix[2], slot, row, N, K, BITS, GROUP, STEP)
        if RANK > 0:
            t_ptr = matrix[5] + place * RANK
            sums = add_factor_product(
                sums, t_ptr, inside, matrix[3], matrix[4], slot, row, N, RANK, FACTOR_BITS, RANK_STEP
            )  # fmt: skip
        return sums

    @triton.jit
    def _linear_kernel(
        x_ptr, y_ptr, bias_ptr, matrix, rows, N: tl.constexpr, K: tl.constexpr,
        BITS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, FACTOR_BITS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = place < rows
        sums = multiply(
            x_ptr + place * K, place, inside, matrix, 0, row, N, K, BITS, GROUP, RANK, FACTOR_BITS, STEP, RANK_STEP
        )
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + row, row < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + place[:, None] * N + row[None, :], sums, inside[:, None] & (row < N)[None, :])

    @triton.jit
    def _project_kernel(
        x_ptr, t_ptr, v_ptr, v_scale_ptr, rows, K: tl.constexpr, RANK: tl.constexpr, FACTOR_BITS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = place < rows
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        sums = add_factor_product(
            sums, x_ptr + place * K, inside, v_ptr, v_scale_ptr, 0, row, RANK, K, FACTOR_BITS, STEP
        )  # fmt: skip
        tl.store(t_ptr + place[:, None] * RANK + row[None, :], sums, inside[:, None] & (row < RANK)[None, :])
