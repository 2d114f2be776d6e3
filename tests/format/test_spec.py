# SPDX-License-Identifier: Apache-2.0
"""A spec's tag says everything about it, and its arithmetic predicts the very bytes that a job stores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import PlanError
from moepress.format.spec import BITS, FACTOR_BITS, GROUP_SIZES, ITEM_BYTES, WeightSpec, check_shape, packed_bytes
from moepress.quantize.job import compress_weight
from strategies import sides, weight_specs

DTYPES = {"U8": torch.uint8, "F16": torch.float16}


@given(weight_specs())
def test_parse_is_the_inverse_of_tag(spec: WeightSpec) -> None:
    assert WeightSpec.parse(spec.tag) == spec


@given(weight_specs(), weight_specs())
def test_tags_tell_specs_apart(one: WeightSpec, other: WeightSpec) -> None:
    assert (one.tag == other.tag) == (one == other)


def test_tags_read_as_documented() -> None:
    assert WeightSpec(bits=3).tag == "b3g64"
    assert WeightSpec(bits=3, rank=16, factor_bits=3).tag == "b3g64r16f3"


@pytest.mark.parametrize(
    "tag",
    ["", "b3", "g64", "b3g64 ", " b3g64", "B3g64", "b03g64", "b3g064", "b3g64r0f3", "b3g64r16", "b3g64f3", "b7g64",
     "b3g64r016f3", "b3g64r16f03", "b3g63", "b3g64r16f5", "b-3g64", "b3.0g64", "b3g64r16f3x", "b٣g64", "b3g64\n",
     None, 3, []],
)  # fmt: skip
def test_no_other_text_is_a_tag(tag: object) -> None:
    with pytest.raises(PlanError):
        WeightSpec.parse(tag)  # type: ignore[arg-type]


@given(st.text(max_size=20))
def test_whatever_parses_is_canonical(text: str) -> None:
    try:
        spec = WeightSpec.parse(text)
    except PlanError:
        return
    assert spec.tag == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 7}, "bits 7 is not supported; choose one of 1, 2, 3, 4, 5, 6, 8"),
        ({"bits": 0}, "bits 0 is not"),
        ({"bits": 3.0}, "bits 3.0 is not"),
        ({"bits": True}, "bits True is not"),
        ({"bits": 3, "group_size": 65}, "group_size 65 is not supported; choose one of 32, 64, 128"),
        ({"bits": 3, "rank": -1}, "rank -1 is negative"),
        ({"bits": 3, "rank": 1.5, "factor_bits": 3}, "rank 1.5 is not a whole number"),
        ({"bits": 3, "rank": 0, "factor_bits": 3}, "factor_bits 3 without a compensator"),
        ({"bits": 3, "rank": 4}, "factor_bits 0 is not supported"),
        ({"bits": 3, "rank": 4, "factor_bits": 5}, "factor_bits 5 is not supported; choose one of 3, 4, 8, 16"),
    ],
)
def test_values_that_cannot_be_stored_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        WeightSpec(**arguments)


@given(weight_specs(max_rank=300), sides, sides)
def test_num_bytes_is_the_sum_of_the_parts(spec: WeightSpec, n: int, k: int) -> None:
    sizes = [ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in spec.parts(n, k).values()]
    assert spec.num_bytes(n, k) == sum(sizes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("group_size", "rank", "factor_bits", "n", "k"),
    [(64, 0, 0, 24, 128), (32, 3, 3, 17, 100), (128, 5, 4, 9, 130), (64, 8, 8, 16, 65), (32, 7, 16, 7, 33)],
)
def test_the_bytes_predicted_are_the_bytes_stored(
    bits: int, group_size: int, rank: int, factor_bits: int, n: int, k: int
) -> None:
    spec = WeightSpec(bits=bits, group_size=group_size, rank=rank, factor_bits=factor_bits)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    parts = compress_weight("w", weight, spec, "milo" if rank else "hqq", iterations=1).parts
    predicted = spec.parts(n, k)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()} == {
        name: (DTYPES[dtype], shape) for name, (dtype, shape) in predicted.items()
    }
    assert sum(tensor.numel() * tensor.element_size() for tensor in parts.values()) == spec.num_bytes(n, k)


def test_the_bits_of_the_headline() -> None:
    # 3 bits and two fp16 numbers for 64 weights: 3.5 bits a weight
    assert WeightSpec(bits=3).num_bytes(4096, 4096) * 8 == 3.5 * 4096 * 4096
    # an INT3 factor costs 3.25 bits a value
    with_factors = WeightSpec(bits=3, rank=64, factor_bits=3).num_bytes(4096, 4096)
    assert (with_factors - WeightSpec(bits=3).num_bytes(4096, 4096)) * 8 == 3.25 * 64 * 8192


@given(st.integers(0, 10**6), st.sampled_from(range(1, 9)))
def test_packed_bytes_rounds_up_once(count: int, bits: int) -> None:
    assert packed_bytes(count, bits) == math.ceil(count * bits / 8)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
def test_shapes_that_fit_are_accepted_to_the_edge(group_size: int, factor_bits: int) -> None:
    check_shape("w", WeightSpec(bits=3, group_size=group_size), 1, group_size)
    check_shape("w", WeightSpec(bits=3, group_size=group_size, rank=9, factor_bits=factor_bits), 9, group_size)


def test_shapes_that_do_not_fit_are_named_with_the_way_out() -> None:
    with pytest.raises(PlanError, match=r"blk\.w: in_features 63 is smaller than group_size 64; use --group-size 32"):
        check_shape("blk.w", WeightSpec(bits=3), 9, 63)
    with pytest.raises(PlanError, match=r"in_features 31 .* no group size .* --keep 'blk\.w'"):
        check_shape("blk.w", WeightSpec(bits=3), 9, 31)
    with pytest.raises(PlanError, match=r"blk\.w: rank 10 exceeds the smaller side of its shape \(9, 64\)"):
        check_shape("blk.w", WeightSpec(bits=3, rank=10, factor_bits=3), 9, 64)
