# SPDX-License-Identifier: Apache-2.0
"""HQQ's iterations on a GPU in one pass: a block of groups stays in registers for all of them.

The torch version of `moepress.quantize.hqq` is the definition; it moves each float32 matrix through memory some twenty
times per iteration, this once in all. The arithmetic is the same, operation by operation (contraction to fused
multiply-adds is off); only the order of sums differs.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # builds of torch without CUDA come without Triton
    triton = None

GROUPS_PER_PROGRAM = 64


def why_not(groups: torch.Tensor) -> str | None:
    """None where the fused iterations can run, else the reason they cannot."""
    if triton is None:
        return "Triton is not installed"
    if not groups.is_cuda:
        return f"the weight is on {groups.device.type}, not on a CUDA device"
    return None


def iterate_fused(
    groups: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, top: int, iterations: int, beta: float, norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 groups [n, G, g], inverse and zero [n, G, 1] -> zeros [iterations + 1, n, G, 1] and |w - D| [iterations].

    `top` is the largest code. The errors are summed over all groups.
    """
    n, per_row, length = groups.shape
    count = n * per_row
    programs = triton.cdiv(count, GROUPS_PER_PROGRAM)
    zeros = torch.empty((iterations + 1, n, per_row, 1), dtype=torch.float32, device=groups.device)
    errors = torch.empty((iterations, programs), dtype=torch.float32, device=groups.device)
    zeros[0] = zero
    _iterate_kernel[(programs,)](
        groups, inverse.contiguous(), zeros, errors, count, per_row, groups.stride(0), groups.stride(1), length,
        float(top), 1 / beta, norm - 1, beta ** (-1 / (2 - norm)),
        ITERATIONS=iterations, BLOCK=GROUPS_PER_PROGRAM, WIDTH=triton.next_power_of_2(length),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return zeros, errors.sum(1, dtype=torch.float64)


if triton is not None:

    @triton.jit
    def _iterate_kernel(
        w_ptr, inverse_ptr, zeros_ptr, errors_ptr, count, per_row, row_stride, group_stride, length,
        top, inverse_beta, power, threshold,
        ITERATIONS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        group = program * BLOCK + tl.arange(0, BLOCK)
        column = tl.arange(0, WIDTH)
        real = group < count
        inside = real[:, None] & (column[None, :] < length)
        start = (group // per_row).to(tl.int64) * row_stride + (group % per_row).to(tl.int64) * group_stride
        w = tl.load(w_ptr + start[:, None] + column[None, :], mask=inside, other=0.0)
        inverse = tl.load(inverse_ptr + group, mask=real, other=1.0)
        zero = tl.load(zeros_ptr + group, mask=real, other=0.0)
        scaled = w * inverse[:, None]
        for i in range(ITERATIONS):
            code = libdevice.rint(scaled + zero[:, None])
            code = tl.minimum(tl.maximum(code, 0.0), top)
            residual = tl.where(inside, w - tl.div_rn(code - zero[:, None], inverse[:, None] + tl.zeros_like(w)), 0.0)
            size = tl.abs(residual)
            tl.store(errors_ptr + i * tl.num_programs(0) + program, tl.sum(size))
            # |x|^(p - 1) of the residuals above the threshold; 1 stands in for the others, which shrink to zero
            large = size > threshold
            shrunk = size - libdevice.pow(tl.where(large, size, 1.0), power) * inverse_beta
            moved = tl.where(large, tl.where(residual < 0, -shrunk, shrunk), 0.0)
            target = (w - moved) * inverse[:, None]
            zero = tl.sum(tl.where(inside, code - target, 0.0), axis=1) / length
            tl.store(zeros_ptr + (i + 1) * count + group, zero, mask=real)
