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
from moepress.kernels.banks import FactorWeights, Weights, describe
from moepress.kernels.experts.cuda import packed_experts
from moepress.kernels.factors import FactorShape
from moepress.kernels.linear.cuda import packed_linear
from moepress.kernels.records import TILE_ROWS, RecordLayout, deinterleave, dequantize_records, interleaved_rows
from moepress.runtime.experts import BankLayouts

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
            banks = {bank_layouts(problem) for problem in own if problem.moe}
            run.warm(list({dense_layouts(problem) for problem in own if not problem.moe}), list(banks), dtype, device)

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        draw = problem.draw(seed, device)
        calls: list[Call] = []
        for copy in range(copies):
            matrices = range(len(layouts_of(problem)))
            banks = [make_bank(problem, matrix, seed, copy, device) for matrix in matrices]
            factors = [factor_banks(problem, matrix, seed, copy, device) for matrix in matrices]
            if problem.moe:
                calls.append(partial(_experts, draw, *banks, problem.shape[3], *factors))
            else:
                stored = {name: part[0] for name, part in random_factors(problem, 0, seed, copy, device).items()}
                either = factors[0] or stored
                calls.append(partial(packed_linear, draw.x, *banks, spec_of(problem), either, problem.shape[0]))
        return calls

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor:
        draw, layouts = problem.draw(seed, device), layouts_of(problem)
        records = [random_records(problem, matrix, seed, 0, device) for matrix in range(len(layouts))]
        factors = [random_factors(problem, each, seed, 0, device) for each in range(len(problem.matrices))]

        def weight(matrix: int, expert: int) -> torch.Tensor:
            return dequantize_records(records[matrix][expert], layouts[matrix])

        def compensator(each: int, expert: int) -> torch.Tensor | float:
            if not problem.rank:
                return 0.0
            parts = {name: part[expert] for name, part in factors[each].items()}
            u, v = dequantize_factors(parts, spec_of(problem), *problem.matrices[each])
            return u @ v

        if not problem.moe:
            return dense_reference(draw, weight(0, 0) + compensator(0, 0))

        def gate_up(expert: int) -> torch.Tensor:
            halves = deinterleave(weight(0, expert), problem.shape[3])
            return torch.cat([half + compensator(each, expert) for each, half in enumerate(halves)])

        return moe_reference(draw, gate_up, lambda expert: weight(1, expert) + compensator(2, expert))


def explain(problem: Problem) -> list[registry.Choice]:
    """Every implementation of moepress that there is for this problem, the chosen one marked."""
    try:
        layouts = layouts_of(problem)
    except PlanError as error:  # the format has no such weights
        return [registry.Choice(f"moepress {registry.CUDA}", False, str(error))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    op, top_k = (kernels.EXPERTS, problem.shape[1]) if problem.moe else (kernels.LINEAR, 1)
    compensated = (spec_of(problem),) if problem.rank else ()
    asked = kernels.Problem(
        op, device, problem.torch_dtype, layouts[:1], layouts[1:], compensated, compensated, problem.experts, top_k
    )
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


def random_factors(problem: Problem, each: int, seed: int, copy: int, device: torch.device) -> Parts:
    """Stored parts [E, ...] of the compensators of one of `problem.matrices`, with u v about as large as the weight."""
    generator, spec = seeded((seed, copy, 2 + each, 0), device), spec_of(problem)
    parts = {}
    for name, (dtype, shape) in spec.parts(*problem.matrices[each]).items():
        if name.startswith(("u", "v")):
            lead = problem.experts, *shape
            part = torch.randint(0, 256, lead, generator=generator, dtype=torch.uint8, device=device)
            size = (STD / problem.rank**0.5) ** 0.5 / 2.3  # 2.3 is the standard deviation of a 3-bit code
            parts[name] = part if dtype == "U8" else torch.full(lead, size, dtype=torch.float16, device=device)
    return parts


def factor_shapes(problem: Problem) -> tuple[FactorShape | None, ...]:
    """Of the compensators of each of `layouts_of`; None where there are none, or none in records."""
    spec = spec_of(problem)
    if not problem.moe:
        return (FactorShape.of((spec,), *problem.matrices[0]),)
    gate, _, down = problem.matrices
    return FactorShape.of((spec,), *gate, halves=2), FactorShape.of((spec,), *down)


def dense_layouts(problem: Problem) -> tuple[RecordLayout, ...]:
    """Of a dense matrix, and of its factors where these have records."""
    (shape,) = factor_shapes(problem)
    return *layouts_of(problem), *(() if shape is None else shape.layouts)


def factor_banks(problem: Problem, matrix: int, seed: int, copy: int, device: torch.device) -> FactorWeights | None:
    """The factors of all experts in records, for one of `layouts_of`, as a packed layer has them; None as above."""
    from moepress.kernels.cuda import run

    if (shape := factor_shapes(problem)[matrix]) is None:
        return None
    halves = ((0, 1), (2,))[matrix] if problem.moe else (0,)
    parts = [random_factors(problem, each, seed, copy, device) for each in halves]
    where, made = tuple((0, expert) for expert in range(problem.experts)), []
    for name, records, layout in zip("vu", shape.pack(parts, problem.rank), shape.layouts, strict=True):
        bank = run.RecordBank.build((records,), (layout,), where, is_v=name == "v")
        made.append(Weights([records], bank.table, describe((layout,), where), bank))
    return FactorWeights(*made)


def bank_layouts(problem: Problem) -> BankLayouts:
    """What decides which kernels a layer of experts needs."""
    gate_up, down = layouts_of(problem)
    shapes = (each and each.layouts for each in factor_shapes(problem))
    gate_up_factors, down_factors = (both and ((both[0],), (both[1],)) for both in shapes)
    return (gate_up,), (down,), problem.shape[1], gate_up_factors, down_factors


def _experts(
    draw: Draw,
    gate_up: Weights,
    down: Weights,
    intermediate: int,
    gate_up_factors: FactorWeights | None,
    down_factors: FactorWeights | None,
) -> torch.Tensor:
    assert draw.ids is not None and draw.weights is not None
    return packed_experts(draw.x, draw.ids, draw.weights, gate_up, down, intermediate, gate_up_factors, down_factors)
