# SPDX-License-Identifier: Apache-2.0
"""Which kernel is chosen, what is said of the others, and that nothing falls back in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import KernelError
from moepress.format.spec import WeightSpec
from moepress.kernels import registry
from moepress.kernels.banks import describe, parse
from moepress.kernels.problem import EXPERTS, LINEAR, PACKING, ROUTER, SELECTOR, Problem
from moepress.kernels.records import RecordLayout
from moepress.kernels.registry import CUDA, REFERENCE, TRITON, Row, explain, select
from stand_in import Kernels, stand_in

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYOUT = RecordLayout(48, 64, 3, 64)
layouts = st.builds(
    RecordLayout,
    rows=st.integers(1, 9999),
    columns=st.integers(1, 9999),
    bits=st.sampled_from((1, 2, 3, 4, 5, 6, 8)),
    group_size=st.sampled_from((32, 64, 128)),
)


def ranked(rank: int, factor_bits: int = 4) -> WeightSpec:
    return WeightSpec(bits=3, rank=rank, factor_bits=factor_bits)


def problem(op: str = LINEAR, device: torch.device = CPU, **others: object) -> Problem:
    down = (LAYOUT,) if op == EXPERTS else ()
    return Problem(
        **({"op": op, "device": device, "dtype": torch.bfloat16, "layouts": (LAYOUT,), "down": down} | others)
    )


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    monkeypatch.setattr(registry, "_warned", set())


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return stand_in(monkeypatch)


@pytest.mark.parametrize("op", [LINEAR, EXPERTS])
def test_on_the_cpu_the_reference_runs_and_nothing_is_said(op: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(problem(op)) == REFERENCE
    cuda, triton, reference = explain(problem(op))
    assert [(each.name, each.chosen) for each in (cuda, triton, reference)] == [
        (CUDA, False), (TRITON, False), (REFERENCE, True)
    ]  # fmt: skip
    assert "MOEPRESS_KERNELS=triton runs them" in triton.reason
    assert "need a CUDA device, and this layer is on cpu" in cuda.reason and reference.reason == ""


@pytest.mark.parametrize("op", [LINEAR, EXPERTS, SELECTOR, ROUTER, PACKING])
def test_every_operation_has_a_reference_at_the_end(op: str) -> None:
    rows = [row for row in registry.ROWS if row.op == op]
    assert rows[-1].name == REFERENCE and rows[-1].why_not(problem(op)) is None
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("op", [LINEAR, EXPERTS])
def test_where_there_are_kernels_they_run(op: str, kernels: Kernels) -> None:
    assert select(problem(op, GPU)) == CUDA
    assert explain(problem(op, GPU))[-1].reason == "cuda goes first"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (problem(dtype=torch.float32), "inputs are torch.float32"),
        (problem(layouts=(RecordLayout(8, 36, 3, 32),)), "36 inputs are no multiple of 8"),
        (problem(offloaded=True), "its weights are offloaded"),
        (
            problem(EXPERTS, layouts=(RecordLayout(48, 72, 3, 64),), compensated=(ranked(8),)),
            r"compensators of experts run from records alone \(gate and up: the scales of v .*, not 72\)",
        ),
        (problem(EXPERTS, compensated_down=(ranked(8, 16),)), r"\(down: factors of 16 bits have no records\)"),
        (problem(EXPERTS, compensated=(ranked(8), ranked(8, 3))), r"\(gate and up: .* several widths: 3, 4 bits\)"),
        (problem(EXPERTS, experts=513), "at most 512 experts a layer, not 513"),
        (problem(EXPERTS, activation="gelu"), "the activation is gelu"),
        (problem(EXPERTS, offloaded=True), "its weights are offloaded"),
        (
            problem(EXPERTS, layouts=(LAYOUT, RecordLayout(48, 64, 3, 32))),
            r"several group sizes \(gate and up: 32, 64\)",
        ),
        (problem(EXPERTS, down=(LAYOUT, RecordLayout(48, 64, 2, 32))), r"several group sizes \(down: 32, 64\)"),
    ],
)
def test_reasons_on_a_gpu_are_said_once(asked: Problem, reason: str, kernels: Kernels) -> None:
    on_gpu = Problem(**(vars(asked) | {"device": GPU}))
    with pytest.warns(UserWarning, match=f"plain torch on this GPU, which is many times slower: .*{reason}"):
        assert select(on_gpu) == REFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(on_gpu) == REFERENCE


def test_different_widths_and_compensators_are_no_obstacle(kernels: Kernels) -> None:
    mixed = tuple(RecordLayout(48, 64, bits, 64) for bits in (1, 2, 3, 4, 5, 6, 8))
    assert select(problem(EXPERTS, GPU, layouts=mixed, down=mixed[:2])) == CUDA
    assert select(problem(LINEAR, GPU, compensated=(ranked(9, 16),))) == CUDA
    ranks = {"compensated": (ranked(8), ranked(21)), "compensated_down": (ranked(32, 8),)}
    assert select(problem(EXPERTS, GPU, **ranks)) == CUDA


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_packing_is_not_for_hopper_alone(
    capability: tuple[int, int], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if capability >= (8, 0):
        assert select(problem(PACKING, GPU)) == CUDA
    else:
        with pytest.warns(UserWarning, match=r"packing in plain torch .* capability 8\.0 and later, and cuda has 7\.5"):
            assert select(problem(PACKING, GPU)) == REFERENCE
    monkeypatch.setenv(registry.OVERRIDE, REFERENCE)
    assert select(problem(PACKING, GPU)) == REFERENCE


@given(reasons=st.lists(st.one_of(st.none(), st.text("abc ", min_size=1)), min_size=1, max_size=6))
def test_the_first_row_that_can_run_is_chosen(reasons: list[str | None]) -> None:
    rows = [Row(LINEAR, f"row {i}", lambda _, reason=reason: reason) for i, reason in enumerate(reasons)]
    rows += [Row(EXPERTS, "other", lambda _: None), Row(LINEAR, REFERENCE, lambda _: None)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "ROWS", rows)
        choices = explain(problem())
        chosen = [choice.name for choice in choices if choice.chosen]
        can = [f"row {i}" for i, reason in enumerate(reasons) if reason is None]
        assert chosen == [*can, REFERENCE][:1] == [select(problem())]
        assert [choice.name for choice in choices] == [row.name for row in rows if row.op == LINEAR]
        for choice, reason in zip(choices, reasons, strict=False):
            assert choice.reason == ("" if choice.chosen else reason or f"{chosen[0]} goes first")


def test_the_environment_can_ask_for_the_reference(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    monkeypatch.setenv(registry.OVERRIDE, REFERENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever asks need not be warned
        assert select(problem(EXPERTS, GPU)) == REFERENCE
    assert explain(problem(EXPERTS, GPU))[0].reason == "MOEPRESS_KERNELS is 'reference'"


@pytest.mark.parametrize(
    ("value", "words"),
    [(CUDA, "MOEPRESS_KERNELS is 'cuda', which cannot run linear here: .* on cpu; unset it"),
     ("rocm", "MOEPRESS_KERNELS is 'rocm'; choose one of cuda, triton, reference")],
)  # fmt: skip
def test_an_override_that_cannot_run_says_why(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.OVERRIDE, value)
    with pytest.raises(KernelError, match=words):
        select(problem())


@pytest.mark.parametrize("op", [SELECTOR, ROUTER])
def test_selectors_and_routers_run_on_kernels(op: str, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    asked = problem(op, GPU, layouts=(), columns=64, experts=512, top_k=2)
    assert select(asked) == CUDA
    for change, reason in (
        ({"columns": 36}, "36 inputs are no multiple of 8"),
        ({"top_k": 33}, f"the {op}'s CUDA kernel takes at most 32 experts a token, not 33"),
        ({"dtype": torch.float32}, "inputs are torch.float32"),
    ):
        changed = Problem(**(vars(asked) | change))
        with pytest.warns(UserWarning, match=f"runs {op} in plain torch .*: {reason}"):
            assert select(changed) == REFERENCE
        with monkeypatch.context() as patch:
            patch.setenv(registry.OVERRIDE, CUDA)
            with pytest.raises(KernelError, match=f"cannot run {op} here: {reason}"):
                select(changed)
    assert select(problem(op, CPU, layouts=(), columns=36, experts=4, top_k=2)) == REFERENCE


def test_a_routers_kernel_has_a_bound_on_experts(kernels: Kernels) -> None:
    with pytest.warns(UserWarning, match="the router's CUDA kernel takes at most 512 experts a layer, not 513"):
        assert select(problem(ROUTER, GPU, layouts=(), columns=64, experts=513, top_k=2)) == REFERENCE


@pytest.mark.parametrize("op", [SELECTOR, ROUTER])
def test_an_override_is_nothing_to_an_operation_that_has_no_such_row(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.OVERRIDE, TRITON)
    assert select(problem(op, layouts=(), columns=64)) == REFERENCE


def test_problems_are_values() -> None:
    assert problem() == problem() and hash(problem()) == hash(problem())
    assert problem() != problem(compensated=(ranked(1),))


@given(layouts=st.lists(layouts, min_size=1, max_size=5), data=st.data())
def test_the_string_of_a_bank_says_all_of_it(layouts: list[RecordLayout], data: st.DataObject) -> None:
    places = st.one_of(st.none(), st.tuples(st.integers(0, len(layouts) - 1), st.integers(0, 999)))
    where = tuple(data.draw(st.lists(places, min_size=1, max_size=9)))
    assert parse(describe(layouts, where)) == (tuple(layouts), where)


@pytest.mark.parametrize(
    "text", ["", "32x64b3|0.0", "32x64b7g64|0.0", "32x64b3g64|0", "32x64b3g64|a.b", "32x64b3g64|--"]
)
def test_other_strings_are_refused(text: str) -> None:
    with pytest.raises(KernelError, match="does not describe records"):
        parse(text)
