# SPDX-License-Identifier: Apache-2.0
"""The packing kernel's own code, compiled for the CPU and run thread by thread: bit for bit what torch makes."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_cpu import build, needs_compiler
from pack_cases import SHAPES, Case, Run, check_codes, check_parts

from moepress.format.spec import BITS, GROUP_SIZES, WeightSpec
from moepress.format.weight import Parts
from moepress.kernels import packing
from moepress.kernels.cuda import pack as launcher
from moepress.kernels.cuda.compiler import SOURCES
from moepress.kernels.cuda.pack import SOURCE, pack_arguments
from moepress.kernels.factors import FactorShape
from moepress.kernels.records import Base, RecordLayout

pytestmark = needs_compiler
FUNCTION = """
extern "C" void run_{0}_{1}_{2}(const PackArguments* p, int blocks) {{
    static const PackArguments* at; at = p;
    run_blocks(blocks, PACK_THREADS, [] {{ pack<{0}, {1}, {2}>(*at); }});
}}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`launch_pack` here."""
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copy(Path(__file__).parent / "cpu/common.cuh", folder)
    widths = [(bits, bits if bits <= 4 else 8) for bits in BITS] + [(8, word) for word in (1, 2, 3, 4)]
    functions = [FUNCTION.format(*each, units) for each in widths for units in (1, 2, 4)]
    text = "\n".join([(SOURCES / SOURCE).read_text(encoding="utf-8"), *functions])
    library = build(folder, text, "-O1", "-w")  # with that folder's common.cuh

    def run(sources: Sequence[Base], stored_bits: int, layout: RecordLayout, records: torch.Tensor) -> None:
        arguments = pack_arguments(sources, stored_bits, layout, records)
        function = library[f"run_{stored_bits}_{layout.word_bits}_{layout.units}"]
        function(ctypes.byref(arguments), len(records) * arguments.row_groups * arguments.tiles)

    return run


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_it_packs_as_torch_does(run: Run, bits: int, group_size: int) -> None:
    for number, (rows, columns) in enumerate(SHAPES):
        case = Case(bits, group_size, rows, columns, 1 + number % 3, number % 2 == 0, 0 if number % 4 else 16)
        check_parts(run, case)
        check_codes(run, replace(case, gate_up=False))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        Case, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.integers(1, 150), st.integers(1, 1300),
        st.integers(1, 3), st.booleans(), st.sampled_from((0, 1, 2, 4, 8, 12)),
    )
)  # fmt: skip
def test_any_shape_at_any_address(run: Run, case: Case) -> None:
    check_parts(run, case)
    check_codes(run, replace(case, gate_up=False))


def test_layers_weights_and_factors_come_to_it_as_they_are_stored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WeightSpec(bits=3, group_size=64, rank=20, factor_bits=4)
    shape = FactorShape.of((spec,), 40, 192, halves=2)
    sides = [side(spec, seed) for seed in (0, 1)]

    def everything() -> list[torch.Tensor]:
        weights = packing.pack_parts(sides[0], spec, 40, 192), packing.pack_gate_up(*sides, spec, 40, 192)
        return [*weights, *shape.pack(sides, spec.rank)]

    wanted, layouts = everything(), []
    monkeypatch.setattr(packing, "_runs_kernel", lambda layout, device: True)
    monkeypatch.setattr(launcher, "launch_pack", lambda *given: (layouts.append(given[2]), run(*given)))
    found = everything()
    assert len(layouts) == 4 and layouts[2:] == list(shape.layouts)
    assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))


def side(spec: WeightSpec, seed: int) -> Parts:
    """Parts of 2 x 3 weights (40, 192), some of them strided."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, (dtype, shape) in spec.parts(40, 192).items():
        drawn = torch.randint(0, 256, (3, 2, *shape), generator=generator, dtype=torch.uint8).transpose(0, 1)
        parts[name] = drawn if dtype == "U8" else drawn.half()
    return parts
