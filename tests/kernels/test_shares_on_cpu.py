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

pytestmark = needs_compiler
GROUPS = 1, 2, 4, 8
TEXT = """
#include <algorithm>
using std::max, std::min;
#define __device__
#define __forceinline__
#include "gemv_shares.cuh"
template <int GROUPS>
void find(int* to, int blocks, int block, int group, int segmented, int apart, int all, int segments, int items) {
    Shares<GROUPS> s(blocks, block, group, segmented, apart, all);
    if (segments >= 0) s.spread_v(blocks, block, group, segments, items);
    to[0] = s.first, to[1] = s.stride, to[2] = s.first_of_v, to[3] = s.stride_of_v;
}
"""
CALL = """
extern "C" void find_{0}(int* to, int a, int b, int c, int d, int e, int f, int g, int h) {{
    find<{0}>(to, a, b, c, d, e, f, g, h);
}}"""
Find = Callable[..., tuple[int, int, int, int]]


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Find:
    """First row block and stride of W, and of v, of one group."""
    library = build(tmp_path_factory.mktemp("shares"), "\n".join([TEXT, *map(CALL.format, GROUPS)]))

    def find(groups: int, *given: int) -> tuple[int, int, int, int]:
        found = (ctypes.c_int * 4)()
        library[f"find_{groups}"](found, *given)
        return tuple(found)

    return find


Taken = dict[tuple[int, int], int]
"""How many row blocks each (block, group) takes."""


def taken(find: Find, groups: int, blocks: int, counts: tuple[int, int], *given: int) -> list[Taken]:
    """Of W's and of v's row blocks, of which there are so many. Fails where not each has one group."""
    lists: list[dict[tuple[int, int], list[int]]] = [{}, {}]
    for block, group in product(range(blocks), range(groups)):
        found = find(groups, blocks, block, group, *given)
        for i, count in enumerate(counts):
            first, stride = found[2 * i : 2 * i + 2]
            lists[i][block, group] = list(range(first, count, stride)) if first < count else []
    for own, count in zip(lists, counts, strict=True):
        assert sorted(each for some in own.values() for each in some) == list(range(count))
    return [{where: len(some) for where, some in own.items()} for own in lists]


@given(
    groups=st.sampled_from(GROUPS), blocks=st.integers(1, 140), apart=st.integers(0, 300),
    row_blocks=st.integers(0, 3000),
)  # fmt: skip
@example(groups=8, blocks=132, apart=32, row_blocks=768)
@example(groups=8, blocks=132, apart=24, row_blocks=1056)  # the others have too few groups
def test_each_row_block_has_a_group(find: Find, groups: int, blocks: int, apart: int, row_blocks: int) -> None:
    items = apart or 7
    of_w, of_v = taken(find, groups, blocks, (row_blocks, items), 0, apart, row_blocks, -1, 0)
    assert max(of_w.values()) - min(of_w.values()) <= 1
    with_v = {block for (block, _), count in of_v.items() if count}
    if apart and row_blocks <= (blocks - (apart + 1) // 2) * groups:
        assert len(with_v) == (apart + 1) // 2 and max(of_v.values()) == (1 if groups > 1 else min(apart, 2))
        assert not any(count for (block, _), count in of_w.items() if block in with_v), "v has blocks of its own"
    else:
        assert max(of_v.values()) == -(-items // (blocks * groups)) and len(with_v) == min(items, blocks)
        if -(-row_blocks // blocks) - (-items // blocks) <= groups:
            assert not any(of_w[where] and of_v[where] for where in of_w), "groups that have none of W are enough"


@given(blocks=st.integers(1, 140), segments=st.integers(1, 1500), items=st.integers(0, 4096))
@example(blocks=132, segments=612, items=204)
@example(blocks=132, segments=131, items=4096)  # one block has one less, and two a group would be more than all blocks
def test_with_whole_segments(find: Find, blocks: int, segments: int, items: int) -> None:
    of_w, of_v = taken(find, 8, blocks, (8 * segments, items), 1, 0, 8 * segments, segments, items)
    for block in range(blocks):
        assert len({of_w[block, group] for group in range(8)}) == 1, "eight groups make a segment"
    with_v = {block for (block, _), count in of_v.items() if count}
    assert max(of_v.values()) <= max(2, -(-items // (8 * blocks)))
    fewer = sum(of_w[block, 0] == segments // blocks for block in range(blocks))
    if 16 * fewer >= items:
        assert all(of_w[block, 0] == segments // blocks for block in with_v), "blocks that have one less are enough"
    if (items + 1) // 2 <= fewer:
        assert len(with_v) == (items + 1) // 2, "two in each"
