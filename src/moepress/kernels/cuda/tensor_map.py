# SPDX-License-Identifier: Apache-2.0
"""Tensor maps: how Hopper's copy engine is told where boxes of activations lie. They hold addresses, no data."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from moepress.errors import KernelError

try:
    from cuda.bindings import driver
except ImportError:  # compiler.why_not() tells
    driver = None


class TensorMap(ctypes.Structure):
    """CUtensorMap, passed to kernels by value."""

    _fields_ = (("opaque", ctypes.c_ubyte * 128),)


def map_rows(x: torch.Tensor, tokens: int, units: int) -> TensorMap:
    """x [rows, K], bf16 or fp16 -> boxes of [units][tokens][64] with 128-byte swizzle, as [unit][row][column]."""
    rows, columns = x.shape
    dims, strides = (64, rows, -(-columns // 64)), (2 * columns, 128)
    return _encode(x.data_ptr(), x.dtype, dims, strides, (64, tokens, units), swizzled=True)


def map_sums(sums: torch.Tensor, tokens: int, records: int, each: int) -> TensorMap:
    """float32 [records, rows, floats] -> boxes of [records][tokens][each]."""
    count, rows, floats = sums.shape
    dims, strides = (floats, rows, count), (4 * floats, 4 * rows * floats)
    return _encode(sums.data_ptr(), sums.dtype, dims, strides, (each, tokens, records), swizzled=False)


@lru_cache(maxsize=4096)
def _encode(
    address: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    *,
    swizzled: bool,
) -> TensorMap:
    """Cached, since a served model meets the same addresses again and encoding takes microseconds."""
    kinds = driver.CUtensorMapDataType
    names = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT32"}
    swizzles = driver.CUtensorMapSwizzle
    status, made = driver.cuTensorMapEncodeTiled(
        getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{names[dtype]}"),
        len(dims),
        address,
        [driver.cuuint64_t(size) for size in dims],
        [driver.cuuint64_t(step) for step in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzles.CU_TENSOR_MAP_SWIZZLE_128B if swizzled else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status:
        raise KernelError(f"a tensor map of {dims} with strides {strides} and boxes {box} cannot be made: {status}")
    return TensorMap.from_buffer_copy(ctypes.string_at(made.getPtr(), 128))
