# SPDX-License-Identifier: Apache-2.0
"""When what happens in `gemv`: warps write the GPU's clock into a buffer at some places of a layer of experts.

    python benchmarks/timeline.py [--name qwen3-30b-a3b] [--tokens 1] [--rank 32]

The places are put into the source's text before it is compiled, so one that no longer matches is an error. Prints for
both launches, at each place, microseconds after the first warp of gate and up has begun: the earliest warp, a tenth of
them, half, nine tenths, the last. Gate and up is set up once the launch ahead has ended. Writing the clock down costs
some 5 %. Appends nothing, since these are no figures of the product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from stripped import Edits, leave_out

from moepress.bench.clock import copies_needed
from moepress.bench.ours import Moepress
from moepress.bench.problems import LAYERS, Problem
from moepress.kernels.cuda import few
from moepress.kernels.cuda.functions import processors_of

LAUNCHES = "gate and up", "down"
WARPS, CALLS = 32, 8
PLACES = (
    ("begins", "    Chosen chosen = {};\n"),
    ("is set up", "    constexpr int EARLY = MODE != GATE_UP ? 0 : NT == 1 ? 1 : 2;\n"),
    ("knows its experts", "    const int count = active.count;\n"),
    ("has asked for records", "    if (MODE != GATE_UP) await_producers();\n"),
    ("has x as bytes", "    // the staged row of the input of an expert's column; any for columns without a token\n"),
    ("is done with v", "    const Correction<FB, FU, NT, BF16, MODE> correction = {f, active};\n"),
    ("is done with W, last row", "        if constexpr (FACTORS && !DEFERS) {\n"),
    ("has u t, last row", "        if constexpr (!SCATTERS) put_part<NT>(own, y, lane);\n"),
    (
        "adds u t of several rows",
        "            if (mine) add_late(unit, t, late_slot, late_row_block);\n",
    ),
    ("ends", "    if constexpr (FACTORS && MODE == DENSE) {  // the last block to end"),
)
"""Each before this text of gemv.cu."""
STAMP = """    auto stamp = [&](int place) {{
        u64 now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now) :: "memory");
        const int at = ((MODE == DOWN) * {blocks} + blockIdx.x) * {warps} + threadIdx.x / WARP;
        if (MODE != DENSE && p.bias && threadIdx.x % WARP == 0) ((u64*)p.bias)[at * {places} + place] = now;
    }};
"""


def edits(blocks: int) -> Edits:
    """What puts stamps of so many blocks into gemv.cu. Their buffer comes as the bias, which experts do not have."""
    made = [(text, f"    stamp({i});\n{text}") for i, (_, text) in enumerate(PLACES)]
    made[0] = made[0][0], STAMP.format(blocks=blocks, warps=WARPS, places=len(PLACES)) + made[0][1]
    return tuple(made)


def summarise(stamps: torch.Tensor) -> Iterator[tuple[str, str, list[float]]]:
    """stamps [calls, 2, blocks, WARPS, places] in ns, 0 where no warp came by -> launch, place, five figures in us."""
    known = stamps > 0
    begin = torch.where(known[:, 0, ..., 0], stamps[:, 0, ..., 0], stamps.max()).flatten(1).amin(1)
    after = (stamps - begin.view(-1, 1, 1, 1, 1)).double() / 1e3
    for launch, name in enumerate(LAUNCHES):
        for place, (what, _) in enumerate(PLACES):
            found = after[:, launch, ..., place][known[:, launch, ..., place]]
            if len(found):
                quantiles = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=found.dtype)
                yield name, what, found.quantile(quantiles).tolist()


def record(calls: list[Callable[[], torch.Tensor]], device: torch.device) -> torch.Tensor:
    """The stamps of some of the calls, which run one after another in a graph."""
    blocks = processors_of(device.index)
    buffers = torch.zeros(len(calls), 2, blocks, WARPS, len(PLACES), dtype=torch.int64, device=device)
    launch = few._launch

    def call_all() -> None:
        for call, buffer in zip(calls, buffers, strict=True):
            few._launch = partial(launch, bias=buffer)
            call()

    try:
        call_all()
        torch.cuda.synchronize(device)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call_all()
    finally:
        few._launch = launch
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize(device)
    return buffers[-CALLS:].cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=sorted(LAYERS), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    given = parser.parse_args()
    problem = Problem("moe", LAYERS[given.name], given.tokens, rank=given.rank, name=given.name)
    device = torch.device("cuda", torch.cuda.current_device())
    leave_out("gemv.cu", edits(processors_of(device.index)))
    size = int(Moepress().bits_per_weight(problem) * problem.weights / 8)
    caches, free = torch.cuda.get_device_properties(device).L2_cache_size, torch.cuda.mem_get_info(device)[0]
    copies = copies_needed(size * problem.shape[1] // problem.experts, size, caches, free)
    with torch.no_grad():
        stamps = record(Moepress().prepare(problem, max(copies, CALLS), 0, device), device)
    if not stamps.any():
        raise SystemExit(f"{given.name} at {given.tokens} tokens does not run on gemv.cu; take fewer")
    for launch, what, figures in summarise(stamps):
        print(f"{launch:12} {what:26}", *(f"{us:7.2f}" for us in figures))


if __name__ == "__main__":
    main()
