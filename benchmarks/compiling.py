# SPDX-License-Identifier: Apache-2.0
"""How long kernels take to compile, cold and one at a time, and to be found again: rows in results.csv.

    python benchmarks/compiling.py [--only 3] [--note TEXT]

All that layers of experts and dense matrices of these widths can need on Hopper, with compensators of rank 32 and
without; `mixed` are layers of experts of 1 to 4 bits. NVRTC needs no GPU. Then the same from the cache, as a process
that starts warm finds them. The time is that of one core of this machine, and no other process should keep it busy.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import product
from statistics import median
from tempfile import TemporaryDirectory

import torch
from common import Figure, finish
from kernel_times import SHAPES

from moepress.bench.ours import bank_layouts, dense_layouts
from moepress.bench.problems import LAYERS, Problem
from moepress.kernels.cuda import choose, compiler, run
from moepress.runtime.experts import BankLayouts

ARCHITECTURE = "sm_90a"
MACHINE = torch.bfloat16, 132, choose.HOPPER
TARGET = 2.0
"""Seconds."""
MIXED = "mixed"


def kernels(width: str) -> list[tuple[str, str]]:
    """Source and instance, in a fixed order."""
    ranked = list(product(LAYERS.items(), (0, 32)))
    if width == MIXED:
        return run.kernels_of([], [mixed(*layer, rank) for layer, rank in ranked], *MACHINE)
    bits = int(width)
    experts = [
        bank_layouts(Problem("moe", shape, 1, bits=bits, rank=rank, name=name)) for (name, shape), rank in ranked
    ]
    dense = [
        dense_layouts(Problem("dense", shape, 1, bits=bits, rank=rank)) for shape, rank in product(SHAPES, (0, 32))
    ]
    return run.kernels_of(dense, experts, *MACHINE)


def mixed(name: str, shape: tuple[int, ...], rank: int) -> BankLayouts:
    """Of a layer whose experts have 1, 2, 3 and 4 bits."""
    each = [bank_layouts(Problem("moe", shape, 1, bits=bits, rank=rank, name=name)) for bits in (1, 2, 3, 4)]
    gate_up, down = (tuple(layouts[half][0] for layouts in each) for half in range(2))
    return gate_up, down, *each[0][2:]


def timed(names: list[tuple[str, str]]) -> list[float]:
    """Seconds of each, compiled or read."""
    seconds = []
    for source, instance in names:
        start = time.perf_counter()
        compiler.compile_kernel(source, instance, ARCHITECTURE)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="1,2,3,4,8,mixed", help="widths")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    figures = []
    for width in given.only.split(","):
        names = kernels(width)
        with TemporaryDirectory(prefix="moepress-compiling-") as folder:  # factors' kernels are the same for all widths
            os.environ["MOEPRESS_CACHE"] = folder
            compiler.compile_kernel("route.cu", "combine<false>", ARCHITECTURE)  # none of them; loads NVRTC
            cold = timed(names)
            warm = timed(names)
        slowest, (_, name) = max(zip(cold, names, strict=True))
        over = sum(seconds > TARGET for seconds in cold)
        note = "; ".join(filter(None, (f"{name}; {over} of {len(names)} over {TARGET:g} s", given.note)))
        figures += [
            Figure(f"{width} bits, slowest kernel", slowest, "s", f"at most {TARGET:g}", note),
            Figure(f"{width} bits, median of {len(names)}", median(cold), "s", "", given.note),
            Figure(f"{width} bits, all of them from the cache", sum(warm), "s", f"cold {sum(cold):.0f}", given.note),
        ]
        for figure in figures[-3:]:
            print(f"{figure.metric:45} {figure.value:8.3f} s  {figure.baseline}; {figure.note}", flush=True)
    finish("compiling", figures)


if __name__ == "__main__":
    main()
