# SPDX-License-Identifier: Apache-2.0
"""Seconds of the joint planner: 15,000 weights with 20 choices each, at several budgets.

Choices look like those of real weights: bytes of 1 to 8 bits in groups of 64 and 128 and with compensators, losses that
fall by about four a bit from a start that differs from weight to weight by factors of thousands.
"""

from __future__ import annotations

import argparse
import random

from common import Figure, finish, print_table, seconds

from moepress.format.spec import WeightSpec
from moepress.plan.solve import solve

SHAPES = ((768, 2048), (2048, 768), (4096, 2048), (512, 2048))
SPECS = [WeightSpec(bits=b, group_size=g) for b in (1, 2, 3, 4, 5, 6, 8) for g in (64, 128)] + [
    WeightSpec(bits=b, group_size=128, rank=r, factor_bits=4) for b in (2, 3, 4) for r in (16, 64)
]
BPW = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
LIMIT = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=int, default=15_000)
    options = parser.parse_args()
    draw = random.Random(0)
    numel, items = 0, []
    for _ in range(options.weights):
        shape = draw.choice(SHAPES)
        numel += shape[0] * shape[1]
        scale = 10 ** draw.uniform(-4, 0)
        items.append([(spec.num_bytes(*shape), scale * loss(spec, draw)) for spec in SPECS])
    figures, table = [], []
    for bpw in BPW:
        found = []
        took = seconds(lambda bpw=bpw, found=found: found.append(solve(items, int(bpw * numel / 8))))
        gap = found[0].gap / found[0].loss
        table.append((bpw, f"{took:.2f}", f"{gap:.1e}"))
        note = f"{options.weights} weights x {len(SPECS)} choices, {bpw} bits a weight; relative gap {gap:.1e}"
        figures.append(Figure("solve", took, "s", f"at most {LIMIT:g}", note))
    print_table(("bits a weight", "seconds", "relative gap"), table)
    finish("planner", figures)


def loss(spec: WeightSpec, draw: random.Random) -> float:
    """Falls by four a bit, a little by smaller groups and ranks."""
    return 4.0**-spec.bits * (1.0 if spec.group_size == 64 else 1.2) * 0.9 ** (spec.rank / 16) * draw.uniform(0.8, 1.25)


if __name__ == "__main__":
    main()
