# SPDX-License-Identifier: Apache-2.0
"""Every kernel that the launcher may ask for compiles, for every architecture it is meant for. Needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.errors import KernelError
from moepress.format.spec import BITS
from moepress.kernels.cuda import choose, compiler, pack, router
from moepress.kernels.cuda.compiler import Request
from moepress.kernels.cuda.select import SOURCE, select_instance
from moepress.kernels.records import RecordLayout

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=f"NVRTC is needed: {compiler.why_not()}")
COLUMNS = {4: 512, 2: 384, 1: 192}
"""Columns of a matrix whose records have so many units."""


def cases() -> Iterator[tuple[str, str]]:
    """Each width in some mode and dtype; each group size with each record width; mixed banks; long and short rows;
    compensators, of mixed banks too."""
    from moepress.kernels.cuda import run

    bf16, fp16 = (run._Instances(dtype, 132, 227 * 1024) for dtype in (torch.bfloat16, torch.float16))
    for i, bits in enumerate(BITS):
        instances, layouts = (bf16, fp16)[i % 2], [RecordLayout(64, 2048, bits, 64)]
        yield from instances.experts(layouts, layouts, 2) if i % 3 else instances.linear(layouts)
    for units, columns in COLUMNS.items():
        layouts = [[RecordLayout(64, columns, 3, group_size)] for group_size in (32, 64, 128)]
        assert layouts[0][0].units == units
        yield from bf16.linear(layouts[0])
        yield from bf16.experts(layouts[1], layouts[2], 2)
    for most in (4, 8):
        layouts = [RecordLayout(64, 512, bits, 64) for bits in (1, 3, most)]
        yield from bf16.experts(layouts, layouts, 2)
    single = [RecordLayout(64, 2880, bits, 64) for bits in (2, 3)]
    yield from fp16.experts(single, [RecordLayout(64, 2880, 8, 64)], 2)
    factors = [RecordLayout(32, 2048, 3, 64)], [RecordLayout(64, 32, 3, 64)]
    layouts = [RecordLayout(64, 2048, bits, 64) for bits in (1, 2, 4)]
    yield from bf16.experts(layouts, layouts, 2, factors, factors)
    for instances, bits, rank in ((bf16, 3, 32), (fp16, 8, 128), (bf16, 8, 64), (fp16, 4, 8)):
        factors = [RecordLayout(rank, 2048, bits, 64)], [RecordLayout(64, rank, bits, 64)]
        layouts = [RecordLayout(64, 2048, 3, 64)]
        yield from instances.experts(layouts, layouts, 2, factors, factors)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_kernels_compile(every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path))
    requests = [Request(source, instance, "sm_90a") for source, instance in sorted(set(cases()))]
    selectors = [select_instance(torch.bfloat16, 8, few) for few in (True, False)]
    selectors += [select_instance(torch.float16, projections, True) for projections in (1, 3, 32)]
    requests += [Request(SOURCE, instance, "sm_90a") for instance in selectors]
    packed = [RecordLayout(64, columns, bits, 64) for bits in BITS for columns in COLUMNS.values()]
    requests += [Request(pack.SOURCE, pack.pack_instance(each.bits, each), "sm_90a") for each in packed]
    requests += [Request(pack.SOURCE, pack.pack_instance(8, each), "sm_90a") for each in packed if each.bits in (3, 4)]
    routers = [
        router.route_instance(dtype, router.Kind(experts, projections, wide))
        for dtype, experts, projections, wide in (
            (torch.bfloat16, 8, 8, False), (torch.bfloat16, 128, 0, False), (torch.float16, 128, 8, False),
            (torch.bfloat16, 256, 8, True), (torch.float16, 512, 32, False), (torch.bfloat16, 60, 1, False),
        )
    ]  # fmt: skip
    requests += [Request(router.SOURCE, instance, "sm_90a") for instance in routers]
    # what selectors, packing and the decode body need is there from Ampere on
    decode = [each for each in requests if each.source in ("gemv.cu", SOURCE, pack.SOURCE)]
    requests += [replace(each, arch=arch) for each in decode for arch in ("sm_80", "sm_89")]
    chosen = requests[::every]
    logs = logs_of_nvrtc(monkeypatch)
    done = compiler.warm(chosen)
    assert done.compiled == len(chosen) > 50 and done.cached == 0
    assert len(logs) == len(chosen)
    assert not [log for log in logs if SERIAL in log], "products would wait for each other"


SERIAL = "wgmma.mma_async instructions are serialized"


def logs_of_nvrtc(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compiler has to say from now on, kernel by kernel."""
    logs, call = [], compiler._nvrtc

    def nvrtc(function: str, *arguments: Any) -> Any:
        result = call(function, *arguments)
        if function == "CompileProgram":
            log = bytearray(call("GetProgramLogSize", arguments[0]))
            call("GetProgramLog", arguments[0], log)
            logs.append(log.decode(errors="replace"))
        return result

    monkeypatch.setattr(compiler, "_nvrtc", nvrtc)
    return logs


WAITED = (
    "3, 3, 1, 64, true, 32, GATE_UP, 1, 4, 1, 1, false, 0, 0",  # a way out after each record of 64 columns
    "3, 3, 1, 32, false, 64, DENSE, 1, 1, 2, 1, false, 0, 0",
    "0, 4, 4, 64, true, 24, DOWN, 1, 4, 1, 1, true, 3, 1",  # registers, once
)


@pytest.mark.parametrize("instance", WAITED)
def test_products_do_not_wait_where_they_did(instance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path))
    logs = logs_of_nvrtc(monkeypatch)
    compiler.compile_kernel("grouped.cu", f"grouped<{instance}>", "sm_90a")
    assert len(logs) == 1 and SERIAL not in logs[0]


def test_the_compiler_tells_of_products_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sums that are touched between two."""
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    shutil.copytree(compiler.SOURCES, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    kernel = """#include "wgmma.cuh"
        template <bool TOUCHES> __global__ void product(const u32* x, float* y, u32 at) {
            float d[16] = {};
            u32 a[16];
            for (int i = 0; i < 16; ++i) a[i] = x[16 * threadIdx.x + i];
            for (int i = 0; i < 2; ++i) {
                wgmma_fence();
                Wgmma<32, true>::run(d, a, swizzled_tile(at));
                wgmma_commit();
                wgmma_wait<0>();
                if (TOUCHES) d[0] += 1.f;
            }
            for (int i = 0; i < 16; ++i) y[16 * threadIdx.x + i] = d[i];
        }"""
    (sources / "product.cu").write_text(kernel)
    logs = logs_of_nvrtc(monkeypatch)
    for touches in ("false", "true"):
        compiler.compile_kernel("product.cu", f"product<{touches}>", "sm_90a", folder=sources)
    assert [SERIAL in log for log in logs] == [False, True]


def test_a_tile_is_to_its_kernel_what_it_is_to_its_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a stage and threads of a block: the launch sizes the ring, the kernel lays it out."""
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path / "cache"))
    asserts = []
    for bits, units, group_size in product((1, 3, 4, 8), COLUMNS, (32, 64, 128)):
        bank = choose.Bank((RecordLayout(64, COLUMNS[units], bits, group_size),))
        tiles = {choose.expert_tiles(bank, tokens)[0] for tokens in choose.EXAMPLES}
        tiles |= choose.every_dense_tile(bank, 132) if bits == 3 and group_size == 64 else set()
        for tile, ranks in product(tiles, (None, choose.Ranks(8, 1, 1, units), choose.Ranks(3, 1, 1, units))):
            shape = f"{tile.tokens}, {tile.row_tiles}, {tile.row_groups}, {tile.column_groups}"
            factor_bits, after = ranks.bits if ranks else 0, str(tile.scales_sums).lower()
            v_bits = f"V_BITS<{tile.tokens}, {after}, {factor_bits}>"
            config = f"Config<{units}, {group_size}, {shape}, {v_bits}, {after}>"
            ranks = ranks if tile.multiplies_v else None
            asserts += [
                f"static_assert({config}::stage_bytes({bits}) == {tile.stage_bytes(bank, ranks)});",
                f"static_assert({config}::THREADS == {tile.threads});",
                f"static_assert({config}::STAGE_SUMS == {16 * tile.tokens} || !{after});",  # a box of `map_sums`
            ]
    sources = tmp_path / "sources"
    shutil.copytree(compiler.SOURCES, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    kernel = "template <int> __global__ void none() {}"
    for name, text in (("right", asserts), ("wrong", [asserts[0].replace(" == ", " == 1 + ")])):
        (sources / f"{name}.cu").write_text("\n".join(['#include "grouped_tiles.cuh"', *text, kernel]))
    assert len(asserts) > 200 and compiler.compile_kernel("right.cu", "none<0>", "sm_90a", folder=sources).cubin
    with pytest.raises(KernelError, match="static assertion failed"):
        compiler.compile_kernel("wrong.cu", "none<0>", "sm_90a", folder=sources)


def test_parts_that_a_benchmark_leaves_out_are_in_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a GPU to run, so nobody would notice that a text has changed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    stripped = importlib.import_module("stripped")
    for source, *_, parts in stripped.RUNS:
        texts = compiler._texts(f"{source}.cu", compiler.SOURCES)
        for edits in parts.values():
            assert stripped.without(source, texts, edits) != texts
    for other in ("", "a b a"):  # not there, and there twice
        with pytest.raises(SystemExit, match="cannot be left out: a"):
            stripped.without("gemv.cu", {"gemv.cu": other, "factor.cuh": ""}, (("a", "c"),))
    with pytest.raises(SystemExit, match="cannot be left out: a"):
        stripped.without("gemv.cu", {"gemv.cu": "a", "factor.cuh": "a"}, (("a", "c"),))


def test_mixed_widths_are_compiled_and_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """By benchmarks: kernels for several widths alone, and a mean over the experts that are read."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    compiling, times = importlib.import_module("compiling"), importlib.import_module("kernel_times")
    found = [instance for source, instance in compiling.kernels("mixed") if source != "route.cu"]
    assert all(re.match(r"(gemv|grouped)<0, 4, ", each) or ", PLAIN, " in each for each in found)
    assert any(", PLAIN, " in each for each in found) and any(
        "24, DOWN, 1, 4, 1, 1, true, 3, " in each for each in found
    )
    assert times.mean_of_read([1, 2, 3, 4], torch.tensor([[0, 3]])) == 2.5
    assert times.mean_of_read([1, 2, 3, 4], torch.tensor([[0, 4], [4, 5]])) == pytest.approx(4 / 3)


def test_a_timeline_stamps_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Likewise; and kernels with stamps compile."""
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    timeline = importlib.import_module("timeline")
    monkeypatch.setattr(compiler, "_texts", compiler._texts)
    shapes = (4, "GATE_UP", "4, 8"), (1, "DOWN", "32, 1")
    instances = [f"gemv<3, 3, 4, 64, true, {tokens}, {mode}, {team}, 3, 1>" for tokens, mode, team in shapes]
    plain = [compiler.compile_kernel("gemv.cu", instance, "sm_90a").cubin for instance in instances]
    timeline.leave_out("gemv.cu", timeline.edits(132))
    stamped = [compiler.compile_kernel("gemv.cu", instance, "sm_90a").cubin for instance in instances]
    assert not {*plain} & {*stamped}


def test_a_timeline_counts_from_the_first_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    timeline = importlib.import_module("timeline")
    stamps = torch.zeros(2, 2, 3, timeline.WARPS, len(timeline.PLACES), dtype=torch.int64)
    stamps[0, 0, 1, 0, 0], stamps[0, 0, 2, 5, 0], stamps[0, 1, 0, 0, 9] = 7000, 9000, 27000
    stamps[1, 0, 1, 0, 0] = 10**18  # a clock of its own: only differences within a call count
    found = {(launch, what): figures for launch, what, figures in timeline.summarise(stamps)}
    assert list(found) == [("gate and up", "begins"), ("down", "ends")]
    assert found["gate and up", "begins"] == pytest.approx([0, 0, 0, 1.6, 2]) and found["down", "ends"] == [20] * 5
