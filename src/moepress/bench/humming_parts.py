# SPDX-License-Identifier: Apache-2.0
"""Humming's side of a problem: random weights in its checkpoint layout and in its own, its kernels, its token blocks.

Humming is imported inside the functions: it is optional and starts a compiler process when imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moepress.bench.plain import STD, expert_shapes, seeded
from moepress.bench.problems import Problem
from moepress.format.packing import unpack_codes
from moepress.format.weight import affine

SYMMETRIC_FROM = 64
"""Tokens from which its MoE GEMM cannot have zeros: it fails to encode their TMA descriptor."""
_TILE_N = 128
"""It pads N to this: with N = 2880 it finds no tile for experts."""
_ANY_ROWS = 1 << 30
_INT32 = 1 << 31


@dataclass(frozen=True)
class Packed:
    """One matrix [N, K], or all experts' [E, N, K], in Humming's own layout, by its names."""

    config: Any
    tensors: dict[str, torch.Tensor]


def has_zero(problem: Problem) -> bool:
    return not (problem.moe and problem.tokens >= SYMMETRIC_FROM)


def shapes_of(problem: Problem) -> tuple[tuple[int, int], ...]:
    """(N, K) of each launch."""
    return expert_shapes(problem) if problem.moe else problem.matrices


def rows_of(problem: Problem) -> int:
    """Rows of each launch's output."""
    return problem.tokens * (problem.shape[1] if problem.moe else 1)


def random_parts(problem: Problem, matrix: int, seed: int, copy: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random bits as codes, and scales (and zeros) that give weights of deviation STD or so.

    weight int32 [..., N, K * bits / 32], weight_scale and zero_point [..., N, K / group] in the problem's dtype.
    """
    n, k = shapes_of(problem)[matrix]
    lead = (problem.experts,) if problem.moe else ()
    generator = seeded((seed, copy, matrix, 0), device)
    codes = torch.empty(*lead, n, k * problem.bits // 32, dtype=torch.int32, device=device)
    groups = (*lead, n, k // problem.group_size)
    top = 2**problem.bits - 1
    spread = ((top * (top + 2)) / 12) ** 0.5  # standard deviation of a uniform code
    scale = STD / spread * (0.75 + 0.5 * torch.rand(groups, generator=generator, device=device))
    parts = {"weight": codes.random_(-_INT32, _INT32, generator=generator), "weight_scale": scale}
    if has_zero(problem):
        parts["zero_point"] = top / 2 + torch.rand(groups, generator=generator, device=device) - 0.5
    return {name: part.to(problem.torch_dtype) if part.is_floating_point() else part for name, part in parts.items()}


def dequantize(problem: Problem, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Parts of one matrix -> float32 [N, K]; codes are a little-endian stream of bits, as in `format.packing`."""
    scale = parts["weight_scale"]
    count = scale.shape[-1] * problem.group_size
    codes = unpack_codes(parts["weight"].view(torch.uint8), problem.bits, count)
    zero = parts.get("zero_point", torch.full_like(scale, 2.0 ** (problem.bits - 1)))
    return affine(codes, scale, zero, problem.group_size)


def pack(problem: Problem, matrix: int, seed: int, copy: int, device: torch.device) -> Packed:
    """`random_parts` as its kernels read them."""
    from humming.transform import prepare_and_transform_humming_tensors

    parts = random_parts(problem, matrix, seed, copy, device)
    return Packed(*prepare_and_transform_humming_tensors(parts, **_layer(problem, matrix, device)))


def layer_config(problem: Problem, matrix: int, device: torch.device) -> Any:
    """The configuration that `pack` will give, without weights."""
    from humming.transform import prepare_layer_config

    return prepare_layer_config(**_layer(problem, matrix, device))


def _layer(problem: Problem, matrix: int, device: torch.device) -> dict[str, Any]:
    from humming.schema import HummingWeightSchema

    schema = HummingWeightSchema(
        b_dtype=f"uint{problem.bits}",
        weight_scale_group_size=problem.group_size,
        has_zero_point=has_zero(problem),
        is_fp_zero_point=has_zero(problem),
    )
    n, k = shapes_of(problem)[matrix]
    experts = problem.experts if problem.moe else None
    return {"shape_n": n, "shape_k": k, "weight_schema": schema, "num_experts": experts,
            "torch_dtype": problem.torch_dtype, "device": device, "pad_n_to_multiple": _TILE_N}  # fmt: skip


def kernel(config: Any, rows: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """What its launcher takes for so many rows of output, and the rows of a tile."""
    tuning = _tuning(config, rows, device)
    return _compile(config, [tuning], device), tuning["block_shape"][0]


def compile_ahead(config: Any, rows: Iterable[int], device: torch.device) -> None:
    """The kernels of all these row counts in one request, which Humming compiles side by side."""
    tunings = [_tuning(config, count, device) for count in rows]
    _compile(config, list({str(tuning): tuning for tuning in tunings}.values()), device)


def _tuning(config: Any, rows: int, device: torch.device) -> dict[str, Any]:
    from humming.tune import get_heuristics_config

    return get_heuristics_config(config, shape_m=rows, gemm_type=_gemm(config), device=device)


def _compile(config: Any, tunings: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
    from humming.config import ComputeConfig
    from humming.kernel.humming import HummingKernel

    compute = ComputeConfig(gemm_type=_gemm(config)).to_str()
    ranges = [(0, _ANY_ROWS, tuning) for tuning in tunings]
    return HummingKernel.prepare_kernels(config.to_str(), compute, ranges, device=device)


def _gemm(config: Any) -> str:
    return "indexed" if config.num_experts else "dense"


def aligned(ids: torch.Tensor, experts: int, block: int) -> dict[str, torch.Tensor]:
    """ids [T, k] -> what the indexed GEMM reads, int32.

    sorted_ids: token * k + choice sorted by expert, each expert's padded to whole blocks with T * k; expert_ids: the
    expert of each block; num_tokens_padded: the length of the first, a scalar.
    """
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    owner = flat[order]
    counts = torch.bincount(flat, minlength=experts)
    blocks = (counts + block - 1) // block
    starts, padded = counts.cumsum(0) - counts, (blocks.cumsum(0) - blocks) * block
    total = int(blocks.sum()) * block
    entries = torch.full((total,), len(flat), dtype=torch.int32, device=ids.device)
    entries[padded[owner] + torch.arange(len(flat), device=ids.device) - starts[owner]] = order.to(torch.int32)
    owners = torch.repeat_interleave(torch.arange(experts, device=ids.device), blocks).to(torch.int32)
    return {"sorted_ids": entries, "expert_ids": owners,
            "num_tokens_padded": torch.tensor(total, dtype=torch.int32, device=ids.device)}  # fmt: skip
