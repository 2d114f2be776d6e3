# SPDX-License-Identifier: Apache-2.0
"""Fisher rows against gradients taken token by token, and what they leave behind in the model: nothing.

The reference adds a leaf of zeros to each output, one row a token (and choice of expert), and asks autograd for the
gradient at that leaf; that its forward is the model's own is checked through the parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from walking import LENGTH, TOKENS, WINDOWS, close, load, window_ids

from moepress.errors import CalibrationError
from moepress.graph.view import WeightRef
from moepress.measure.gradients import SquaredGradients, predicted_loss, squared_gradients
from moepress.measure.taps import forward_as
from moepress.source import Source, open_source
from tiny import EXPERTS, NATIVE, VOCABULARY

Tiny = Callable[..., Path]


@dataclass
class Seen:
    """One weight's inputs [n, K], gradients at its outputs [n, N] and factors s [n], token by token."""

    x: list[torch.Tensor] = field(default_factory=list)
    g: list[torch.Tensor] = field(default_factory=list)
    s: list[float] = field(default_factory=list)


def measured(folder: Path, ids: torch.Tensor | None = None) -> tuple[Any, Source, SquaredGradients]:
    model = load(folder)
    with open_source(folder) as source:
        return model, source, squared_gradients(model, source.graph, window_ids() if ids is None else ids)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(ids.unsqueeze(0), use_cache=False).logits[0, :-1], ids[1:], reduction="sum")


def by_tokens(model: Any, source: Source, ids: torch.Tensor) -> dict[str, Seen]:
    """Everything that the definition of F speaks of, one token and one expert after another."""
    refs = [ref for ref in source.graph.weights if ref.layer < model.config.num_hidden_layers]
    seen = {ref.name: Seen() for ref in refs}
    for row in ids:
        leaves: list[tuple[str, torch.Tensor, torch.Tensor, float]] = []
        with ExitStack() as stack:
            for name in {source.graph.family.module_name(ref.bank or ref.module) for ref in refs}:
                own = [ref for ref in refs if source.graph.family.module_name(ref.bank or ref.module) == name]
                module = model.get_submodule(name)
                run = slow_linear(module, own[0], leaves) if own[0].bank is None else slow_experts(module, own, leaves)
                stack.enter_context(forward_as(module, run))
            gradients = torch.autograd.grad(loss_of(model, row), [leaf for _, _, leaf, _ in leaves])
        for (name, x, _, s), g in zip(leaves, gradients, strict=True):
            seen[name].x.append(x)
            seen[name].g.append(g)
            seen[name].s.append(s)
    return seen


def slow_linear(module: Any, ref: WeightRef, leaves: list[Any]) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        y = torch.stack([output(token, module.weight, ref.name, 1.0, leaves) for token in tokens])
        return (y if module.bias is None else y + module.bias).view(*x.shape[:-1], -1)

    return forward


def slow_experts(module: Any, refs: list[WeightRef], leaves: list[Any]) -> Callable[..., torch.Tensor]:
    names = {(ref.expert, ref.projection): ref.name for ref in refs}

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for t, token in enumerate(hidden):
            total = torch.zeros_like(token)
            for expert, w in zip(index[t].tolist(), weights[t], strict=True):
                gate_w, up_w = module.gate_up_proj[expert].chunk(2)
                gate = output(token, gate_w, names[expert, "gate"], 1.0, leaves)
                up = output(token, up_w, names[expert, "up"], 1.0, leaves)
                inner = module.act_fn(gate) * up
                total = total + w * output(inner, module.down_proj[expert], names[expert, "down"], w.item(), leaves)
            rows.append(total)
        return torch.stack(rows)

    return forward


def output(x: torch.Tensor, weight: torch.Tensor, name: str, s: float, leaves: list[Any]) -> torch.Tensor:
    leaf = torch.zeros(len(weight), requires_grad=True)
    leaves.append((name, x.detach(), leaf, s))
    return weight @ x + leaf


@pytest.mark.parametrize("family", NATIVE)
def test_rows_are_those_of_the_definition(family: str, tiny: Tiny) -> None:
    model, source, found = measured(tiny(family))
    seen = by_tokens(model, source, window_ids())
    assert found.tokens == TOKENS and found.rows.keys() == seen.keys()
    for ref in source.graph.weights:
        if not seen[ref.name].g:  # no token was routed to this expert
            assert torch.equal(found.rows[ref.name], torch.zeros(ref.shape[0]))
            continue
        g, s = torch.stack(seen[ref.name].g).double(), torch.tensor(seen[ref.name].s).double()
        share = TOKENS if ref.expert is None else s.square().sum() if ref.projection == "down" else len(g)
        assert close(found.rows[ref.name], (g.square().sum(0) / share).float()), ref.name
        assert found.rows[ref.name].dtype == torch.float32 and found.rows[ref.name].any()


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_the_reference_has_the_gradients_of_the_parameters(family: str, tiny: Tiny) -> None:
    model, source, _ = measured(tiny(family), window_ids(1))
    seen = by_tokens(model, source, window_ids(1))
    loss_of(model, window_ids(1)[0]).backward()
    for ref in source.graph.weights:
        module = model.get_submodule(source.graph.family.module_name(ref.bank or ref.module))
        grad = module.weight.grad if ref.expert is None else expert_grad(module, ref)
        wanted = sum(torch.outer(g, x) for g, x in zip(seen[ref.name].g, seen[ref.name].x, strict=True))
        assert close(torch.as_tensor(wanted), grad), ref.name


def expert_grad(module: Any, ref: WeightRef) -> torch.Tensor:
    if ref.projection == "down":
        return module.down_proj.grad[ref.expert]
    return module.gate_up_proj.grad[ref.expert].chunk(2)[ref.projection == "up"]


@pytest.mark.parametrize("name", [
    "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.shared_expert.down_proj.weight",
    "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.2.down_proj.weight",
])  # fmt: skip
def test_the_prediction_is_the_mean_squared_change_of_the_loss(name: str, tiny: Tiny) -> None:
    """What is predicted stands for half the mean of (g . E x)^2: equal if gradients, rows and inputs were independent,
    of the right size for one E on a few tokens."""
    model, source, found = measured(tiny("qwen2_moe"))
    seen = by_tokens(model, source, window_ids())[name]
    x, g, s = torch.stack(seen.x), torch.stack(seen.g), torch.tensor(seen.s)
    s = s if "experts" in name and "down" in name else torch.ones(len(x))
    moment = (x * s[:, None]).T @ (x * s[:, None]) / TOKENS
    error = 0.01 * torch.randn(g.shape[1], x.shape[1], generator=torch.Generator().manual_seed(3))
    exact = 0.5 * (g * (x @ error.T)).square().sum().item() / TOKENS
    assert exact / 2 < predicted_loss(error, moment, found.rows[name]) < 2 * exact


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_model_is_left_as_it_was(family: str, tiny: Tiny) -> None:
    model = load(tiny(family))
    asking = {name: p.requires_grad for name, p in model.named_parameters()}
    before = model(window_ids(), use_cache=False).logits
    with open_source(tiny(family)) as source:
        squared_gradients(model, source.graph, window_ids())
    assert torch.equal(model(window_ids(), use_cache=False).logits, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asking
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_the_model_is_restored_after_an_error(tiny: Tiny) -> None:
    model = load(tiny("mixtral"))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with (
        open_source(tiny("mixtral")) as source,
        pytest.raises(CalibrationError, match=r"loss of window 0 is nan.*float32"),
    ):
        squared_gradients(model, source.graph, window_ids())
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_an_expert_without_a_token_has_zeros_and_ids_outside_the_bank_run_nothing(tiny: Tiny) -> None:
    model = load(tiny("mixtral"))
    ids = torch.tensor([[0, -1], [-1, 0], [EXPERTS, 2], [2, 0]]).repeat(LENGTH // 4, 1)
    weights = torch.tensor([0.25, 0.75]).expand(LENGTH, 2)
    with (
        open_source(tiny("mixtral")) as source,
        forward_as(model.model.layers[0].mlp.gate, lambda x: (x, weights, ids)),
    ):
        found = squared_gradients(model, source.graph, window_ids())
    for expert in range(EXPERTS):
        for letter in ("w1", "w2", "w3"):
            rows = found.rows[f"model.layers.0.block_sparse_moe.experts.{expert}.{letter}.weight"]
            assert bool(rows.all() if expert in (0, 2) else not rows.any())


def test_routing_weights_of_zero_are_no_nan(tiny: Tiny) -> None:
    model = load(tiny("mixtral"))
    ids, weights = torch.tensor([[0, 1]]).expand(LENGTH, 2), torch.tensor([1.0, 0.0]).expand(LENGTH, 2)
    with (
        open_source(tiny("mixtral")) as source,
        forward_as(model.model.layers[0].mlp.gate, lambda x: (x, weights, ids)),
    ):
        found = squared_gradients(model, source.graph, window_ids())
    assert not found.rows["model.layers.0.block_sparse_moe.experts.1.w2.weight"].any()
    assert all(rows.isfinite().all() for rows in found.rows.values())


def test_two_runs_are_equal(tiny: Tiny) -> None:
    first, second = (measured(tiny("qwen2_moe"))[2] for _ in range(2))
    assert all(torch.equal(rows, second.rows[name]) for name, rows in first.rows.items())


def test_windows_are_measured_one_by_one(tiny: Tiny) -> None:
    model, source, found = measured(tiny("olmoe"))
    parts = [squared_gradients(model, source.graph, row[None]) for row in window_ids()]
    assert [part.tokens for part in parts] == [LENGTH] * WINDOWS
    name = "model.layers.1.self_attn.v_proj.weight"
    assert close(found.rows[name], sum(part.rows[name] for part in parts) / WINDOWS)


def test_layers_past_the_models_depth_have_no_rows(tiny: Tiny) -> None:
    model = load(tiny("mixtral", num_hidden_layers=1))
    with open_source(tiny("mixtral")) as source:
        found = squared_gradients(model, source.graph, window_ids(1))
    assert found.rows.keys() == {ref.name for ref in source.graph.weights if ref.layer == 0}


def test_progress_counts_every_token(tiny: Tiny) -> None:
    seen: list[float] = []

    @contextmanager
    def record(label: str, total: float) -> Iterator[Callable[[float], None]]:
        assert (label, total) == ("measuring gradients", TOKENS)
        yield seen.append

    with open_source(tiny("mixtral")) as source:
        squared_gradients(load(tiny("mixtral")), source.graph, window_ids(), progress=record)
    assert seen == [LENGTH] * WINDOWS


@pytest.mark.parametrize(("ids", "words"), [
    (torch.zeros(3, dtype=torch.long), r"\(3,\)"),
    (torch.zeros(0, 8, dtype=torch.long), r"\(0, 8\)"),
    (torch.zeros(3, 1, dtype=torch.long), r"2 tokens or more, not \(3, 1\)"),
    (torch.full((1, 4), VOCABULARY), rf"from {VOCABULARY} to {VOCABULARY}, the model knows 0 to {VOCABULARY - 1}"),
    (torch.full((1, 4), -1), "from -1 to -1"),
])  # fmt: skip
def test_unusable_windows_are_told(ids: torch.Tensor, words: str, tiny: Tiny) -> None:
    with pytest.raises(CalibrationError, match=words):
        measured(tiny("mixtral"), ids)


def test_another_model_is_told(tiny: Tiny) -> None:
    with open_source(tiny("mixtral")) as source:
        with pytest.raises(CalibrationError, match=r"experts: .*\(4, 128, 64\).*\(4, 256, 64\)"):
            squared_gradients(load(tiny("mixtral", intermediate_size=64)), source.graph, window_ids())
        with pytest.raises(CalibrationError, match=r"no module model\.layers\.0\.mlp\.experts"):
            squared_gradients(load(tiny("qwen2_moe")), source.graph, window_ids())
        with pytest.raises(CalibrationError, match=r"call model\.eval\(\)"):
            squared_gradients(load(tiny("mixtral")).train(), source.graph, window_ids())


def test_a_gradient_that_overflows_is_told(tiny: Tiny) -> None:
    model = load(tiny("mixtral"))
    layer = model.model.layers[0].self_attn.o_proj
    handle = layer.register_forward_hook(lambda *call: Overflowing.apply(call[2]))
    with open_source(tiny("mixtral")) as source, pytest.raises(CalibrationError, match=r"layers\.0.*gradients are not"):
        squared_gradients(model, source.graph, window_ids(1))
    handle.remove()


class Overflowing(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


def test_a_weight_that_never_runs_is_told(tiny: Tiny) -> None:
    model = load(tiny("mixtral"))
    attention = model.model.layers[1].self_attn
    skip = forward_as(attention, lambda hidden_states, **_: (hidden_states, None))
    with open_source(tiny("mixtral")) as source, skip, pytest.raises(CalibrationError, match=r"never ran .*layers\.1"):
        squared_gradients(model, source.graph, window_ids(1))


def test_predicted_loss_by_hand() -> None:
    error = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]])
    moment = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    assert predicted_loss(error, moment, None) == pytest.approx(8 + 1 + 18)
    assert predicted_loss(error, moment, torch.tensor([1.0, 0.0, 2.0])) == pytest.approx(0.5 * (8 + 36))


@pytest.mark.parametrize(("moment", "rows"), [((3, 3), (4,)), ((2, 2), (2,)), ((2, 3), None)])
def test_predicted_loss_tells_shapes_that_do_not_fit(moment: tuple[int, int], rows: tuple[int] | None) -> None:
    with pytest.raises(CalibrationError, match=r"\(4, 2\) needs a moment \(2, 2\) and gradients \(4,\)"):
        predicted_loss(torch.zeros(4, 2), torch.zeros(moment), None if rows is None else torch.zeros(rows))
