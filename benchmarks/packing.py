# SPDX-License-Identifier: Apache-2.0
"""How fast stored weights become records at load, by the kernel and by torch's operations: rows in results.csv.

    python benchmarks/packing.py [--only NAME,...] [--seconds 0.2] [--note TEXT]

Bytes are those of the stored parts, read once, and of the records, written once; the floor is a copy of as many, which
is timed in the same run. Calls go round copies of more than four L2 caches together. The kernel is timed in CUDA graphs
as `moepress bench` times layers, torch's operations, too many for a graph, between events; medians of both. What both
make is compared before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from statistics import median

import torch
from common import Figure, finish

from moepress.bench.clock import CACHES, CudaClock, Machine
from moepress.format.spec import WeightSpec, packed_bytes
from moepress.format.weight import Parts
from moepress.kernels.cuda.pack import launch_pack
from moepress.kernels.records import RecordLayout, interleaved_rows, pack_gate_up, pack_parts

REPEATS = 3
"""Of torch's operations: they take tenths of a second, most of the time of a run."""


@dataclass(frozen=True)
class Bank:
    """Experts' matrices (rows, columns) of one projection, or of gate and up; a dense one is a bank of one."""

    name: str
    bits: int
    experts: int
    rows: int
    columns: int
    gate_up: bool = False

    @property
    def spec(self) -> WeightSpec:
        return WeightSpec(bits=self.bits, group_size=64)

    @property
    def layout(self) -> RecordLayout:
        return RecordLayout(interleaved_rows(self.rows) if self.gate_up else self.rows, self.columns, self.bits, 64)

    @property
    def stored_bytes(self) -> int:
        return (1 + self.gate_up) * self.experts * self.spec.num_bytes(self.rows, self.columns)

    @property
    def record_bytes(self) -> int:
        return self.experts * self.layout.num_bytes

    def draw(self, device: torch.device) -> list[Parts]:
        """Random stored parts, of gate and up or of one."""
        codes = self.experts, self.rows, packed_bytes(self.columns, self.bits)
        groups = self.experts, self.rows, self.layout.groups
        return [
            {
                "packed": torch.randint(0, 256, codes, dtype=torch.uint8, device=device),
                "scale": torch.rand(groups, dtype=torch.float16, device=device),
                "zero": torch.rand(groups, dtype=torch.float16, device=device),
            }
            for _ in range(1 + self.gate_up)
        ]


BANKS = (
    Bank("mixtral-8x7b gate and up", 3, 8, 14336, 4096, gate_up=True),
    Bank("mixtral-8x7b down", 3, 8, 4096, 14336),
    Bank("qwen3-30b-a3b gate and up", 3, 128, 768, 2048, gate_up=True),
    Bank("qwen3-30b-a3b down", 3, 128, 2048, 768),
    Bank("dense 8192x8192", 3, 1, 8192, 8192),
    Bank("mixtral-8x7b gate and up", 4, 8, 14336, 4096, gate_up=True),
    Bank("mixtral-8x7b gate and up", 2, 8, 14336, 4096, gate_up=True),
)


class Timed:
    """One bank in as many copies as caches ask for."""

    def __init__(self, bank: Bank, clock: CudaClock, machine: Machine) -> None:
        self.bank, self.clock = bank, clock
        self.copies = 1 + CACHES * machine.l2_bytes // (bank.stored_bytes + bank.record_bytes)
        self.parts = [bank.draw(clock.device) for _ in range(self.copies)]
        self.records = [
            torch.empty(bank.experts, *bank.layout.shape, dtype=torch.uint8, device=clock.device)
            for _ in range(self.copies)
        ]

    def by_kernel(self, copy: int) -> None:
        sources = [tuple(part.values()) for part in self.parts[copy]]
        launch_pack(sources, self.bank.bits, self.bank.layout, self.records[copy])

    def by_torch(self, copy: int) -> torch.Tensor:
        pack = pack_gate_up if self.bank.gate_up else pack_parts
        return pack(*self.parts[copy], self.bank.spec, self.bank.rows, self.bank.columns)

    def kernel_seconds(self, seconds: float) -> float:
        """Median of a call. AssertionError where the kernel makes other bytes than torch."""
        self.by_kernel(0)
        assert torch.equal(self.by_torch(0), self.records[0]), f"{self.bank}: the kernel's records are not torch's"
        calls = [partial(self.by_kernel, copy) for copy in range(self.copies)]
        return median(self.clock.replay(self.clock.record(calls), seconds)) / 1e6

    def torch_seconds(self) -> float:
        """Median of a call."""
        copies, times = cycle(range(self.copies)), []
        for _ in range(1 + REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.by_torch(next(copies))
            end.record()
            torch.cuda.synchronize(self.clock.device)
            times.append(begin.elapsed_time(end) / 1e3)
        return median(times[1:])


def figures(bank: Bank, clock: CudaClock, machine: Machine, seconds: float) -> Iterator[Figure]:
    timed = Timed(bank, clock, machine)
    moved, floor = bank.stored_bytes + bank.record_bytes, machine.copy_bandwidth
    for name, took in (("kernel", timed.kernel_seconds(seconds)), ("torch", timed.torch_seconds())):
        rate = moved / took
        note = f"{rate / floor:.1%} of copy bandwidth; {1e6 * took:.1f} us for {moved / 1e6:.1f} MB read and written"
        yield Figure(f"{bank.name} {bank.bits} bits, {name}", rate / 1e9, "GB/s", f"copy {floor / 1e9:.0f}", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="banks whose names begin so, such as dense or qwen3,dense")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing the kernel on each bank")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    clock = CudaClock(torch.device("cuda", torch.cuda.current_device()))
    machine, found = clock.machine(), []
    for bank in BANKS:
        if bank.name.startswith(tuple(given.only.split(","))):
            for each in figures(bank, clock, machine, given.seconds):
                print(f"{each.metric:45} {each.value:8.1f} {each.unit}  {each.baseline}; {each.note}", flush=True)
                found.append(replace(each, note="; ".join(filter(None, (each.note, given.note)))))
            clock.release()
    finish("packing", found, device="cuda")


if __name__ == "__main__":
    main()
