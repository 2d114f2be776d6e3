# SPDX-License-Identifier: Apache-2.0
"""Everything that compressed layers otherwise do at their first input, done ahead: choose, pack, compile."""

from __future__ import annotations

import torch
from torch import nn

from moepress.runtime.experts import ExpertBank
from moepress.runtime.linear import CompressedLinear
from moepress.runtime.packable import Packable
from moepress.runtime.router import settle_routers


def prepare(model: nn.Module, dtype: torch.dtype, top_k: int | None) -> bool:
    """Settles which kernels run for inputs of `dtype`, and packs. Whether kernels run all experts that are compressed.

    Without `top_k`, how many experts a token has, banks are left to their first input; so is what is on the meta
    device, where accelerate keeps what it moves in for each call. KernelError as in `Packable.settle`.
    """
    settle_routers(model, dtype)
    all_experts = True
    for layer in _layers(model):
        if isinstance(layer, CompressedLinear) and layer.device.type != "meta":
            layer.settle(dtype)
        elif isinstance(layer, ExpertBank):
            all_experts &= top_k is not None and layer.device.type != "meta" and layer.settle(dtype, top_k)
    return all_experts


def compile_kernels(model: nn.Module, dtype: torch.dtype, top_k: int | None) -> None:
    """Compiles, side by side, what the layers that were settled for CUDA need; banks only with their `top_k`."""
    if routers := settle_routers(model, dtype):
        from moepress.kernels.cuda import router

        router.warm(
            dtype,
            [router.needed(each.weight, each.routing, which) for each in routers for which in each.selections(dtype)],
        )
    ready = [layer for layer in _layers(model) if layer.banks()]
    for device in {layer.device for layer in ready}:
        here = [layer for layer in ready if layer.device == device]
        linears = {layer.kernel_layouts() for layer in here if isinstance(layer, CompressedLinear)}
        banks = {layer.kernel_layouts(top_k) for layer in here if isinstance(layer, ExpertBank) and top_k}
        from moepress.kernels.cuda import run

        run.warm(list(linears), list(banks), dtype, device)


def _layers(model: nn.Module) -> list[Packable]:
    return [module for module in model.modules() if isinstance(module, Packable)]
