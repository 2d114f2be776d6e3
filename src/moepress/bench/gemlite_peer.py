# SPDX-License-Identifier: Apache-2.0
"""GemLite (PyPI gemlite 0.6): Triton kernels for dense weights of 1, 2, 4 and 8 bits, tuned at first use."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from moepress.bench.clock import Call
from moepress.bench.contenders import Contender
from moepress.bench.plain import STD, seeded
from moepress.bench.problems import DENSE, Problem
from moepress.bench.reference import dense_reference
from moepress.format.weight import affine

BITS = (1, 2, 4, 8)

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""uint8 codes [N, K]; scales and zeros [N, K / group] in the problem's dtype."""


class GemLite(Contender):
    name, kinds = "gemlite", (DENSE,)

    def why_not(self, problem: Problem) -> str | None:
        try:
            version("gemlite")
        except PackageNotFoundError:
            return "gemlite is not installed"
        if problem.rank:
            return "has no compensators"
        if problem.bits not in BITS:
            return f"has no {problem.bits}-bit weights"
        if problem.shape[1] % problem.group_size or problem.shape[1] % 32:
            return f"K = {problem.shape[1]}: it takes multiples of 32 and of the group size"
        return None

    def bits_per_weight(self, problem: Problem) -> float:
        return problem.bits + 32 / problem.group_size

    def note(self, problem: Problem) -> str:
        return f"{self.bits_per_weight(problem):g} b, real zeros"

    def prepare(self, problem: Problem, copies: int, seed: int, device: torch.device) -> list[Call]:
        x = problem.draw(seed, device).x
        return [_bound(problem, _parts(problem, seed, copy, device), x) for copy in range(copies)]

    def reference(self, problem: Problem, seed: int, device: torch.device) -> torch.Tensor:
        weight = affine(*_parts(problem, seed, 0, device), problem.group_size)
        return dense_reference(problem.draw(seed, device), weight)


def _bound(problem: Problem, parts: Parts, x: torch.Tensor) -> Call:
    from gemlite import DType, GemLiteLinear

    n, k = problem.shape
    dtype = {"bf16": DType.BF16, "fp16": DType.FP16}[problem.dtype]
    layer = GemLiteLinear(problem.bits, group_size=problem.group_size, in_features=k, out_features=n,
                          input_dtype=dtype, output_dtype=dtype)  # fmt: skip
    layer.pack(*parts)
    return lambda: layer(x)


def _parts(problem: Problem, seed: int, copy: int, device: torch.device) -> Parts:
    n, k = problem.shape
    generator = seeded((seed, copy, 0, 0), device)
    top = 2**problem.bits - 1
    codes = torch.randint(0, top + 1, (n, k), dtype=torch.uint8, generator=generator, device=device)
    groups = (n, k // problem.group_size)
    spread = ((top * (top + 2)) / 12) ** 0.5  # standard deviation of a uniform code
    scale = STD / spread * (0.75 + 0.5 * torch.rand(groups, generator=generator, device=device))
    zero = top / 2 + torch.rand(groups, generator=generator, device=device) - 0.5
    return codes, scale.to(problem.torch_dtype), zero.to(problem.torch_dtype)
