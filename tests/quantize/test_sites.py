# SPDX-License-Identifier: Apache-2.0
"""Many weights in one run of GPTQ: each comes out as if it were alone with its own input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moepress.quantize.sites as module
from moepress.errors import CheckpointError
from moepress.quantize.affine import AffineWeight
from moepress.quantize.gptq import VARIANTS, GptqOptions, Metric, gptq, make_metric
from moepress.quantize.sites import Sites, Width, row_errors

K = 96


def moment_of(seed: int, k: int = K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * k, k, generator=generator) * torch.exp(0.7 * torch.randn(k, generator=generator))
    x = x + x @ torch.randn(k, k, generator=generator) / k**0.5
    return x.T @ x / len(x)


def weight_of(rows: int, seed: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def alone(weight: torch.Tensor, moment: torch.Tensor, width: Width, options: GptqOptions) -> AffineWeight:
    return gptq(["w"], weight[None], make_metric(moment[None], options), [width[0]], width[1], options)[0]


def same(a: AffineWeight, b: AffineWeight) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)


@st.composite
def layouts(draw: st.DrawFn) -> list[list[tuple[int, Width | None]]]:
    """Per input its weights: rows, and a width or None where the weight is not asked for. Few choices, so that
    matrices are often alike and share a batch."""
    width = st.none() | st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([32, 64]))
    weight = st.tuples(st.sampled_from([8, 16]), width)
    return draw(st.lists(st.lists(weight, min_size=1, max_size=4), min_size=1, max_size=4))


@settings(max_examples=25)
@given(layouts(), st.sampled_from(sorted(VARIANTS)))
def test_each_weight_comes_out_as_if_alone(layout: list[list[tuple[int, Width | None]]], variant: str) -> None:
    options = VARIANTS[variant]
    weights = [
        {f"{i}.{j}": weight_of(rows, 10 * i + j) for j, (rows, _) in enumerate(own)} for i, own in enumerate(layout)
    ]
    moments = [moment_of(i) for i in range(len(layout))]
    widths = {f"{i}.{j}": w for i, own in enumerate(layout) for j, (_, w) in enumerate(own) if w}
    found = Sites(weights, moments, options).gptq(widths)
    assert found.keys() == widths.keys()
    for name, base in found.items():
        index = int(name.split(".")[0])
        assert same(base, alone(weights[index][name], moments[index], widths[name], options)), name


def test_like_weights_share_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[int, int, list[int], int]] = []

    def watched(
        names: list[str], rows: torch.Tensor, metric: Metric, bits: list[int], group: int, options: GptqOptions
    ) -> list[AffineWeight]:
        runs.append((*rows.shape[:2], bits, group))
        return gptq(names, rows, metric, bits, group, options)

    monkeypatch.setattr(module, "gptq", watched)
    weights = [{f"{i}.{x}": weight_of(8, i) for x in ("gate", "up")} for i in range(4)]
    widths = {f"{i}.{x}": (bits, 64) for i, bits in enumerate([1, 2, 3, 2]) for x in ("gate", "up")}
    Sites(weights, [moment_of(i) for i in range(4)]).gptq(widths)
    # gate and up of one input are one matrix, four inputs of any width are one batch
    assert runs == [(4, 16, [1, 2, 3, 2], 64)]


def test_the_metric_is_made_once_and_one_moment_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "make_metric", lambda *given: calls.append(given) or make_metric(*given))
    moment = moment_of(0)
    sites = Sites([{"a": weight_of(8, 0)}], [moment])
    assert not calls, "made although nothing was asked for"
    for bits in (2, 3):
        sites.gptq({"a": (bits, 64)})
        sites.round(0, "a", weight_of(8, 1), (bits, 64))
    assert len(calls) == 1
    assert sites.metric.moments.data_ptr() == moment.data_ptr()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_target_is_rounded_in_the_place_of_a_weight(index: int) -> None:
    weights, moments = [{f"{i}": weight_of(8, i)} for i in range(3)], [moment_of(i) for i in range(3)]
    target = weight_of(8, 99)
    found = Sites(weights, moments).round(index, f"{index}", target, (3, 32))
    assert same(found, alone(target, moments[index], (3, 32), GptqOptions()))


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 96), (200, 64)])
def test_row_errors_are_the_diagonal(rows: int, k: int) -> None:
    error, moment = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)), moment_of(1, k)
    exact = torch.diagonal(error.double() @ moment.double() @ error.double().T)
    torch.testing.assert_close(row_errors(error, moment).double(), exact, rtol=1e-5, atol=0)


def test_row_errors_of_more_rows_than_one_chunk_holds() -> None:
    rows, k = (1 << 20) + 100, 16
    error = torch.zeros(rows, k)
    size, column = 1.0 + torch.arange(rows) % 5, torch.arange(rows) % k
    error[torch.arange(rows), column] = size
    assert torch.equal(row_errors(error, torch.diag(torch.arange(1.0, k + 1))), size.square() * (1 + column))


def test_a_weight_that_does_not_fit_the_format_is_named_alone() -> None:
    weights = [{f"{i}.{x}": weight_of(8, i) for x in ("gate", "up")} for i in range(2)]
    weights[1]["1.up"][3, 5] = 1e30
    with pytest.raises(CheckpointError, match=r"^1\.up: a scale .* --keep '1\.up'$"):
        Sites(weights, [moment_of(0), moment_of(1)]).gptq({name: (3, 64) for own in weights for name in own})
