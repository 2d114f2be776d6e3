# SPDX-License-Identifier: Apache-2.0
"""What the packing kernel is held against torch's operations on, bit for bit, on a GPU and compiled for the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moepress.format.spec import WeightSpec, packed_bytes
from moepress.kernels.records import Base, RecordLayout, interleaved_rows, pack_gate_up, pack_parts, pack_records

Run = Callable[[Sequence[Base], int, RecordLayout, torch.Tensor], None]
"""`launch_pack`, or what stands for it."""
POISON = 0xAB
SHAPES = (
    (1, 1), (5, 31), (16, 64), (17, 70), (64, 96), (65, 131), (9, 192), (70, 250), (129, 256), (24, 384), (33, 640),
    (8, 1088), (20, 1100), (7, 1152), (100, 2304), (3, 4160),
)  # fmt: skip
"""Padded rows and columns, groups cut short, each number of units, rows that begin anywhere, several blocks across."""


@dataclass(frozen=True)
class Case:
    bits: int
    group_size: int
    rows: int
    columns: int
    experts: int = 1
    gate_up: bool = False
    shift: int = 0
    """Bytes from an aligned address to the packed codes."""

    @property
    def spec(self) -> WeightSpec:
        return WeightSpec(bits=self.bits, group_size=self.group_size)

    @property
    def layout(self) -> RecordLayout:
        rows = interleaved_rows(self.rows) if self.gate_up else self.rows
        return RecordLayout(rows, self.columns, self.bits, self.group_size)


def random_bytes(*shape: int, seed: int, device: str, below: int = 256, shift: int = 0) -> torch.Tensor:
    flat = torch.zeros(shift + torch.Size(shape).numel(), dtype=torch.uint8, device=device)[shift:]
    drawn = torch.randint(0, below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return flat.view(shape).copy_(drawn)


def random_groups(case: Case, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of any bits."""
    shape = case.experts, case.rows, case.layout.groups, 2
    scale, zero = (random_bytes(*shape, seed=seed + i, device=device).view(torch.float16)[..., 0] for i in range(2))
    return scale, zero


def poisoned(case: Case, device: str) -> torch.Tensor:
    return torch.full((case.experts, *case.layout.shape), POISON, dtype=torch.uint8, device=device)


def check_parts(run: Run, case: Case, device: str = "cpu") -> None:
    """Of stored parts; behind the codes of a row's last byte there is anything."""
    sources = []
    for seed in range(0, 20, 10)[: 1 + case.gate_up]:
        shape = case.experts, case.rows, packed_bytes(case.columns, case.bits)
        packed = random_bytes(*shape, seed=seed, device=device, shift=case.shift)
        sources.append((packed, *random_groups(case, seed + 1, device)))
    records = poisoned(case, device)
    run(sources, case.bits, case.layout, records)
    parts = [dict(zip(("packed", "scale", "zero"), source, strict=True)) for source in sources]
    reference = pack_gate_up if case.gate_up else pack_parts
    assert torch.equal(records, reference(*parts, case.spec, case.rows, case.columns)), case


def check_codes(run: Run, case: Case, device: str = "cpu") -> None:
    """Of codes that have a byte each."""
    shape = case.experts, case.rows, case.columns
    codes = random_bytes(*shape, seed=1, device=device, below=2**case.bits, shift=case.shift)
    base = codes, *random_groups(case, 2, device)
    records = poisoned(case, device)
    run([base], 8, case.layout, records)
    assert torch.equal(records, pack_records(*base, case.layout)), case
