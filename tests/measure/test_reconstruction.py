# SPDX-License-Identifier: Apache-2.0
"""Reconstruction errors are what compressing leaves, squared; of large weights nearly so, from some of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import moepress.measure.reconstruction as module
from moepress.errors import CheckpointError
from moepress.format.spec import WeightSpec
from moepress.graph.view import WeightRef
from moepress.measure.reconstruction import relative_errors
from moepress.plan.plan import label_of
from moepress.quantize.job import compress_weight

CPU = torch.device("cpu")
CHOICES = {
    label_of(method, spec): (method, spec)
    for method, spec in [
        ("rtn", WeightSpec(bits=1, group_size=32)),
        ("rtn", WeightSpec(bits=4, group_size=64)),
        ("hqq", WeightSpec(bits=2, group_size=64)),
        ("hqq", WeightSpec(bits=8, group_size=128)),
        ("milo", WeightSpec(bits=3, group_size=64, rank=8, factor_bits=3)),
    ]
}


def weights(*shapes: tuple[int, int]) -> dict[WeightRef, torch.Tensor]:
    """Weights whose rows differ in size and whose tails are heavy, bfloat16."""
    generator, found = torch.Generator().manual_seed(0), {}
    for i, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator) * torch.exp(
            0.3 * torch.randn(shape[0], 1, generator=generator)
        )
        found[WeightRef(f"w{i}", f"w{i}", "attn.q", 0, shape)] = (0.02 * values * values.abs()).bfloat16()
    return found


def test_small_weights_are_measured_whole() -> None:
    given = weights((40, 160), (9, 96), (300, 128))
    found = relative_errors(list(given), given.__getitem__, CHOICES, device=CPU)
    assert list(found) == ["w0", "w1", "w2"]
    for ref, weight in given.items():
        assert list(found[ref.name]) == list(CHOICES)
        for label, (method, spec) in CHOICES.items():
            wanted = compress_weight(ref.name, weight, spec, method).error ** 2
            assert found[ref.name][label] == pytest.approx(wanted, rel=1e-4, abs=1e-7), label


def test_large_weights_are_measured_on_a_sample_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weights((1600, 128))
    (ref,), (weight,) = given, given.values()
    monkeypatch.setattr(module, "SAMPLE", 1 << 15)
    sizes = []
    monkeypatch.setattr(module, "compress_weight", lambda *a: sizes.append(a[1].numel()) or compress_weight(*a))
    found = relative_errors([ref], given.__getitem__, CHOICES, device=CPU)["w0"]
    for (label, (method, spec)), size in zip(CHOICES.items(), sizes, strict=True):
        if spec.rank:  # its factors are those of the whole
            assert size == weight.numel()
        else:
            assert module.SAMPLE <= size < 1.2 * module.SAMPLE
        wanted = compress_weight("w0", weight, spec, method).error ** 2
        assert found[label] == pytest.approx(wanted, rel=0.04), label


@pytest.mark.parametrize("shape", [(1, 1 << 20), (3, 1 << 19), (1 << 14, 64)])
def test_rows_of_any_length_give_a_sample(shape: tuple[int, int]) -> None:
    given = {WeightRef("w", "w", "attn.q", 0, shape): torch.ones(shape)}
    found = relative_errors(list(given), given.__getitem__, {"rtn b4g64": CHOICES["rtn b4g64"]}, device=CPU)
    assert found == {"w": {"rtn b4g64": pytest.approx(0, abs=1e-6)}}


def test_zeros_have_no_error_and_damage_is_named() -> None:
    given = weights((16, 64), (16, 64))
    first, second = given
    given[first].zero_()
    assert set(relative_errors([first], given.__getitem__, CHOICES, device=CPU)["w0"].values()) == {0.0}
    given[second][3, 3] = torch.nan
    with pytest.raises(CheckpointError, match="w1 holds 1 NaN"):
        relative_errors([first, second], given.__getitem__, CHOICES, device=CPU)


def test_progress_counts_every_element() -> None:
    given, told = weights((16, 64), (8, 96)), []

    @contextmanager
    def progress(what: str, total: int) -> Iterator:  # type: ignore[type-arg]
        told.append((what, total))
        yield told.append

    relative_errors(list(given), given.__getitem__, {"rtn b4g64": CHOICES["rtn b4g64"]}, device=CPU, progress=progress)
    assert told == [("measuring errors", 1792), 1024, 768]
