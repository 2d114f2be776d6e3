# SPDX-License-Identifier: Apache-2.0
"""The baselines against a plain loop, the gate, and Humming's and GemLite's plumbing against stand-ins."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from benching import CPU, SMALL_DENSE, SMALL_MOE, run

from moepress.bench import humming_parts, humming_peer
from moepress.bench.contenders import BASELINE
from moepress.bench.gemlite_peer import GemLite
from moepress.bench.humming_peer import Humming, unsupported
from moepress.bench.peers import lineup
from moepress.bench.plain import PlainDense, PlainExperts, Sort
from moepress.bench.problems import DENSE, LAYERS, MOE, Problem
from moepress.bench.reference import checked_tokens, errors


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_pass_the_gate(grouped: bool, tokens: int) -> None:
    problem = Problem(MOE, (8, 2, 64, 48), tokens)
    (row,) = run(problem, [PlainExperts("bf16", grouped=grouped)])
    assert row.reason is None and 0 < row.error < 0.02 and row.repeatable
    assert row.role == BASELINE and row.weight_bytes == 2 * row.hit * 3 * 64 * 48


def test_experts_are_what_a_plain_loop_gives() -> None:
    contender = PlainExperts("bf16", grouped=False)
    draw = SMALL_MOE.draw(7, CPU)
    gate_up, down = (weight.double() for weight in contender._copy(SMALL_MOE, 7, 0, CPU))
    expected = torch.zeros(5, 64, dtype=torch.float64)
    for token in range(5):
        for expert, weight in zip(draw.ids[token].tolist(), draw.weights[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ draw.x[token].double()).chunk(2)
            expected[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    assert errors(contender.reference(SMALL_MOE, 7, CPU), expected)[0] < 1e-6  # the routing weights are float32


def test_a_dense_weight_passes_the_gate_and_copies_differ() -> None:
    contender = PlainDense("bf16")
    (row,) = run(SMALL_DENSE, [contender])
    assert row.reason is None and 0 < row.error < 0.01
    first, second = (call() for call in contender.prepare(SMALL_DENSE, 2, 0, CPU))
    assert not torch.equal(first, second)


def test_checked_tokens_reach_both_ends() -> None:
    assert checked_tokens(3) == [0, 1, 2]
    many = checked_tokens(1024)
    assert many[0] == 0 and many[-1] == 1023 and len(set(many)) == 16


def test_errors_are_relative_to_the_expected() -> None:
    expected = torch.full((2, 4), 2.0, dtype=torch.float64)
    y = expected.clone()
    y[1, 3] = 3.0
    assert errors(y, expected) == pytest.approx(((1 / 32) ** 0.5, 0.5))


def test_sorting_by_expert() -> None:
    sort = Sort(torch.tensor([[2, 0], [0, 3]]), 4)
    assert sort.order.tolist() == [1, 2, 0, 3] and sort.ends.tolist() == [2, 2, 3, 4]
    assert sort.position.tolist() == [[2, 0], [1, 3]]


def test_lineup() -> None:
    assert [each.name for each in lineup(MOE, "bf16")] == ["moepress", "bf16 grouped", "bf16 by expert", "humming"]
    assert [each.name for each in lineup(DENSE, "fp16")] == ["moepress", "fp16", "humming", "gemlite"]
    assert [each.name for each in lineup(DENSE, "bf16", peers=False)] == ["moepress", "bf16"]


@pytest.mark.parametrize("block", [2, 4])
def test_humming_tokens_are_aligned_to_blocks(block: int) -> None:
    ids = torch.tensor([[2, 0], [0, 2], [2, 1]])
    route = humming_parts.aligned(ids, 4, block)
    entries, owners = route["sorted_ids"].view(-1, block).tolist(), route["expert_ids"].tolist()
    expected = {2: ([[1, 2], [5, 6], [0, 3], [4, 6]], [0, 1, 2, 2]), 4: ([[1, 2, 6, 6], [5, 6, 6, 6], [0, 3, 4, 6]],
                                                                        [0, 1, 2])}  # fmt: skip
    assert (entries, owners) == expected[block]
    assert route["num_tokens_padded"].item() == len(owners) * block and route["num_tokens_padded"].ndim == 0
    assert {part.dtype for part in route.values()} == {torch.int32}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [8, 64])
def test_humming_codes_are_a_stream_of_bits(bits: int, tokens: int) -> None:
    problem = Problem(MOE, (4, 2, 64, 128), tokens, bits=bits, group_size=32)
    parts = {name: part[1] for name, part in humming_parts.random_parts(problem, 1, 0, 0, CPU).items()}
    assert ("zero_point" in parts) == (tokens < 64)
    stream = "".join(f"{word & 0xFFFFFFFF:032b}"[::-1] for word in parts["weight"][5].tolist())
    codes = [int(stream[i * bits : (i + 1) * bits][::-1], 2) for i in range(128)]
    scale = parts["weight_scale"][5].repeat_interleave(32).float()
    zero = parts["zero_point"][5].repeat_interleave(32).float() if tokens < 64 else 2.0 ** (bits - 1)
    weight = humming_parts.dequantize(problem, parts)
    assert weight.shape == (64, 128) and torch.equal(weight[5], (torch.tensor(codes).float() - zero) * scale)
    assert weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_humming_says_what_it_has_no_kernel_for() -> None:
    shape = LAYERS["deepseek-moe-16b"]
    assert unsupported(Problem(MOE, shape, 8)) is None
    assert unsupported(Problem(MOE, shape, 8, rank=16)) == "has no compensators"
    assert "powers of two" in unsupported(Problem(MOE, shape, 8, group_size=48))
    assert "2816x2048: it takes N" in unsupported(Problem(MOE, shape, 8, group_size=4096))
    assert Humming().bits_per_weight(Problem(MOE, shape, 8)) == 3.5
    assert Humming().bits_per_weight(Problem(MOE, shape, 64)) == 3.25
    assert Humming().bits_per_weight(Problem(DENSE, (64, 64), 64)) == 3.5


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert Humming().why_not(SMALL_MOE) == "humming-kernels is not installed"
    assert GemLite().why_not(SMALL_DENSE) == "gemlite is not installed"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Humming with its checkpoint layout for its own, and its GEMMs by what their arguments mean."""

    def launch_kernel(  # type: ignore[no-untyped-def]
        *, configs, inputs, outputs, locks, top_k, weight, weight_scale, zero_point=None,
        sorted_ids=None, expert_ids=None, num_tokens_padded=None,
    ):  # fmt: skip
        problem, block = configs
        parts = {"weight": weight, "weight_scale": weight_scale} | (
            {} if zero_point is None else {"zero_point": zero_point}
        )
        assert outputs.shape[0] == inputs.shape[0] * top_k and locks.dtype == torch.int32 and not locks.any()
        if sorted_ids is None:
            outputs.copy_(inputs.float() @ humming_parts.dequantize(problem, parts).T)
            return
        assert len(sorted_ids) == num_tokens_padded == block * len(expert_ids)
        for rows, expert in zip(sorted_ids.long().split(block), expert_ids.tolist(), strict=True):
            rows = rows[rows < len(outputs)]
            one = humming_parts.dequantize(problem, {name: part[expert] for name, part in parts.items()})
            outputs[rows] = (inputs[rows // top_k].float() @ one.T).to(outputs.dtype)

    class Config:
        def __init__(self, problem: Problem) -> None:
            self.problem, self.num_experts = problem, problem.experts

    def pack(problem: Problem, *where: object) -> humming_parts.Packed:
        return humming_parts.Packed(Config(problem), humming_parts.random_parts(problem, *where))

    ops = types.ModuleType("humming.ops")
    ops.launch_kernel = launch_kernel
    package = types.ModuleType("humming")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "humming", package)
    monkeypatch.setitem(sys.modules, "humming.ops", ops)
    monkeypatch.setattr(humming_peer, "pack", pack)
    monkeypatch.setattr(humming_peer, "kernel", lambda config, rows, device: ((config.problem, 4), 4))
    monkeypatch.setattr(Humming, "why_not", lambda self, problem: unsupported(problem))


@pytest.mark.parametrize(
    "problem",
    [
        Problem(MOE, (8, 2, 64, 96), 1, bits=3, group_size=32),
        Problem(MOE, (8, 3, 64, 96), 7, bits=1, group_size=32, dtype="fp16"),
        Problem(MOE, (8, 2, 64, 96), 64, bits=2, group_size=32),
        Problem(DENSE, (128, 64), 5, bits=4),
    ],
    ids=["one token", "few tokens", "symmetric", "dense"],
)
def test_humming_layer_agrees_with_its_reference(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    (row,) = run(problem, [Humming()])
    assert row.reason is None and row.error < 0.01 and row.repeatable
    zeros = f"{problem.bits + 32 / problem.group_size:g} b, real zeros"
    assert row.note == ("2.5 b, symmetric" if problem.tokens == 64 else zeros)


def test_humming_compiles_each_matrix_once_for_all_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[int]] = {}

    class Config:
        def __init__(self, text: str) -> None:
            self.text = text

        def to_str(self) -> str:
            return self.text

    def layer_config(problem: Problem, matrix: int, device: torch.device) -> Config:
        return Config(f"{matrix} {'zeros' if humming_parts.has_zero(problem) else 'symmetric'}")

    monkeypatch.setattr(humming_peer, "layer_config", layer_config)
    monkeypatch.setattr(humming_peer, "compile_ahead", lambda config, rows, device: asked.update({config.text: rows}))
    Humming().warm_up([Problem(MOE, LAYERS["mixtral-8x7b"], tokens) for tokens in (8, 1, 64, 256)], CPU)
    assert asked == {"0 zeros": [2, 16], "1 zeros": [2, 16], "0 symmetric": [128, 512], "1 symmetric": [128, 512]}
