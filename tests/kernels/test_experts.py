# SPDX-License-Identifier: Apache-2.0
"""A layer's routed experts: every token meets exactly its experts, whatever the routing looks like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moepress.format.manifest import BankEntry
from moepress.format.spec import PROJECTIONS, WeightSpec
from moepress.kernels.experts.reference import run_experts
from moepress.runtime.experts import ExpertBank

EXPERTS, HIDDEN, INNER = 6, 64, 96
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
)
on_devices = pytest.mark.parametrize("device", ["cpu", CUDA])
in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
Routing = Callable[[torch.Generator], torch.Tensor]

ROUTINGS: dict[str, Routing] = {
    "usual": lambda g: torch.rand(17, EXPERTS, generator=g).topk(2).indices,
    "one token": lambda g: torch.tensor([[3, 1]]),
    "one choice": lambda g: torch.randint(0, EXPERTS, (17, 1), generator=g),
    "every expert": lambda g: torch.rand(5, EXPERTS, generator=g).argsort(),
    "all to one": lambda g: torch.full((17, 1), 4),
    "the first and the last only": lambda g: torch.tensor([[0, EXPERTS - 1]]).repeat(9, 1),
    "some to nobody": lambda g: torch.tensor([[-1, 2], [EXPERTS, 0], [5, -1], [10**6, -7], [3, 4]]),
    "all to nobody": lambda g: torch.tensor([[-1, EXPERTS]] * 4),
    "no token": lambda g: torch.empty(0, 2, dtype=torch.long),
}
by_routing = pytest.mark.parametrize("routing", ROUTINGS)


def routed(routing: str, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, expert ids and weights that differ from token to token and choice to choice."""
    generator = torch.Generator().manual_seed(1)
    ids = ROUTINGS[routing](generator)
    x = torch.randn(len(ids), HIDDEN, generator=generator)
    weights = 0.1 + torch.rand(ids.shape, generator=generator)
    return x.to(device, dtype), ids.to(device), weights.to(device, dtype)


def expected_sum(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Token by token and choice by choice, in x's dtype."""
    y = torch.zeros_like(x)
    for t in range(len(ids)):
        for e, weight in zip(ids[t].tolist(), weights[t], strict=True):
            if 0 <= e < EXPERTS:
                y[t] += weight.to(x.dtype) * expert(e, x[t : t + 1])[0]
    return y


@on_devices
@by_routing
def test_tokens_meet_their_experts(routing: str, device: str) -> None:
    x, ids, weights = routed(routing, device, torch.float64)
    seen: dict[int, torch.Tensor] = {}

    def expert(e: int, tokens: torch.Tensor) -> torch.Tensor:
        assert e not in seen, "an expert runs once"
        seen[e] = tokens
        return (e + 1) * tokens.roll(e, -1)

    y = run_experts(x, ids, weights, EXPERTS, expert)
    torch.testing.assert_close(y, expected_sum(x, ids, weights, lambda e, t: (e + 1) * t.roll(e, -1)))
    for e in range(EXPERTS):
        own = x[(ids == e).any(1)]
        assert (e in seen) == bool(len(own))
        if e in seen:  # each of its tokens once, in their order
            assert torch.equal(seen[e], own)


def test_ids_out_of_range_add_nothing() -> None:
    x, ids, weights = routed("some to nobody", "cpu", torch.float32)
    y = run_experts(x, ids, weights, EXPERTS, lambda e, tokens: tokens)
    assert not y[3].any()
    torch.testing.assert_close(y[0], x[0] * weights[0, 1])
    torch.testing.assert_close(y[2], x[2] * weights[2, 0])


def test_weights_of_another_dtype_do_not_change_the_output_dtype() -> None:
    x, ids, weights = routed("usual", "cpu", torch.bfloat16)
    y = run_experts(x, ids, weights.float(), EXPERTS, lambda e, tokens: tokens)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run_experts(x, ids, weights.float().bfloat16(), EXPERTS, lambda e, tokens: tokens))


def test_inputs_are_left_alone() -> None:
    given = routed("usual", "cpu", torch.float32)
    before = [tensor.clone() for tensor in given]
    run_experts(*given, EXPERTS, lambda e, tokens: tokens * 2)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    """Experts of four kinds side by side, with random stored tensors."""
    kinds = [
        WeightSpec(bits=2, group_size=32),
        WeightSpec(bits=3, group_size=64, rank=6, factor_bits=3),
        WeightSpec(bits=4, group_size=64, rank=3, factor_bits=16),
        WeightSpec(bits=8, group_size=32, rank=2, factor_bits=8),
    ]
    gate_up, down = ([kinds[(i * step) % 4] for i in range(EXPERTS)] for step in (1, 3))
    made = ExpertBank(
        BankEntry((INNER, HIDDEN), (HIDDEN, INNER), tuple(gate_up), tuple(down)), torch.nn.functional.silu
    )
    generator = torch.Generator().manual_seed(2)
    for name, buffer in made.named_buffers():
        if buffer.dtype == torch.uint8:
            buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator))
        elif name.endswith(".zero"):
            buffer.copy_(4 + torch.randn(buffer.shape, generator=generator))
        else:
            size = 0.05 if name.endswith(("u", "v")) else 0.02 if "b8" not in name else 0.002
            buffer.copy_(size * torch.randn(buffer.shape, generator=generator))
    return made


def dense(bank: ExpertBank, dtype: torch.dtype) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The same experts as plain matrices of that dtype."""

    def expert(e: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(bank, name).dequantize(e).to(dtype) for name in PROJECTIONS)
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    return expert


@on_devices
@in_dtypes
@by_routing
def test_a_mixed_bank_against_float64(routing: str, dtype: torch.dtype, device: str, bank: ExpertBank) -> None:
    bank = bank.to(device)
    x, ids, weights = routed(routing, device, dtype)
    with torch.no_grad():
        y = bank(x, ids, weights)
        truth = expected_sum(x.double(), ids, weights.double(), dense(bank, torch.float64))
        plain = expected_sum(x, ids, weights, dense(bank, dtype))
    bank.to("cpu")
    assert y.dtype == dtype and y.shape == x.shape
    if not len(x):
        return
    error, yardstick = ((found.double() - truth).abs() for found in (y, plain))
    # a compensator applied apart rounds more often than the product it stands for; see test_linear.py
    eps = 1e-7 * truth.abs().max()
    rms, bound = error.square().mean().sqrt(), 2 * yardstick.square().mean().sqrt() + eps
    assert rms <= bound and error.max() <= 4 * yardstick.max() + eps, (
        f"rms {rms:.3g} (at most {bound:.3g}), max {error.max():.3g} (torch {yardstick.max():.3g})"
    )


def test_a_bank_takes_hidden_states_of_any_shape(bank: ExpertBank) -> None:
    x, ids, weights = routed("usual", "cpu", torch.float32)
    x, ids, weights = x[:12], ids[:12], weights[:12]
    folded = bank(x.view(3, 4, HIDDEN), ids, weights)
    assert torch.equal(folded, bank(x, ids, weights).view(3, 4, HIDDEN))


def test_a_bank_can_be_used_as_a_list(bank: ExpertBank) -> None:
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert len(bank) == len(list(bank)) == EXPERTS
    for e, expert in enumerate(bank):
        assert torch.equal(expert(x), bank.run_expert(e, x))
        torch.testing.assert_close(expert(x), dense(bank, torch.float32)(e, x), atol=1e-4, rtol=1e-4)
    assert torch.equal(bank[-1](x), bank[EXPERTS - 1](x))
    with pytest.raises(IndexError):
        bank[EXPERTS]
