# SPDX-License-Identifier: Apache-2.0
"""Every kernel that the launcher may ask for compiles, for every architecture it is meant for. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moepress.format.spec import BITS
from moepress.kernels.cuda import choose, compiler
from moepress.kernels.cuda.compiler import Request
from moepress.kernels.records import RecordLayout

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=f"NVRTC is needed: {compiler.why_not()}")
COLUMNS = {4: 512, 2: 384, 1: 192}
"""Columns of a matrix whose records have so many units."""


def cases() -> Iterator[tuple[str, choose.Bank, torch.dtype]]:
    """Each width in some mode and dtype; each group size with each record width; mixed banks; long and short rows."""
    modes = ("DENSE", "GATE_UP", "DOWN")
    for i, bits in enumerate(BITS):
        yield modes[i % 3], choose.Bank((RecordLayout(64, 2048, bits, 64),)), (torch.bfloat16, torch.float16)[i % 2]
    for i, (units, columns) in enumerate(COLUMNS.items()):
        for j, group_size in enumerate((32, 64, 128)):
            layout = RecordLayout(64, columns, 3, group_size)
            assert layout.units == units
            yield modes[(i + j) % 3], choose.Bank((layout,)), torch.bfloat16
    for most, mode in ((4, "GATE_UP"), (8, "DOWN")):
        yield mode, choose.Bank(tuple(RecordLayout(64, 512, bits, 64) for bits in (1, 3, most))), torch.bfloat16


def test_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moepress.kernels.cuda import run

    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path))
    requests = {Request("route.cu", "sort_pairs", "sm_90a"), Request("route.cu", "combine<false>", "sm_90a")}
    for mode, bank, dtype in cases():
        for source, instance in run._instances(mode, bank, dtype, 2, 132):
            requests.add(Request(source, instance, "sm_90a"))
            if source == "gemv.cu":  # what the decode body needs is there from Ampere on
                requests |= {Request(source, instance, arch) for arch in ("sm_80", "sm_89")}
    done = compiler.warm(sorted(requests, key=str))
    assert done.compiled == len(requests) > 100 and done.cached == 0
