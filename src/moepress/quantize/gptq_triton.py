# SPDX-License-Identifier: Apache-2.0
"""GPTQ's two column loops on a GPU: a tile of rows stays in registers for all columns of a block.

The torch versions in `moepress.quantize.gptq` and `descent` are the definition. They launch some ten kernels a column,
and a model has hundreds of thousands of columns: with them a model of 106 M weights in matrices of 576 rows took 145 s
on an H200, with these 7 s.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # builds of torch without CUDA come without Triton
    triton = None

ROWS = 16
"""Rows a program holds: small, because a matrix of 576 rows must still fill the GPU."""


def why_not(weights: torch.Tensor) -> str | None:
    """None where the fused loops can run, else the reason they cannot."""
    if triton is None:
        return "Triton is not installed"
    if not weights.is_cuda:
        return f"the weight is on {weights.device.type}, not on a CUDA device"
    return None


def round_block(rest, upper, scale, zero, top, feed):  # type: ignore[no-untyped-def]
    """As `gptq.round_block`: [B, N, k] columns -> codes and errors [B, N, k]."""
    rest, upper, scale, zero = (each.contiguous() for each in (rest, upper, scale, zero))
    count, rows, width = rest.shape
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    _round_kernel[(triton.cdiv(rows, ROWS), count)](
        rest, upper, scale, zero, top, feed.float().contiguous(), codes, errors, rows, width,
        ROWS=ROWS, WIDTH=triton.next_power_of_2(width), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, errors


def descend_block(value, slope, own, scale, zero, top):  # type: ignore[no-untyped-def]
    """As `descent.descend_block`: [B, N, k] values and slopes -> codes and slopes [B, N, k]."""
    value, slope, own, scale, zero = (each.contiguous() for each in (value, slope, own, scale, zero))
    count, rows, width = value.shape
    codes, after = torch.empty_like(value), torch.empty_like(value)
    _descend_kernel[(triton.cdiv(rows, ROWS), count)](
        value, slope, own, scale, zero, top, codes, after, rows, width,
        ROWS=ROWS, WIDTH=triton.next_power_of_2(width), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, after


if triton is not None:

    @triton.jit
    def _round_kernel(
        rest_ptr, upper_ptr, scale_ptr, zero_ptr, top_ptr, feed_ptr, codes_ptr, errors_ptr, rows, width,
        ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        tile = batch * rows * width + row.to(tl.int64)[:, None] * width + column[None, :]
        rest = tl.load(rest_ptr + tile, inside, other=0.0)
        scale = tl.load(scale_ptr + tile, inside, other=1.0)
        zero = tl.load(zero_ptr + tile, inside, other=0.0)
        top, feed = tl.load(top_ptr + batch), tl.load(feed_ptr + batch)
        codes, errors = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for j in range(width):
            here = (column == j)[None, :]
            w = tl.sum(tl.where(here, rest, 0.0), 1)
            s = tl.sum(tl.where(here, scale, 0.0), 1)
            z = tl.sum(tl.where(here, zero, 0.0), 1)
            pivots = upper_ptr + batch * width * width + j * width
            code = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(w, s) + z), 0.0), top)
            error = tl.div_rn(w - (code - z) * s, tl.load(pivots + j))
            codes = tl.where(here, code[:, None], codes)
            errors = tl.where(here, error[:, None], errors)
            later = tl.load(pivots + column, (column < width) & (column > j), other=0.0)
            rest -= (error * feed)[:, None] * later[None, :]
        tl.store(codes_ptr + tile, codes, inside)
        tl.store(errors_ptr + tile, errors, inside)

    @triton.jit
    def _descend_kernel(
        value_ptr, slope_ptr, own_ptr, scale_ptr, zero_ptr, top_ptr, codes_ptr, after_ptr, rows, width,
        ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        tile = batch * rows * width + row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(value_ptr + tile, inside, other=0.0)
        slope = tl.load(slope_ptr + tile, inside, other=0.0)
        s = tl.load(scale_ptr + batch * rows + row, row < rows, other=1.0)
        z = tl.load(zero_ptr + batch * rows + row, row < rows, other=0.0)
        top = tl.load(top_ptr + batch)
        codes = tl.zeros([ROWS, WIDTH], tl.float32)
        for j in range(width):
            here = (column == j)[None, :]
            metric = own_ptr + batch * width * width + j * width
            now = tl.sum(tl.where(here, value, 0.0), 1)
            wanted = now - tl.div_rn(tl.sum(tl.where(here, slope, 0.0), 1), tl.load(metric + j))
            code = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(wanted, s) + z), 0.0), top)
            codes = tl.where(here, code[:, None], codes)
            # H is symmetric: its row j is its column j
            across = tl.load(metric + column, column < width, other=0.0)
            slope += ((code - z) * s - now)[:, None] * across[None, :]
        tl.store(codes_ptr + tile, codes, inside)
        tl.store(after_ptr + tile, slope, inside)
