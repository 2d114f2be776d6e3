# SPDX-License-Identifier: Apache-2.0
"""The kernels' times beside 16 bits and the peers that are installed: rows in results.csv.

    python benchmarks/kernel_times.py [--only dense,layers,widths,ranks,mixed] [--tokens 1,64] [--alone] [--seconds 0.3]
                                 [--note TEXT]

What is timed and how is `moepress bench`'s: CUDA graphs, cold L2, uniform routing, medians; ratios are taken within
one run; `--alone` times moepress alone, `--tokens` other numbers of tokens than a part's own. `mixed` has no peer: a
layer whose experts have 1, 2, 3 and 4 bits in turn, against the uniform layers' mean over the experts that are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median

import torch
from common import Figure, finish

from moepress.bench.clock import CudaClock, copies_needed
from moepress.bench.contenders import BASELINE, PEER
from moepress.bench.ours import Moepress, layouts_of, random_records
from moepress.bench.peers import lineup
from moepress.bench.problems import LAYERS, Problem
from moepress.bench.report import bound, fastest
from moepress.bench.run import Row, Setting, run_problem, warm_up

SHAPES = ((8192, 8192), (14336, 4096), (4096, 14336), (4096, 4096))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
DENSE_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 640, 1024)
PARTS = ("dense", "layers", "widths", "ranks", "mixed")
NAMES = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-moe-16b")


def problems(part: str, given: Sequence[int] | None) -> Iterator[Problem]:
    """`given` are the token counts that a user asked for, instead of the part's own."""
    if part == "dense":
        yield from (Problem("dense", shape, tokens) for shape in SHAPES for tokens in given or DENSE_TOKENS)
        yield from (Problem("dense", (4096, 4096), tokens, rank=32) for tokens in given or (1, 64))
    elif part == "layers":
        yield from (Problem("moe", LAYERS[name], tokens, name=name) for name in NAMES for tokens in given or TOKENS)
    elif part == "widths":
        for bits in (1, 2, 4, 8):
            yield from (Problem("moe", LAYERS[NAMES[0]], tokens, bits=bits, name=NAMES[0]) for tokens in given or (1,))
    elif part == "ranks":
        # each beside the same without compensators, a moment apart: clocks move by more than what compensators cost
        for name, tokens in product(NAMES, given or (1, 8, 64, 1024)):
            yield from (Problem("moe", LAYERS[name], tokens, rank=rank, name=name) for rank in (0, 32))


def figures(rows: list[Row], setting: Setting) -> Iterator[Figure]:
    """One for each contender that ran; ours says what the others took in the same run."""
    peer, plain = fastest(rows, PEER), fastest(rows, BASELINE)
    for row in rows:
        rank = f" r{row.problem.rank}" if row.problem.rank else ""
        shape = row.problem.name or "x".join(map(str, row.problem.shape))
        name = f"{shape} b{row.problem.bits}{rank} T={row.problem.tokens}"
        if row.us is None:
            print(f"{name}: {row.contender}: {row.reason}", flush=True)
            continue
        best, limit = bound(row, setting.machine)
        others = (f"{who} {us:.1f}" for who, us in (("best peer", peer), ("16 bits", plain)) if us)
        baseline = ", ".join(others) or "alone"
        note = (
            f"{100e6 * best / row.us:.0f} % of {limit}; relative error {row.error}; same bits twice: {row.repeatable}"
        )
        figure = Figure(f"{name} {row.contender}", row.us, "us", baseline, f"{note}; {row.note}")
        print(f"{figure.metric:60} {figure.value:10.2f} us  {baseline}; {figure.note}", flush=True)
        yield figure


def mixed(clock: CudaClock, setting: Setting) -> Iterator[list[Figure]]:
    """A Mixtral layer of four widths beside the uniform layers' mean over the experts that are read."""
    from moepress.kernels.cuda import run

    plain = [Problem("moe", LAYERS[NAMES[0]], 1, bits=bits) for bits in (1, 2, 3, 4)]
    experts = plain[0].experts
    for tokens in (1, 8, 64):
        draw = Problem("moe", LAYERS[NAMES[0]], tokens).draw(setting.seed, setting.device)
        times = []
        for kinds in (*([each] for each in plain), plain):
            where = tuple((e % len(kinds), e) for e in range(experts))
            calls = []
            for copy in range(copies_needed(1 << 27, 1 << 30, setting.machine.l2_bytes, clock.free_bytes())):
                banks = [
                    run.RecordBank.build(
                        [random_records(kind, matrix, setting.seed, copy, setting.device) for kind in kinds],
                        [layouts_of(kind)[matrix] for kind in kinds],
                        where,
                    )
                    for matrix in range(2)
                ]
                calls.append(partial(run.experts, draw.x, draw.ids, draw.weights, *banks, plain[0].shape[3]))
            times.append(median(clock.replay(clock.record(calls), setting.seconds)))
            del calls
            clock.release()
        mean = mean_of_read(times[:-1], draw.ids)
        note = f"us, uniform and mixed: {[round(t, 1) for t in times]}"
        print(f"mixed widths T={tokens}: {times[4] / mean:.3f} of the mean; {note}", flush=True)
        yield [
            Figure(
                f"mixtral mixed 1,2,3,4 bits T={tokens}", times[4] / mean, "ratio",
                "at most 1.05 of the mean of the uniform layers", note,
            )
        ]  # fmt: skip


def mean_of_read(times: Sequence[float], ids: torch.Tensor) -> float:
    """Of layers whose experts have one width each, over the experts of a layer that has these widths in turn."""
    read = ids.unique().tolist()
    return sum(times[expert % len(times)] for expert in read) / len(read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--tokens", type=lambda text: [int(each) for each in text.split(",")], default=None)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each contender on each problem")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--only knows {', '.join(PARTS)}, and not {', '.join(unknown)}")
    clock = CudaClock(torch.device("cuda", torch.cuda.current_device()))
    setting = Setting(clock.device, clock.machine(), seconds=given.seconds)
    print(setting.machine, flush=True)
    for part in parts:
        # what is measured is kept, should a later problem fail or a user lose patience
        for found in mixed(clock, setting) if part == "mixed" else timed(part, given, clock, setting):
            named = [replace(each, note="; ".join(filter(None, (each.note, given.note)))) for each in found]
            finish(f"kernels {part}", named, device="cuda")


def timed(part: str, given: argparse.Namespace, clock: CudaClock, setting: Setting) -> Iterator[list[Figure]]:
    """The figures of each problem of a part."""
    for problem in problems(part, given.tokens):
        contenders = [Moepress()] if given.alone else lineup(problem.kind, problem.dtype, peers=True)
        for line in warm_up(contenders, [problem], setting):
            print(line, flush=True)
        yield list(figures(run_problem(problem, contenders, clock, setting, lambda _: None), setting))
        clock.release()


if __name__ == "__main__":
    main()
