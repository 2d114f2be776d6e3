# SPDX-License-Identifier: Apache-2.0
"""Which row blocks the groups of `gemv` take, by its own code on the CPU: each one once, or t is never complete."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from on_cpu import build, needs_compiler

from moepress.kernels.cuda.few import inverse

pytestmark = needs_compiler
GROUPS = (1, 4), (1, 6), (1, 8), (2, 4), (2, 8), (4, 4), (8, 4), (8, 8)
"""Groups of W, and of v, in a block."""
TEXT = """
#include <algorithm>
using std::max, std::min;
#define __device__
#define __forceinline__
#include "gemv_shares.cuh"
template <int GROUPS, int V_GROUPS>
void find(int* to, int blocks, int block, int group, int segmented, int segments, int items) {
    Shares<GROUPS, V_GROUPS> s(blocks, block, group % GROUPS, group % V_GROUPS, segmented);
    if (segments >= 0) s.spread_v(blocks, block, group % V_GROUPS, segments, items);
    to[0] = s.first, to[1] = s.stride, to[2] = s.first_of_v, to[3] = s.stride_of_v;
}
extern "C" int part_of(int all, int stride) { return even_part<4>(all, stride); }
extern "C" int quotient_of(int i, unsigned inverse) { return divide(i, inverse); }
"""
CALL = """
extern "C" void find_{0}_{1}(int* to, int a, int b, int c, int d, int e, int f) {{
    find<{0}, {1}>(to, a, b, c, d, e, f);
}}"""
Find = Callable[..., tuple[int, int, int, int]]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    calls = (CALL.format(*each) for each in GROUPS)
    return build(tmp_path_factory.mktemp("shares"), "\n".join([TEXT, *calls]))


@pytest.fixture(scope="module")
def find(code: ctypes.CDLL) -> Find:
    """First row block and stride of W, and of v, of the groups of one number."""

    def find(groups: tuple[int, int], *given: int) -> tuple[int, int, int, int]:
        found = (ctypes.c_int * 4)()
        code["find_{}_{}".format(*groups)](found, *given)
        return tuple(found)

    return find


Taken = dict[tuple[int, int], int]
"""How many row blocks each (block, group) takes."""


def taken(find: Find, groups: tuple[int, int], blocks: int, counts: tuple[int, int], *given: int) -> list[Taken]:
    """Of W's and of v's row blocks, of which there are so many. Fails where not each has one group."""
    lists: list[dict[tuple[int, int], list[int]]] = [{}, {}]
    for own, count, sized, at in zip(lists, counts, groups, (0, 2), strict=True):
        for block, group in product(range(blocks), range(sized)):
            first, stride = find(groups, blocks, block, group, *given)[at : at + 2]
            own[block, group] = list(range(first, count, stride)) if first < count else []
        assert sorted(each for some in own.values() for each in some) == list(range(count))
    return [{where: len(some) for where, some in own.items()} for own in lists]


@given(
    groups=st.sampled_from(GROUPS), blocks=st.integers(1, 140), items=st.integers(0, 300),
    row_blocks=st.integers(0, 3000),
)  # fmt: skip
@example(groups=(8, 4), blocks=132, items=32, row_blocks=768)
def test_each_row_block_has_a_group(
    find: Find, groups: tuple[int, int], blocks: int, items: int, row_blocks: int
) -> None:
    of_w, of_v = taken(find, groups, blocks, (row_blocks, items), 0, -1, 0)
    assert max(of_w.values()) - min(of_w.values()) <= 1
    with_v = {block for (block, _), count in of_v.items() if count}
    assert max(of_v.values()) == -(-items // (blocks * groups[1])) and len(with_v) == min(items, blocks)
    if groups[0] == groups[1] and -(-row_blocks // blocks) - (-items // blocks) <= groups[0]:
        assert not any(of_w[where] and of_v[where] for where in of_w), "groups that have none of W are enough"


@given(all=st.integers(0, 20_000), stride=st.integers(1, 1200))
@example(all=6, stride=1)
@example(all=9, stride=1)
@example(all=13, stride=1)
@example(all=17, stride=1)
def test_turns_are_parted_evenly(code: ctypes.CDLL, all: int, stride: int) -> None:
    turns = -(-all // stride)
    parts = -(-turns // 4)
    assert code.part_of(all, stride) == (-(-turns // parts) if turns else 0)


@given(rows=st.integers(1, 4096), place=st.integers(0, 64 * 4096))
@example(rows=1, place=63)
@example(rows=3, place=191)
@example(rows=4096, place=64 * 4096 - 1)
def test_divisions_are_exact(code: ctypes.CDLL, rows: int, place: int) -> None:
    """For up to 64 experts, of 4096 row blocks of v each."""
    item = place % (64 * rows)
    assert code.quotient_of(item, ctypes.c_uint32(inverse(rows))) == item // rows


@given(blocks=st.integers(1, 140), segments=st.integers(1, 1500), items=st.integers(0, 4096))
@example(blocks=132, segments=612, items=204)
@example(blocks=132, segments=131, items=4096)  # one block has one less, and two a group would be more than all blocks
def test_with_whole_segments(find: Find, blocks: int, segments: int, items: int) -> None:
    of_w, of_v = taken(find, (8, 8), blocks, (8 * segments, items), 1, segments, items)
    for block in range(blocks):
        assert len({of_w[block, group] for group in range(8)}) == 1, "eight groups make a segment"
    with_v = {block for (block, _), count in of_v.items() if count}
    assert max(of_v.values()) <= max(2, -(-items // (8 * blocks)))
    fewer = sum(of_w[block, 0] == segments // blocks for block in range(blocks))
    if 16 * fewer >= items:
        assert all(of_w[block, 0] == segments // blocks for block in with_v), "blocks that have one less are enough"
    if (items + 1) // 2 <= fewer:
        assert len(with_v) == (items + 1) // 2, "two in each"
