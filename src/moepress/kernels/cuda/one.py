# SPDX-License-Identifier: Apache-2.0
"""Launches `gemv`: one token through a matrix, or through the experts that it chose."""

from __future__ import annotations

import torch

from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import RecordBank, structure
from moepress.kernels.cuda.functions import address, find_kernel, is_bf16, processors_of, shared_bytes_of

Mode = choose.Mode
_Gemv = structure(
    "_Gemv", "x y bias", "ids weights",
    "ids_wide weights_wide tokens slots num_experts n k records row_blocks stages",
)  # fmt: skip


def gemv(
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
    function, static = find_kernel(
        "gemv.cu", gemv_instance(mode, shape, x.dtype, blocks, processors_of(device)), device
    )
    rows = slots if mode == "DOWN" else 1
    stages = choose.gemv_stages(shape, rows, 1, shared_bytes_of(device) - static)
    if not stages:
        return False
    layout = shape.any
    arguments = _Gemv(
        x.data_ptr(), y.data_ptr(), address(bias), bank.argument, address(ids), address(weights),
        int(ids is not None and ids.dtype == torch.int64), int(weights is not None and weights.dtype == torch.float32),
        1, slots, len(bank.where), columns, x.shape[1], layout.records_per_row_block, shape.row_blocks, stages,
    )  # fmt: skip
    shared = choose.gemv_shared(shape, stages, rows, 1)
    function.launch(min(blocks, processors_of(device)), 32 * choose.WARPS, shared, (arguments,), programmatic=True)
    return True


def gemv_instance(mode: Mode, bank: choose.Bank, dtype: torch.dtype, blocks: int, processors: int) -> str:
    warps = choose.gemv_warps(blocks, processors)
    return f"gemv<{bank.template}, {is_bf16(dtype)}, 1, {mode}, {warps}, {choose.WARPS // warps}>"
