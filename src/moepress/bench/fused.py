# SPDX-License-Identifier: Apache-2.0
"""The two small steps of a layer of experts that matrix libraries leave out: silu(gate) * up, and the weighted sum.

One Triton kernel each, so that a peer is not charged for a chain of elementwise launches; plain torch on the CPU.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without Triton
    triton = None

_BLOCK = 1024


def silu_mul(h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """h [M, 2I], gates first -> silu(gate) * up in `out` [M, I]; float32 inside."""
    inner = out.shape[1]
    if not h.is_cuda:
        gate, up = h.float().chunk(2, dim=1)
        return out.copy_(torch.nn.functional.silu(gate) * up)
    _silu_mul_kernel[(len(h), triton.cdiv(inner, _BLOCK))](h, out, inner, BLOCK=_BLOCK)
    return out


def weighted_sum(rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[t] = sum_j weights[t, j] * rows[position[t, j]]: rows [M, H], position int64 and weights float32 [T, k],
    out [T, H]; float32 inside, j in order."""
    if not rows.is_cuda:
        return out.copy_((rows.float()[position] * weights.unsqueeze(2)).sum(1))
    tokens, choices = position.shape
    width = rows.shape[1]
    grid = (tokens, triton.cdiv(width, _BLOCK))
    _weighted_sum_kernel[grid](rows, position, weights, out, width, CHOICES=choices, BLOCK=_BLOCK)
    return out


if triton is not None:

    @triton.jit
    def _silu_mul_kernel(h_ptr, out_ptr, inner, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < inner
        gate = tl.load(h_ptr + row * 2 * inner + column, inside, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + row * 2 * inner + inner + column, inside, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up
        tl.store(out_ptr + row * inner + column, value.to(out_ptr.dtype.element_ty), inside)

    @triton.jit
    def _weighted_sum_kernel(
        rows_ptr, position_ptr, weight_ptr, out_ptr, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(CHOICES):
            row = tl.load(position_ptr + token * CHOICES + j)
            weight = tl.load(weight_ptr + token * CHOICES + j)
            total += weight * tl.load(rows_ptr + row * width + column, inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), inside)
