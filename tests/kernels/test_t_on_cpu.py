# SPDX-License-Identifier: Apache-2.0
"""Where t's columns lie in its rows, by the kernels' own code on the CPU: each in one place, as products take them."""

from __future__ import annotations

import ctypes
import re

import pytest
from on_cpu import build, needs_compiler

from moepress.kernels.cuda.compiler import SOURCES
from moepress.kernels.factors import stored_rank

pytestmark = needs_compiler
RANKS = sorted({halves * stored_rank(rank) for rank in range(1, 600) for halves in (1, 2)})
"""Columns of u."""
FUNCTIONS = "t_columns", "t_place"
TEXT = """#define __device__
#define __forceinline__
constexpr int UNIT = 64;
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = (SOURCES / "factor.cuh").read_text(encoding="utf-8")
    found = [re.findall(rf"^__device__ __forceinline__ int {name}\(.*?}}$", source, re.M | re.S) for name in FUNCTIONS]
    assert [len(each) for each in found] == [1, 1], f"factor.cuh has no longer {FUNCTIONS}"
    return build(tmp_path_factory.mktemp("t"), TEXT + "\n".join(f'extern "C" {text}' for (text,) in found))


@pytest.mark.parametrize("columns", RANKS)
def test_each_column_has_a_place_of_its_own(places: ctypes.CDLL, columns: int) -> None:
    wide = max(32, columns)
    assert places.t_columns(columns) == wide, "as `Factors.t_columns`"
    assert sorted(places.t_place(column, columns) for column in range(wide)) == list(range(wide))


@pytest.mark.parametrize("columns", RANKS)
def test_a_lane_has_its_columns_side_by_side(places: ctypes.CDLL, columns: int) -> None:
    """Of each octet two, which are a word: lanes load 16 bytes, or twice as many (`load_t`, `load_half_t`)."""
    for unit in range(-(-columns // 64)):
        octets = 8 if columns >= 64 else 4
        for lane in range(4):
            wanted = [64 * unit + 8 * octet + 2 * lane + i for octet in range(octets) for i in range(2)]
            begin = 64 * unit + lane * 2 * octets
            found = [places.t_place(column, columns) for column in wanted]
            assert found == list(range(begin, begin + 2 * octets))
