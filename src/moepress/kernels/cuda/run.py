# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' front: dense layers and whole layers of experts whose weights are in records.

Legend: M or T tokens, k experts a token, P = T k pairs, E experts, H hidden and I intermediate channels.

    up to 8       gemv<GATE_UP> -> gemv<DOWN>                                                                 few.py
    more          place_rows -> grouped<GATE_UP> -> grouped<DOWN> -> combine                                  many.py
                  (grouped<PLAIN> before each half that has compensators, where tiles have more than 24 tokens)

Every launch is programmatic: a kernel starts while the one before it ends, fetches weights, and waits for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moepress.errors import KernelError
from moepress.kernels.cuda import choose
from moepress.kernels.cuda.bank import Factors, RecordBank
from moepress.kernels.cuda.compiler import Request, Warmed
from moepress.kernels.cuda.compiler import warm as compile_all
from moepress.kernels.cuda.few import few_experts, few_linear, gemv_instance
from moepress.kernels.cuda.functions import processors_of, shared_bytes_of
from moepress.kernels.cuda.launch import architecture
from moepress.kernels.cuda.many import dense_instances, many_linear, run_many
from moepress.kernels.cuda.many import instances as many_instances
from moepress.kernels.records import RecordLayout

MAX_EXPERTS, MAX_SLOTS = 512, 32
MAX_PAIRS = 1 << 16
"""Pairs of a launch; more tokens are run in turns."""
DTYPES = (torch.bfloat16, torch.float16)


def why_not_linear(device: torch.device, dtype: torch.dtype, layout: RecordLayout) -> str | None:
    """None where `linear` can run, else the reason it cannot."""
    return why_not_columns(device, dtype, layout.columns)


def why_not_columns(device: torch.device, dtype: torch.dtype, columns: int) -> str | None:
    """The same of any kernel, whose inputs have so many columns."""
    if device.type != "cuda":
        return f"CUDA kernels need a CUDA device, and this layer is on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"CUDA kernels are for compute capability 9.0, and {device} has {'.'.join(map(str, capability))}"
    if dtype not in DTYPES:
        return f"CUDA kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if columns % 8:
        return f"CUDA kernels need in_features that are a multiple of 8, not {columns}"
    return None


def why_not_experts(
    device: torch.device,
    dtype: torch.dtype,
    gate_up: Sequence[RecordLayout],
    down: Sequence[RecordLayout],
    top_k: int,
    activation: str,
) -> str | None:
    """None where `experts` can run, else the reason it cannot."""
    for layout in (*gate_up, *down):
        if reason := why_not_linear(device, dtype, layout):
            return reason
    if activation != "silu":
        return f"CUDA kernels of experts know the activation silu, not {activation}"
    if top_k > MAX_SLOTS:
        return f"CUDA kernels of experts take at most {MAX_SLOTS} experts a token, not {top_k}"
    return None


def linear(
    x: torch.Tensor,
    bank: RecordBank,
    bias: torch.Tensor | None,
    out_features: int,
    factors: Factors | None = None,
) -> torch.Tensor:
    """x [M, K], bf16 or fp16, contiguous -> x (W + u v)^T (+ bias) [M, N] in x's dtype, accumulated in float32.

    One token is one launch; with more, v x is a product of its own where tiles are wide, rounded to x's dtype.
    """
    if len(x) == 1 and few_linear(x, y := x.new_empty(1, out_features), bank, bias, factors):
        return y
    pad = -out_features % 8  # results leave as eight neighbours
    y = x.new_empty(len(x), out_features + pad)
    many_linear(x, y, out_features, bank, bias, factors)
    return y[:, :out_features].clone(memory_format=torch.contiguous_format) if pad else y


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: RecordBank,
    down: RecordBank,
    intermediate: int,
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
) -> torch.Tensor:
    """x [T, H], ids [T, k] (int64 or int32), weights [T, k] (float32 or x's dtype) -> [T, H] in x's dtype.

    Ids outside 0..E-1 run nothing; the others of one token must differ from each other. Results are added in float32,
    each expert's rounded to x's dtype before where tokens are many. KernelError for more than 512 experts.
    """
    if (count := len(gate_up.where)) > MAX_EXPERTS:
        raise KernelError(f"CUDA kernels of experts take at most {MAX_EXPERTS} experts a layer, not {count}")
    y = torch.empty_like(x)
    banks = gate_up, down, gate_up_factors, down_factors
    if few_experts(x, ids, weights, *banks, intermediate, y):
        return y
    step = MAX_PAIRS // ids.shape[1]
    for at in range(0, len(x), step):
        part = slice(at, at + step)
        run_many(x[part], ids[part], weights[part], gate_up, down, intermediate, y[part], gate_up_factors, down_factors)
    return y


Layouts = Sequence[RecordLayout]
Ranked = tuple[Layouts, Layouts, int, tuple[Layouts, Layouts] | None, tuple[Layouts, Layouts] | None]
"""Layouts of gate and up and of down, experts a token, and layouts of v and u for gate and up and for down."""


def warm(linears: Sequence[Layouts], banks: Sequence[Ranked], dtype: torch.dtype, device: torch.device) -> Warmed:
    """Compiles, in parallel, all that these layers can need for any number of tokens; loads nothing.

    `linears` are layouts of dense layers: of the weight, and of v and u where it has a compensator.
    """
    needed = kernels_of(linears, banks, dtype, processors_of(device.index), shared_bytes_of(device.index))
    arch = architecture(device)
    return compile_all(Request(source, instance, arch) for source, instance in needed)


def kernels_of(
    linears: Sequence[Layouts], banks: Sequence[Ranked], dtype: torch.dtype, processors: int, shared: int
) -> list[tuple[str, str]]:
    """Source and instance of all that these layers can need, on a GPU whose blocks may have `shared` bytes."""
    instances = _Instances(dtype, processors, shared)
    found = {each for layouts in linears for each in instances.linear(layouts)}
    return sorted(found | {each for bank in banks for each in instances.experts(*bank)})


Instances = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class _Instances:
    """Pairs of source and instance that layers can need."""

    dtype: torch.dtype
    processors: int
    shared: int
    """Bytes that a block may have."""

    def linear(self, layouts: Layouts) -> Instances:
        weight, *factors = (choose.Bank((layout,)) for layout in layouts)
        ranks = choose.ranks(*(bank.any for bank in factors)) if factors else None
        yield from self._few("DENSE", weight, ranks, 1, 1)
        yield from dense_instances(weight, (factors[0], factors[1]) if factors else None, self.dtype, self.processors)

    def experts(
        self,
        gate_up: Layouts,
        down: Layouts,
        slots: int,
        gate_up_factors: tuple[Layouts, Layouts] | None = None,
        down_factors: tuple[Layouts, Layouts] | None = None,
    ) -> Instances:
        for mode, layouts, factors in (("GATE_UP", gate_up, gate_up_factors), ("DOWN", down, down_factors)):
            bank = choose.Bank(tuple(layouts))
            ranks = choose.ranks(factors[0][0], factors[1][0]) if factors else None
            for tokens in range(1, choose.MAX_TOKENS + 1):
                yield from self._few(mode, bank, ranks, tokens, slots)
        banks = choose.Bank(tuple(gate_up)), choose.Bank(tuple(down))
        kinds = [
            (choose.Bank(tuple(both[0])), choose.Bank(tuple(both[1]))) if both else None
            for both in (gate_up_factors, down_factors)
        ]
        yield from many_instances(*banks, kinds, self.dtype)

    def _few(
        self, mode: choose.Mode, bank: choose.Bank, ranks: choose.Ranks | None, tokens: int, slots: int
    ) -> Instances:
        for team in choose.gemv_candidates(mode, bank, ranks, tokens, slots, self.processors, self.shared):
            yield "gemv.cu", gemv_instance(mode, bank, ranks, self.dtype, tokens, team)


__all__ = ["Factors", "RecordBank", "experts", "kernels_of", "linear", "warm", "why_not_experts", "why_not_linear"]
