# SPDX-License-Identifier: Apache-2.0
"""What a timed layer must read and compute, how it is asked for, and how many copies keep caches cold."""

from __future__ import annotations

import pytest
import torch
from benching import CPU

from moepress.bench import clock as clocks
from moepress.bench.clock import calls_in_graph, copies_needed
from moepress.bench.problems import DENSE, LAYERS, MOE, Problem, parse_shape, parse_tokens

MB = 1e6


@pytest.mark.parametrize(
    ("layer", "tokens", "experts", "bits", "megabytes"),
    [
        ("mixtral-8x7b", 1, 2, 3.5, 154),
        ("mixtral-8x7b", 1, 2, 16, 705),
        ("mixtral-8x7b", 64, 8, 3.5, 625),
        ("mixtral-8x7b", 1024, 8, 3.5, 751),
        ("mixtral-8x7b", 4096, 8, 16, 3355),
        ("qwen3-30b-a3b", 1, 8, 3.5, 16.5),
        ("qwen3-30b-a3b", 256, 128, 3.25, 254),
        ("gpt-oss-120b", 1, 4, 3.5, 43.6),
        ("deepseek-v3", 1, 8, 3.25, 143),
        ("deepseek-v3", 1024, 256, 3.5, 5029),
    ],
)
def test_bytes_are_those_of_the_rooflines_worked_out_by_hand(
    layer: str, tokens: int, experts: int, bits: float, megabytes: float
) -> None:
    problem = Problem(MOE, LAYERS[layer], tokens)
    total = problem.weight_bytes(bits, experts) + problem.activation_bytes
    assert total / MB == pytest.approx(megabytes, abs=0.5 if megabytes > 50 else 0.05)


def test_counts_of_a_dense_weight() -> None:
    problem = Problem(DENSE, (8192, 4096), 16)
    assert problem.weight_bytes(3.5) == 8192 * 4096 * 7 // 16
    assert problem.activation_bytes == 2 * 16 * (8192 + 4096)
    assert problem.flops == 2 * 16 * 8192 * 4096
    assert problem.draw(0, CPU).hit == problem.experts == 1


def test_flops_of_experts() -> None:
    assert Problem(MOE, LAYERS["mixtral-8x7b"], 1).flops == pytest.approx(0.70e9, rel=0.01)
    assert Problem(MOE, LAYERS["deepseek-v3"], 1024).flops == pytest.approx(722e9, rel=0.001)


@pytest.mark.parametrize(
    ("layer", "factor_bits", "added"), [("mixtral-8x7b", 4.25, 0.043), ("qwen3-30b-a3b", 16, 0.917)]
)
def test_compensators_are_counted_at_their_stored_width(layer: str, factor_bits: float, added: float) -> None:
    assert Problem(MOE, LAYERS[layer], 1, rank=32).factor_bits_per_weight(factor_bits) == pytest.approx(added, abs=5e-4)
    assert Problem(MOE, LAYERS[layer], 1).factor_bits_per_weight(factor_bits) == 0


def test_a_drawn_routing_is_fixed_distinct_and_as_wide_as_chance() -> None:
    problem = Problem(MOE, (128, 8, 64, 32), 64)
    first, again, other = problem.draw(3, CPU), problem.draw(3, "cpu"), problem.draw(4, CPU)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.x, again.x)
    assert not torch.equal(first.ids, other.ids)
    assert all(len(set(row)) == 8 for row in first.ids.tolist())
    assert first.weights.sum(1) == pytest.approx(torch.ones(64), abs=1e-6)
    assert first.hit == len(set(first.ids.flatten().tolist()))
    expected = 128 * (1 - (1 - 8 / 128) ** 64)
    assert abs(first.hit - expected) < 6


def test_shapes_are_parsed() -> None:
    assert parse_shape(None, None, None) == (MOE, (8, 2, 4096, 14336), "mixtral-8x7b")
    assert parse_shape("deepseek-v3", None, None)[1] == (256, 8, 7168, 2048)
    assert parse_shape(None, "8192X4096", None) == (DENSE, (8192, 4096), "")
    assert parse_shape(None, None, "16, 4,2048,768") == (MOE, (16, 4, 2048, 768), "")
    assert parse_tokens("1,8,4096") == (1, 8, 4096)


def test_copies_read_more_than_four_caches() -> None:
    l2, read = 60_000_000, 22_700_000
    copies = copies_needed(read, 8 * read, l2, 1 << 40)
    assert copies == 11 and copies * read > clocks.CACHES * l2 >= (copies - 1) * read
    assert copies_needed(clocks.CACHES * l2, 10**9, l2, 10**12) == 2  # four caches are not more than four caches


def test_copies_are_two_at_least_and_what_fits_at_most() -> None:
    assert copies_needed(10**9, 3 * 10**9, 60_000_000, 10**11) == 2
    assert copies_needed(10**6, 10**9, 60_000_000, 10 * 10**9) == 4  # 40 % of what is free
    assert copies_needed(10**6, 4 * 10**9, 60_000_000, 10 * 10**9) == 2
    assert copies_needed(100, 100, 60_000_000, 1 << 40) == clocks.MOST_COPIES
    with pytest.raises(MemoryError, match="two copies of the weights take 12,000,000,000 bytes"):
        copies_needed(10**6, 6 * 10**9, 60_000_000, 10 * 10**9)


@pytest.mark.parametrize(("copies", "calls"), [(1, 20), (2, 20), (3, 21), (11, 22), (20, 20), (21, 21), (64, 64)])
def test_a_graph_calls_every_copy_equally_often(copies: int, calls: int) -> None:
    assert calls_in_graph(copies) == calls
