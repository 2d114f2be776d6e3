# SPDX-License-Identifier: Apache-2.0
"""moepress's own kernels as a contender, on records of random bits; and what the registry says of a problem.

Bits per weight are those of the records, padding included, and of the compensator's factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch

from moepress.bench.clock import Call
from moepress.bench.contenders import OURS, Contender
from moepress.bench.plain import STD, expert_shapes, seeded
from moepress.bench.problems import Draw, Problem
from moepress.bench.reference import dense_reference, moe_reference
from moepress.errors import PlanError
from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts, dequantize_factors
from moepress.kernels import problem as kernels
from moepress.kernels import registry
from moepress.kernels.banks import Weights, describe
from moepress.kernels.experts.cuda import packed_experts
from moepress.kernels.linear.cuda import packed_linear
from moepress.kernels.linear.factors import factor_layouts, pack_factors, why_not_records
from moepress.kernels.records import TILE_ROWS, RecordLayout, deinterleave, dequantize_records, interleaved_rows

FACTOR_BITS = 3
"""Of a compensator, as `moepress compress` stores it by default."""
_INT32 = 1 << 31


class Moepress(Contender):
    """The CUDA kernels, called as a layer calls them where no gradients are recorded."""

    name, role = "moepress", OURS

    def why_not(self, problem: Problem) -> str | None:
        (kernel,) = (each for each in explain(problem) if each.name == f"moepress {registry.CUDA}")
        return None if kernel.chosen else kernel.reason

    def bits_per_weight(self, problem: Problem) -> float:
        stored = sum(layout.num_bytes for layout in layouts_of(problem))
        return 8 * stored / problem.weights + problem.factor_bits_per_weight(FACTOR_BITS + 0.25)

    def note(self, problem: Problem) -> str:
        return f"{self.bits_per_weight(problem):.3g} b, real zeros"

    def warm_up(self, problems: Sequence[Problem], device: torch.device) -> None:
        from moepress.kernels.cuda import run

        for dtype in {problem.torch_dtype for problem in problems}:
            own = [problem for problem in problems if problem.torch_dtype == dtype]
            banks = {(*((each,) for each in layouts_of(problem)), problem.shape[1]) for problem in own if problem.moe}
            run.warm(list({layouts_of(problem) for problem in own if not problem.moe}), list(banks), dtype, device)

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        draw = problem.draw(seed, device)
        calls: list[Call] = []
        for copy in range(copies):
            banks = [make_bank(problem, matrix, seed, copy, device) for matrix in range(len(layouts_of(problem)))]
            if problem.moe:
                calls.append(partial(_experts, draw, *banks, problem.shape[3]))
            else:
                factors = factor_banks(problem, random_factors(problem, seed, copy, device))
                calls.append(partial(packed_linear, draw.x, *banks, spec_of(problem), factors, problem.shape[0]))
        return calls

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor:
        draw, layouts = problem.draw(seed, device), layouts_of(problem)
        records = [random_records(problem, matrix, seed, 0, device) for matrix in range(len(layouts))]

        def weight(matrix: int, expert: int) -> torch.Tensor:
            return dequantize_records(records[matrix][expert], layouts[matrix])

        if problem.moe:
            rows = problem.shape[3]
            return moe_reference(draw, lambda e: torch.cat(deinterleave(weight(0, e), rows)), lambda e: weight(1, e))
        whole = weight(0, 0)
        if problem.rank:
            u, v = dequantize_factors(random_factors(problem, seed, 0, device), spec_of(problem), *problem.shape)
            whole = whole + u @ v
        return dense_reference(draw, whole)


def explain(problem: Problem) -> list[registry.Choice]:
    """Every implementation of moepress that there is for this problem, the chosen one marked."""
    try:
        layouts = layouts_of(problem)
    except PlanError as error:  # the format has no such weights
        return [registry.Choice(f"moepress {registry.CUDA}", False, str(error))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    op, top_k = (kernels.EXPERTS, problem.shape[1]) if problem.moe else (kernels.LINEAR, 1)
    dtype, rank, experts = problem.torch_dtype, problem.rank, problem.experts
    asked = kernels.Problem(op, device, dtype, layouts[:1], layouts[1:], rank, experts, top_k)
    return [dataclasses.replace(each, name=f"moepress {each.name}") for each in registry.explain(asked)]


def spec_of(problem: Problem) -> WeightSpec:
    factor_bits = FACTOR_BITS if problem.rank else 0
    return WeightSpec(bits=problem.bits, group_size=problem.group_size, rank=problem.rank, factor_bits=factor_bits)


def layouts_of(problem: Problem) -> tuple[RecordLayout, ...]:
    """Of the dense matrix; or of one expert's gate and up interleaved, and of its down. PlanError for unknown widths
    and group sizes."""
    shapes = problem.matrices
    if problem.moe:
        (_, hidden), down = expert_shapes(problem)
        shapes = ((interleaved_rows(problem.shape[3]), hidden), down)
    return tuple(RecordLayout(*shape, problem.bits, problem.group_size) for shape in shapes)


def make_bank(problem: Problem, matrix: int, seed: int, copy: int, device: torch.device) -> Weights:
    """`random_records` of all experts as kernels take them."""
    from moepress.kernels.cuda import run

    layouts, where = layouts_of(problem)[matrix : matrix + 1], tuple((0, expert) for expert in range(problem.experts))
    bank = run.RecordBank.build((random_records(problem, matrix, seed, copy, device),), layouts, where)
    return Weights(list(bank.records), bank.table, describe(layouts, where), bank)


def random_records(problem: Problem, matrix: int, seed: int, copy: int, device: torch.device) -> torch.Tensor:
    """uint8 [E, *layout.shape]: random bits as codes, scales and zeros that give weights of deviation STD or so."""
    layout, generator = layouts_of(problem)[matrix], seeded((seed, copy, matrix, 0), device)
    records = torch.empty(problem.experts, *layout.shape, dtype=torch.uint8, device=device)
    records.view(torch.int32).random_(-_INT32, _INT32, generator=generator)
    if layout.word_bits > problem.bits:  # a code of 5 or 6 bits has a byte
        records[..., : layout.code_bytes] &= 2**problem.bits - 1
    groups = records[..., layout.code_bytes :].view(torch.float16).unflatten(-1, (TILE_ROWS, -1, 2))
    top = 2**problem.bits - 1
    spread = ((top * (top + 2)) / 12) ** 0.5  # standard deviation of a uniform code
    uniform = torch.rand(groups.shape, generator=generator, device=device)
    groups[..., 0] = STD / spread * (0.75 + 0.5 * uniform[..., 0])
    groups[..., 1] = top / 2 + uniform[..., 1] - 0.5
    if layout.records_per_group > 1:  # both records of a group have its scale
        second = groups[:, :, 1::2]
        second.copy_(groups[:, :, ::2][:, :, : second.shape[2]])
    return records


def random_factors(problem: Problem, seed: int, copy: int, device: torch.device) -> Parts:
    """Stored parts of a dense weight's compensator, with u v about as large as the weight."""
    generator, spec = seeded((seed, copy, 2, 0), device), spec_of(problem)
    parts = {}
    for name, (dtype, shape) in spec.parts(*problem.shape[:2]).items():
        if name.startswith(("u", "v")):
            part = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=device)
            size = (STD / problem.rank**0.5) ** 0.5 / 2.3  # 2.3 is the standard deviation of a 3-bit code
            parts[name] = part if dtype == "U8" else torch.full(shape, size, dtype=torch.float16, device=device)
    return parts


def factor_banks(problem: Problem, parts: Parts) -> Parts | tuple[Weights, Weights]:
    """The factors of v and u as a packed layer has them: in records, or as stored where they have none."""
    from moepress.kernels.cuda import run

    spec, (rows, columns, *_) = spec_of(problem), problem.shape
    if not spec.rank or why_not_records(spec, columns):
        return parts
    made = []
    for records, layout in zip(
        pack_factors(parts, spec, rows, columns), factor_layouts(spec, rows, columns), strict=True
    ):
        bank = run.RecordBank.build((records[None],), (layout,), ((0, 0),))
        made.append(Weights(list(bank.records), bank.table, describe((layout,), ((0, 0),)), bank))
    return made[0], made[1]


def _experts(draw: Draw, gate_up: Weights, down: Weights, intermediate: int) -> torch.Tensor:
    assert draw.ids is not None and draw.weights is not None
    return packed_experts(draw.x, draw.ids, draw.weights, gate_up, down, intermediate)
