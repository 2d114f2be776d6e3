# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies that several test files draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from moepress.format.spec import BITS, FACTOR_BITS, GROUP_SIZES, WeightSpec


@st.composite
def weight_specs(draw: st.DrawFn, max_rank: int = 999_999) -> WeightSpec:
    """Any spec that the format can store, with and without a compensator."""
    rank = draw(st.one_of(st.just(0), st.integers(1, max_rank)))
    return WeightSpec(
        bits=draw(st.sampled_from(BITS)),
        group_size=draw(st.sampled_from(GROUP_SIZES)),
        rank=rank,
        factor_bits=draw(st.sampled_from(FACTOR_BITS)) if rank else 0,
    )


def shapes_for(*specs: WeightSpec) -> st.SearchStrategy[tuple[int, int]]:
    """Shapes (N, K) that every one of the specs can be applied to."""
    rank = max(spec.rank for spec in specs)
    group_size = max(spec.group_size for spec in specs)
    return st.tuples(st.integers(max(rank, 1), 2**20), st.integers(max(rank, group_size), 2**20))


module_names = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.é", min_size=1, max_size=30)
sides = st.integers(1, 2**20)
