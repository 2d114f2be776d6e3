# SPDX-License-Identifier: Apache-2.0
"""What the parts of a kernel cost: a layer of experts timed with each of them left out. Results are then wrong.

    python benchmarks/stripped.py [--only gemv,grouped] [--seconds 0.1]

A part is left out of the source's text before it is compiled, so an edit that no longer matches is an error. Prints
microseconds, timed as `moepress bench` does (CUDA graphs, cold L2, medians), the whole kernel first and last; appends
nothing, since these are no figures of the product.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch

from moepress.bench.clock import CudaClock, copies_needed
from moepress.bench.ours import Moepress
from moepress.bench.problems import LAYERS, Problem
from moepress.kernels.cuda import compiler, few, functions

Edits = tuple[tuple[str, str], ...]
_GEMV_NO_WAITING = (
    ("while (!__all_sync(~0u, is_there(half))) load_row(t, slot, lane);", ""),
    ("while (!__all_sync(~0u, is_there(t))) load_row(t, slot, lane, i);", ""),
)
GEMV: dict[str, Edits] = {  # without v nobody may wait
    "no waiting for t": _GEMV_NO_WAITING,
    "no u t": (
        (
            "int compensated = MODE == DOWN ? WARPS - 1 - warp : warp == WARPS - 1 ? row_slot : count;",
            "int compensated = count;",
        ),
        ("correction.add(part, unit, t, slot, row_block, lane);\n            if (NT > 1", "if (NT > 1"),
    ),
    "no v": (
        *_GEMV_NO_WAITING,
        ("const int items = FACTORS ? count * f.v_row_blocks : 0;", "const int items = 0;"),
    ),
    "x not converted": (
        ("if (MODE == DOWN && NT > 1 && p.passed.bytes) copy_rows(s, p.passed);", ""),
        ("else stage_rows<G, BF16, NT, EARLY>(s, row_of, early, p.k);", ""),
    ),
    "records not multiplied": (("multiply_any<B, U, G>(part, ring.head(), x, sums, bits, lane);", ""),),
}
_NO_WAITING = (
    ("while (!__all_sync(~0u, is_there(t))) load_row(f, work, i, lane);", ""),
    ("if (units && !t_is_there) {", "if (false) {"),
)
_NO_V = ("schedule.v_row_tiles = C::MULTIPLIES_V ? ", "schedule.v_row_tiles = C::MULTIPLIES_V && p.tokens < 0 ? ")
_NO_UT = ("if (adds) compensator.add(acc[0], p.add, work, u_row_block, lane);", "")
GROUPED: dict[str, Edits] = {  # likewise
    "no waiting for t": _NO_WAITING,
    "no u t": (_NO_UT,),
    "no v": (*_NO_WAITING, _NO_V),
    "no v, no u t": (*_NO_WAITING, _NO_V, _NO_UT),
}
WEIGHTS = {name: GEMV[name] for name in ("x not converted", "records not multiplied")}
WEIGHTS["neither"] = sum(WEIGHTS.values(), ())
FACTORS = {name: GEMV[name] for name in ("no waiting for t", "no u t", "no v")}
FACTORS["no v, no u t"] = GEMV["no v"] + GEMV["no u t"]
MIXTRAL, QWEN, DEEPSEEK = "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-moe-16b"
RUNS = [
    *(("gemv", name, 1, 0, WEIGHTS) for name in (MIXTRAL, QWEN)),
    *(("gemv", name, 8, 0, WEIGHTS) for name in (QWEN, DEEPSEEK)),
    *(("gemv", name, tokens, 32, FACTORS) for name, tokens in ((MIXTRAL, 1), (QWEN, 1), (QWEN, 8))),
    *(("grouped", name, tokens, 32, GROUPED) for name, tokens in ((MIXTRAL, 8), (QWEN, 64))),
]
_whole = compiler._texts


def without(source: str, texts: dict[str, str], edits: Edits) -> dict[str, str]:
    """The texts of a source and its headers with its edits made. SystemExit where one no longer fits."""
    for old, new in edits:
        if sum(text.count(old) for text in texts.values()) != 1:
            raise SystemExit(f"{source} has no longer this text once, so it cannot be left out: {old}")
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    return texts


def leave_out(source: str, edits: Edits) -> None:
    """From now on kernels of `source` are compiled without these."""

    def texts(name: str, folder: Path) -> dict[str, str]:
        found = _whole(name, folder)
        return without(source, found, edits) if name == source else found

    compiler._texts = texts
    for each in (functions.find_kernel, functions.find_function, few._plan):
        each.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="gemv,grouped")
    parser.add_argument("--seconds", type=float, default=0.1)
    given = parser.parse_args()
    clock, ours = CudaClock(torch.device("cuda", torch.cuda.current_device())), Moepress()
    print(clock.machine(), flush=True)
    l2_bytes = torch.cuda.get_device_properties(clock.device).L2_cache_size
    for source, name, tokens, rank, parts in RUNS:
        if source not in given.only.split(","):
            continue
        problem = Problem("moe", LAYERS[name], tokens, rank=rank, name=name)
        leave_out(f"{source}.cu", ())
        ours.warm_up([problem], clock.device)
        size = int(ours.bits_per_weight(problem) * problem.weights / 8)
        copies = copies_needed(size * problem.shape[1] // problem.experts, size, l2_bytes, clock.free_bytes())
        calls = ours.prepare(problem, copies, 0, clock.device)
        found = []
        for part, edits in (("whole", ()), *parts.items(), ("whole", ())):
            leave_out(f"{source}.cu", edits)
            found.append(f"{part} {median(clock.replay(clock.record(calls), given.seconds)):.1f}")
        print(f"{name} T={tokens} rank {rank}: {'; '.join(found)}", flush=True)
        leave_out(f"{source}.cu", ())
        del calls
        clock.release()


if __name__ == "__main__":
    main()
