# SPDX-License-Identifier: Apache-2.0
"""One weight's job: which solver runs, what it stores, the error it reports, and that it is a function of its input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moepress.errors import CheckpointError
from moepress.format.packing import unpack_codes
from moepress.format.spec import WeightSpec
from moepress.format.weight import dequantize
from moepress.quantize.hqq import hqq
from moepress.quantize.job import compress_weight, relative_error
from moepress.quantize.rtn import rtn

Gaussian = Callable[..., torch.Tensor]
METHODS = ("rtn", "hqq", "milo")
PLAIN = WeightSpec(bits=3)
RANKED = WeightSpec(bits=3, rank=6, factor_bits=3)


@pytest.fixture
def weight(gaussian: Gaussian) -> torch.Tensor:
    return gaussian(40, 150).bfloat16()


def specs_of(method: str) -> list[WeightSpec]:
    return [PLAIN, RANKED] if method == "milo" else [PLAIN]


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_bytes(method: str, weight: torch.Tensor) -> None:
    for spec in specs_of(method):
        torch.manual_seed(1)
        one = compress_weight("w", weight, spec, method, 3)
        torch.manual_seed(2)
        again = compress_weight("w", weight.clone(), spec, method, 3)
        assert same_bytes(one.parts, again.parts)
        assert (one.error, one.alternations) == (again.error, again.alternations)


def test_the_name_is_the_seed_of_compensators_alone(weight: torch.Tensor) -> None:
    one, other = (compress_weight(name, weight, RANKED, "milo", 3) for name in ("a", "b"))
    assert not same_bytes(one.parts, other.parts)
    assert one.error == pytest.approx(other.error, rel=0.05)
    for method in METHODS:
        one, other = (compress_weight(name, weight, PLAIN, method) for name in ("a", "b"))
        assert same_bytes(one.parts, other.parts)


@pytest.mark.parametrize(("method", "solve"), [("rtn", rtn), ("hqq", hqq), ("milo", hqq)])
def test_without_a_rank_the_base_alone_is_stored(method: str, solve: Callable, weight: torch.Tensor) -> None:
    done = compress_weight("w", weight, PLAIN, method)
    base = solve("w", weight, 3, 64)
    assert done.parts.keys() == {"packed", "scale", "zero"}
    assert torch.equal(unpack_codes(done.parts["packed"], 3, 150), base.codes)
    assert torch.equal(done.parts["scale"], base.scale) and torch.equal(done.parts["zero"], base.zero)
    assert done.alternations == 0


def test_milo_stores_factors_and_counts_alternations(weight: torch.Tensor) -> None:
    done = compress_weight("w", weight, RANKED, "milo", iterations=3)
    assert done.parts.keys() == {"packed", "scale", "zero", "u_packed", "u_scale", "v_packed", "v_scale"}
    assert done.alternations == 3
    assert compress_weight("w", weight, RANKED, "milo", iterations=0).alternations == 0


def test_methods_lose_less_in_their_order(weight: torch.Tensor) -> None:
    plain, fitted, compensated = (
        compress_weight("w", weight, specs_of(method)[-1], method).error for method in METHODS
    )  # fmt: skip
    assert plain > fitted > compensated


def test_refitting_reaches_the_factors(weight: torch.Tensor) -> None:
    with_it, without = (compress_weight("w", weight, RANKED, "milo", 3, refit) for refit in (True, False))
    assert torch.equal(with_it.parts["packed"], without.parts["packed"])
    assert not torch.equal(with_it.parts["u_packed"], without.parts["u_packed"])
    assert with_it.error < without.error


@pytest.mark.parametrize("factor_bits", [3, 4, 8, 16])
@pytest.mark.parametrize("shape", [(40, 150), (7, 64), (3000, 70), (70, 3000)])
def test_the_error_is_that_of_what_is_stored(factor_bits: int, shape: tuple[int, int], gaussian: Gaussian) -> None:
    weight = gaussian(*shape).bfloat16()
    spec = WeightSpec(bits=2, rank=4, factor_bits=factor_bits)
    done = compress_weight("w", weight, spec, "milo", 1)
    exact, found = weight.double(), dequantize(done.parts, spec, *shape).double()
    direct = torch.linalg.matrix_norm(exact - found) / torch.linalg.matrix_norm(exact)
    assert done.error == pytest.approx(direct.item(), rel=1e-5)


def test_the_error_takes_every_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # one row of 2^22 columns is a chunk: the error of each must count
    weight = torch.zeros(3, 1 << 22)
    weight[0], weight[2, ::2] = 1.0, 3.0
    parts = {
        "packed": torch.zeros(3, 1 << 20, dtype=torch.uint8),
        "scale": torch.ones(3, 1 << 16).half(),
        "zero": torch.zeros(3, 1 << 16).half(),
    }
    assert relative_error(weight, parts, WeightSpec(bits=2)) == 1.0
    parts["zero"][0] = -1.0
    expected = (4.5 / 5.5) ** 0.5
    assert relative_error(weight, parts, WeightSpec(bits=2)) == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_weight_has_no_error(method: str) -> None:
    for spec in specs_of(method):
        done = compress_weight("w", torch.zeros(16, 100), spec, method, 12)
        assert done.error == 0.0
        assert not dequantize(done.parts, spec, 16, 100).any()
        assert done.alternations <= 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_are_counted_and_refused(method: str, dtype: torch.dtype, gaussian: Gaussian) -> None:
    weight = gaussian(10, 64).to(dtype)
    weight[3, 5] = weight[0, 1] = float("nan")
    weight[9, 63] = -float("inf")
    with pytest.raises(CheckpointError, match=r"blk\.w holds 2 NaN and 1 Inf of 640 values"):
        compress_weight("blk.w", weight, specs_of(method)[-1], method)


def test_infinities_that_cancel_are_found(gaussian: Gaussian) -> None:
    weight = gaussian(10, 64)
    weight[0, 0], weight[1, 1] = float("inf"), -float("inf")
    with pytest.raises(CheckpointError, match="0 NaN and 2 Inf"):
        compress_weight("w", weight, PLAIN, "rtn")


@pytest.mark.parametrize("method", METHODS)
def test_the_input_is_left_alone(method: str, gaussian: Gaussian) -> None:
    for given in (gaussian(20, 150), gaussian(20, 150).bfloat16(), gaussian(150, 20).T):
        before = given.clone()
        compress_weight("w", given, specs_of(method)[-1], method, 2)
        assert torch.equal(given, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_view_is_taken_at_its_values(method: str, gaussian: Gaussian) -> None:
    view = gaussian(150, 20).T
    spec = specs_of(method)[-1]
    one, other = (compress_weight("w", w, spec, method, 2) for w in (view, view.contiguous()))
    assert torch.equal(one.parts["scale"], other.parts["scale"])
    assert one.error == pytest.approx(other.error, rel=1e-3)
