# SPDX-License-Identifier: Apache-2.0
"""A backward pass to the activations of a compressed model: each compressed layer as a product with a dense weight.

Weights get no gradient. A dense weight is either made once and kept, which takes the memory of the uncompressed model,
or made again for each product, forward and backward, so that no more than one is there at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from moepress.kernels.experts.reference import run_experts
from moepress.measure.taps import forward_as
from moepress.runtime.experts import ExpertBank, Projection
from moepress.runtime.linear import CompressedLinear


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What keeping the dense weights of all compressed layers takes."""
    return dtype.itemsize * sum(_dense_count(module) for module in model.modules())


@contextmanager
def differentiable(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """Inside the block gradients pass through `model`'s compressed layers, and no parameter of it asks for one."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in asking])
        for parameter in asking:
            parameter.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                weight = _Weight(module.dequantize, keep)
                stack.enter_context(forward_as(module, partial(_run_linear, weight, module)))
            elif isinstance(module, ExpertBank):
                stack.enter_context(forward_as(module, _DenseBank(module, keep)))
        yield


class _Weight:
    """One dense weight [N, K], in whatever dtype it is asked for."""

    def __init__(self, make: Callable[[], torch.Tensor], keep: bool) -> None:
        self._make, self._keep = make, keep
        self._kept: torch.Tensor | None = None

    def __call__(self, dtype: torch.dtype) -> torch.Tensor:
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        with torch.no_grad():
            made = self._make().to(dtype)
        if self._keep:
            self._kept = made
        return made


class _Product(torch.autograd.Function):
    """x [..., K] W^T -> [..., N]; asks for the weight again in backward, where it is not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: _Weight) -> torch.Tensor:
        ctx.weight = weight
        return linear(x, weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight(gradient.dtype), None


class _DenseBank:
    """The forward of an ExpertBank."""

    def __init__(self, bank: ExpertBank, keep: bool) -> None:
        self._act_fn, self._count = bank.act_fn, bank.num_experts
        self._weights = [
            [_Weight(partial(projection.dequantize, expert), keep) for projection in _projections(bank)]
            for expert in range(bank.num_experts)
        ]

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return run_experts(flat, top_k_index, top_k_weights, self._count, self._run).view_as(hidden_states)

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self._weights[expert]
        return _product(self._act_fn(_product(x, gate)) * _product(x, up), down)


def _product(x: torch.Tensor, weight: _Weight) -> torch.Tensor:
    product: torch.Tensor = _Product.apply(x, weight)
    return product


def _run_linear(weight: _Weight, module: CompressedLinear, x: torch.Tensor) -> torch.Tensor:
    y = _product(x, weight)
    return y if module.bias is None else y + module.bias


def _projections(bank: ExpertBank) -> tuple[Projection, Projection, Projection]:
    return bank.gate, bank.up, bank.down


def _dense_count(module: nn.Module) -> int:
    """Weights that are compressed in this module itself."""
    if isinstance(module, CompressedLinear):
        return module.out_features * module.in_features
    if not isinstance(module, ExpertBank):
        return 0
    first = (next(iter(projection.values())) for projection in _projections(module))
    return module.num_experts * sum(each.out_features * each.in_features for each in first)
