# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels by name, and what launches ask of a device; each looked up once a process."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda.compiler import compile_kernel
from moepress.kernels.cuda.launch import Function, architecture


@cache
def find_kernel(source: str, instance: str, device: int) -> tuple[Function, int]:
    """The kernel and its static shared bytes."""
    function = find_function(source, instance, device)
    return function, function.attributes().shared_bytes


@cache
def find_function(source: str, instance: str, device: int) -> Function:
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"{instance} is needed for the first time while a CUDA graph is captured, which cannot load it; run the "
            "model once before, with as many tokens"
        )
    return Function(compile_kernel(source, instance, architecture(device)), device)


@cache
def processors_of(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_bytes_of(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache(maxsize=8)
def _bf16(dtype: torch.dtype) -> str:
    return "true" if dtype == torch.bfloat16 else "false"


def is_bf16(x: torch.Tensor | torch.dtype) -> str:
    return _bf16(x.dtype if isinstance(x, torch.Tensor) else x)


def address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
