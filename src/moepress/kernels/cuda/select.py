# SPDX-License-Identifier: Apache-2.0
"""Launches `select`: a learned selector between router and experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moepress.kernels.cuda.bank import structure
from moepress.kernels.cuda.compiler import Request, Warmed
from moepress.kernels.cuda.compiler import warm as compile_all
from moepress.kernels.cuda.functions import find_function, is_bf16
from moepress.kernels.cuda.launch import architecture
from moepress.kernels.selector.reference import Costs

_Arguments = structure(
    "_Arguments", "x ids weights new_ids new_weights projection sensitivity offset power dial", "",
    "ids_wide weights_wide renormalises tokens slots num_experts columns",
)  # fmt: skip
SOURCE = "select.cu"
FEW = 64
"""Up to so many tokens a cluster of blocks shares one; beyond, the blocks are enough and share P instead."""
_SHARES = {True: (8, 1, 288), False: (1, 8, 256)}
"""Where tokens are few or not: blocks of a cluster, tokens of a cluster, threads of a block."""


def launch_select(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, costs: Costs, dial: torch.Tensor, renormalises: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] in bf16 or fp16, ids [T, k] int64 or int32, weights [T, k] float32 or x's dtype -> new ids, weights."""
    few = len(x) <= FEW
    cluster, each, threads = _SHARES[few]
    new_ids, new_weights = torch.empty_like(ids), torch.empty_like(weights)
    arguments = _Arguments(
        *(tensor.data_ptr() for tensor in (x, ids, weights, new_ids, new_weights, *costs, dial)),
        int(ids.dtype == torch.int64), int(weights.dtype == torch.float32), int(renormalises),
        len(x), ids.shape[1], len(costs.offset), x.shape[1],
    )  # fmt: skip
    function = find_function(SOURCE, select_instance(x.dtype, len(costs.projection), few), x.device.index)
    blocks = cluster * -(-len(x) // each)
    function.launch(blocks, threads, 0, (arguments,), cluster=cluster, programmatic=True)
    return new_ids, new_weights


def select_instance(dtype: torch.dtype, projections: int, few: bool) -> str:
    cluster, each, _ = _SHARES[few]
    return f"select<{is_bf16(dtype)}, {projections}, {cluster}, {each}>"


def warm(dtype: torch.dtype, kinds: Iterable[tuple[int, torch.device]]) -> Warmed:
    """Compiles what selectors can need for any number of tokens; of each, how many projections, and where it is."""
    return compile_all(
        Request(SOURCE, select_instance(dtype, projections, few), architecture(device))
        for projections, device in kinds
        for few in _SHARES
    )
