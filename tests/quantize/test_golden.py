# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of real weights: a change of numerics shows as a change of tests/golden/demo_layer.txt in the diff.

    MOEPRESS_UPDATE_GOLDEN=1 pytest tests/quantize/test_golden.py        writes that file anew

Bytes must be equal. Errors may differ by 0.5 %, since another BLAS rounds sums differently and HQQ and the alternation
carry that on. RTN sums nothing, so its packed codes must be the same on every machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moepress.format.spec import WeightSpec
from moepress.quantize.job import compress_weight

DemoWeight = Callable[[str], torch.Tensor]
GOLDEN = Path(__file__).parent.parent / "golden" / "demo_layer.txt"
UPDATE = os.environ.get("MOEPRESS_UPDATE_GOLDEN") == "1"
TOLERANCE = 0.005
ITERATIONS = 3
"""Few, because each alternation carries differences of rounding further."""

QUERY, OUT = "0.self_attn.q_proj", "3.self_attn.o_proj"
DOWN, SHARED = "1.mlp.experts.5.down_proj", "2.mlp.shared_expert.up_proj"
CASES = [
    (name, method, tag)
    for name in (QUERY, DOWN)
    for method in ("rtn", "hqq")
    for tag in ("b1g64", "b2g64", "b3g64", "b4g64")
] + [
    (OUT, "rtn", "b3g32"), (OUT, "hqq", "b3g128"), (SHARED, "rtn", "b8g64"), (SHARED, "hqq", "b6g32"),
    (QUERY, "milo", "b3g64r16f3"), (QUERY, "milo", "b2g64r32f3"), (OUT, "milo", "b3g64r8f16"),
    (DOWN, "milo", "b1g64r16f4"),
    (DOWN, "milo", "b3g64r4f3"), (DOWN, "milo", "b4g64r8f8"), (SHARED, "milo", "b3g128r5f3"),
]  # fmt: skip


def compute(case: tuple[str, str, str], demo_weight: DemoWeight) -> list[str]:
    """One line of the file, in words: weight, method, spec, stored bytes, relative error, sha256 of RTN's codes."""
    name, method, tag = case
    done = compress_weight(name, demo_weight(name), WeightSpec.parse(tag), method, ITERATIONS)
    size = sum(tensor.numel() * tensor.element_size() for tensor in done.parts.values())
    codes = hashlib.sha256(done.parts["packed"].numpy().tobytes()).hexdigest() if method == "rtn" else "-"
    return [name, method, tag, str(size), f"{done.error:.4g}", codes]


def recorded() -> dict[tuple[str, str, str], list[str]]:
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    return {(words[0], words[1], words[2]): words for words in lines}


@pytest.mark.skipif(not UPDATE, reason="writes the golden file; set MOEPRESS_UPDATE_GOLDEN=1 to do that")
def test_write_the_golden_file(demo_weight: DemoWeight) -> None:
    head = (
        "# weight of the embedded model, method, spec, stored bytes, relative error, sha256 of the packed codes (rtn)\n"
    )
    lines = [" ".join(compute(case, demo_weight)) + "\n" for case in CASES]
    GOLDEN.write_text(head + "".join(lines))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case))
def test_numbers_are_those_recorded(case: tuple[str, str, str], demo_weight: DemoWeight) -> None:
    *_, size, error, codes = recorded()[case]
    *_, found_size, found_error, found_codes = compute(case, demo_weight)
    assert (found_size, found_codes) == (size, codes)
    assert float(found_error) == pytest.approx(float(error), rel=TOLERANCE)


def test_the_file_holds_these_cases_and_no_others() -> None:
    assert list(recorded()) == CASES
