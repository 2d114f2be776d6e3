# SPDX-License-Identifier: Apache-2.0
"""HQQ here against the package hqq on the CPU: time and result, on the same tensors with the same threads.

Ours is `hqq` plus `pack_codes`; theirs is `Quantizer.quantize`, which packs too. The matrices are the shapes of a
checkpoint (up to three of each, its first, middle and last) and two shapes of Mixtral-8x7B with Gaussian values.
Time is that of the whole set of a shape; a checkpoint's total weighs each shape by how often it occurs.

    python benchmarks/hqq_peer.py [MODEL] [--threads 2] [--bits 3] [--budget 20] [--no-large]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import DEMO_MODEL, Figure, finish, in_turn, print_table
from hqq.core.quantize import Quantizer

from moepress.format.packing import pack_codes
from moepress.format.weight import affine
from moepress.quantize.hqq import hqq
from moepress.source import open_source

GROUP = 64
LARGE = ((4096, 4096), (14336, 4096))
TARGET, TOLERANCE = 0.7, 1e-3


@dataclass(frozen=True)
class Case:
    """Matrices of one shape, and how many of that shape their model has."""

    label: str
    weights: list[torch.Tensor]
    count: int


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = checkpoint_cases(options.model)
    large = [] if options.no_large else [gaussian(shape) for shape in LARGE]
    rows, figures, sums = [], [], {"checkpoint": [0.0, 0.0], "large": [0.0, 0.0]}
    worst = 0.0
    for case in model + large:
        worst = max(worst, *(difference(w, options.bits) for w in case.weights))
        ours, theirs = measure(case, options.bits, options.budget)
        total = sums["large" if case in large else "checkpoint"]
        weight = case.count / len(case.weights)
        total[0], total[1] = total[0] + ours * weight, total[1] + theirs * weight
        rows.append((case.label, case.count, f"{ours * 1e3:.1f}", f"{theirs * 1e3:.1f}", f"{ours / theirs:.3f}"))
        figures.append(ratio(case.label, ours, theirs, options))
    print(f"{options.threads} threads, {options.bits} bits; milliseconds for up to three matrices of a shape")
    print_table(("shape", "in model", "ours", "hqq", "ratio"), rows)
    for name, (ours, theirs) in sums.items():
        if theirs:
            print(f"{name} total: {ours:.2f} s against {theirs:.2f} s, ratio {ours / theirs:.3f}")
            figures.append(ratio(f"{name} total", ours, theirs, options))
    ours, theirs = (sum(pair) for pair in zip(*sums.values(), strict=True))
    figures.append(ratio("total", ours, theirs, options))
    figures.append(Figure("relative difference of dequantised weights", worst, "", f"at most {TOLERANCE}"))
    print(f"total ratio {ours / theirs:.3f} (target {TARGET}), largest relative difference {worst:.1e}")
    finish("hqq_peer", figures, peer="hqq")
    return int(worst > TOLERANCE)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=DEMO_MODEL, help="checkpoint folder (default: the demo model)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--bits", type=int, default=3, choices=(1, 2, 3, 4, 8))
    parser.add_argument("--budget", type=float, default=20, help="seconds to spend on each shape, at least 3 repeats")
    parser.add_argument("--no-large", action="store_true", help="leave the two Mixtral shapes out")
    return parser.parse_args()


def checkpoint_cases(folder: str) -> list[Case]:
    cases = []
    with open_source(folder) as src:
        by_shape = defaultdict(list)
        for ref in src.graph.weights:
            by_shape[ref.group, ref.shape].append(ref)
        for (group, shape), refs in by_shape.items():
            chosen = {
                refs[0].name: refs[0],
                refs[len(refs) // 2].name: refs[len(refs) // 2],
                refs[-1].name: refs[-1],
            }
            weights = [src.weight(ref).clone() for ref in chosen.values()]
            cases.append(Case(f"{group} {shape[0]}x{shape[1]}", weights, len(refs)))
    return cases


def gaussian(shape: tuple[int, int]) -> Case:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    return Case(f"random {shape[0]}x{shape[1]}", [weight], 1)


def measure(case: Case, bits: int, budget: float) -> tuple[float, float]:
    def all_of(solve: Callable[[torch.Tensor, int], object]) -> None:
        for weight in case.weights:
            solve(weight, bits)

    return in_turn(partial(all_of, ours), partial(all_of, theirs), budget)


def ours(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    solved = hqq("w", weight, bits, GROUP)
    return pack_codes(solved.codes, bits), solved.scale, solved.zero


def theirs(weight: torch.Tensor, bits: int, pack: bool = True) -> tuple[torch.Tensor, dict]:
    return Quantizer.quantize(
        weight, nbits=bits, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32, round_zero=False,
        bitpack=pack,
    )  # fmt: skip


def difference(weight: torch.Tensor, bits: int) -> float:
    """|ours - theirs| / |theirs| of the dequantised weights."""
    solved = hqq("w", weight, bits, GROUP)
    codes, meta = theirs(weight, bits, pack=False)
    peer = ((codes.float() - meta["zero"]) * meta["scale"]).reshape(weight.shape)
    mine = affine(solved.codes, solved.scale, solved.zero, GROUP)
    return (torch.linalg.vector_norm(mine - peer) / torch.linalg.vector_norm(peer)).item()


def ratio(label: str, ours: float, theirs: float, options: argparse.Namespace) -> Figure:
    target = f"hqq {theirs:.4g} s; at most {TARGET}"
    note = f"{Path(options.model).resolve().name}, {options.bits} bits, ours {ours:.4g} s"
    return Figure(f"{label} time ratio", ours / theirs, "ours/hqq", target, note)


if __name__ == "__main__":
    sys.exit(main())
