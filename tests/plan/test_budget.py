# SPDX-License-Identifier: Apache-2.0
"""Budgets: every form that a user may type, exactly, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.plan.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18GB", 18 * 10**9),
        ("18GiB", 18 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5 MiB", 3 * 2**19),
        ("0.5kB", 500),
        ("2KiB", 2048),
        ("123456789B", 123456789),
        (" 18gb ", 18 * 10**9),
        ("0.3333333GB", 333333300),
    ],
)
def test_sizes_are_bytes_of_everything(text: str, expected: int) -> None:
    budget = parse_budget(text)
    assert (budget.total_bytes, budget.bpw) == (expected, None)
    assert budget.bytes_for(10, 100) == expected - 100


def test_bits_per_weight_are_of_compressed_weights_alone() -> None:
    budget = parse_budget("2.5bpw")
    assert (budget.bpw, budget.total_bytes) == (Fraction(5, 2), None)
    assert budget.bytes_for(16, 0) == budget.bytes_for(16, 10**9) == 5
    assert parse_budget("2.1bpw").bytes_for(80, 0) == 21  # exact: 2.1 * 80 / 8 is 21.000000000000004 in floats
    assert parse_budget("3 BPW").bytes_for(9, 0) == 3


@given(st.integers(1, 10**12), st.integers(0, 10**12))
def test_bytes_come_back_as_they_were(size: int, kept: int) -> None:
    budget = parse_budget(f"{size}B")
    if size > kept:
        assert budget.bytes_for(1, kept) == size - kept
    else:
        with pytest.raises(PlanError, match=f"budget {size}B is {size:,} bytes, and what is kept .* takes {kept:,}"):
            budget.bytes_for(1, kept)


@pytest.mark.parametrize(
    "text",
    ["", "18", "GB", "2.5", "2.5 bits", "-1GB", "1e9B", "1,5GB", "18GBs", "nanbpw", "٣GB", ".5GB", "1.GB", "3TB"],
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"is not understood; write bits per weight \(2\.5bpw\) or a size"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0bpw", "0 bits per weight is not above 0 and at most 16"),
        ("16.5bpw", "16.5 bits per weight is not above 0"),
        ("0GB", "is 0 bytes; give a whole number of bytes"),
        ("1.5B", r"is 1\.5 bytes; give a whole"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_budget(text)


def test_a_model_without_weights_has_no_budget() -> None:
    with pytest.raises(PlanError, match="there is no weight to compress"):
        Budget(text="1bpw", bpw=Fraction(1)).bytes_for(0, 0)
