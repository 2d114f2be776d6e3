# SPDX-License-Identifier: Apache-2.0
"""Fisher rows: how much the loss minds an error in each row of each weight.

Replacing W [N, K] by W + E changes what the weight puts out for input x by E x. To second order, with the Hessian of
the loss at that output replaced by the diagonal of the Fisher matrix, and that by its mean over tokens, the loss rises
by

    1/2 sum_n F_n (E M E^T)_nn   nats a token,        M = (sum over the tokens that reach W of s^2 x x^T) / all tokens,

where s is 1, except for an expert's down-projection, where it is the routing weight w on the expert's output. With
g = d(sum of next-token losses) / d(the weight's output at one token):

    F = mean over all tokens of g^2                   a linear that every token passes
    F = mean over the expert's tokens of g^2          a routed gate or up
    F = sum g^2 / sum w^2 over the expert's tokens    a routed down, g taken before the multiplication by w

so that F M is in every case the same sum over tokens, factored. An expert without a token has F = 0.

The Fisher matrix for the Hessian is LeCun, Denker and Solla, "Optimal Brain Damage" (1990), and the empirical one, with
the text's own next tokens, is what is common in quantisation; its factoring into a row's gradients and the inputs'
moment is that of Martens and Grosse, "K-FAC" (ICML 2015). The form for routed experts is ours.

Memory: the activations of one window; no gradient of any parameter is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from moepress.errors import CalibrationError
from moepress.graph.view import ModelGraph, WeightRef
from moepress.kernels.experts.reference import run_experts
from moepress.measure.taps import forward_as
from moepress.progress import Progress, silent


@dataclass(frozen=True)
class SquaredGradients:
    """What one text says about the rows of every weight."""

    rows: dict[str, torch.Tensor]
    """Weight name -> F, float32 [N] on the CPU, in (nats / unit of output)^2."""
    tokens: int
    """How many tokens F is the mean of."""


def squared_gradients(
    model: Any, graph: ModelGraph, windows: torch.Tensor, *, progress: Progress = silent
) -> SquaredGradients:
    """Fisher rows of every weight of `graph` that the model runs, from token ids [W, T].

    `model` is the transformers model of that checkpoint at full precision and in eval mode, on one device; it is left
    as it was. Layers past its depth (an extra next-token layer) have no rows. Raises CalibrationError for windows or a
    model that cannot be used and where a loss or a gradient is not finite.
    """
    _check(model, windows)
    refs = [ref for ref in graph.weights if ref.layer < model.config.num_hidden_layers]
    sums = _Sums()
    with ExitStack() as stack, progress("measuring gradients", windows.numel()) as advance:
        stack.enter_context(_frozen(model))
        for ref in refs:
            if ref.expert is None:
                stack.enter_context(_tapped(_module(model, graph, ref.module), ref, sums))
        for bank, members in _banks(refs).items():
            experts = _Experts(_module(model, graph, bank), bank, members, sums)
            stack.enter_context(forward_as(experts.module, experts.forward))
        for number, ids in enumerate(windows):
            _backward(model, ids.to(model.device), number)
            advance(len(ids))
    return SquaredGradients({ref.name: _mean(ref, sums, windows.numel()) for ref in refs}, windows.numel())


def predicted_loss(error: torch.Tensor, moment: torch.Tensor, gradients: torch.Tensor | None) -> float:
    """What replacing W by W + `error` costs: 1/2 sum_n F_n (E M E^T)_nn in nats a token, or tr(E M E^T) without F.

    error [N, K], moment [K, K], gradients [N]; see the module for their scaling.
    """
    n, k = error.shape
    if tuple(moment.shape) != (k, k) or (gradients is not None and tuple(gradients.shape) != (n,)):
        found = None if gradients is None else tuple(gradients.shape)
        raise CalibrationError(
            f"an error of shape {(n, k)} needs a moment {(k, k)} and gradients {(n,)}, "
            f"but they are {tuple(moment.shape)} and {found}; take all three from one weight"
        )
    rows = (error @ moment).mul_(error).sum(1, dtype=torch.float64)
    if gradients is None:
        return rows.sum().item()
    return 0.5 * (rows @ gradients.to(rows)).item()


class _Sums:
    """Running sums by weight name, float64: g^2 [N], and what they will be divided by."""

    def __init__(self) -> None:
        self.squares: dict[str, torch.Tensor] = {}
        self.shares: dict[str, torch.Tensor] = {}

    def watch(self, output: torch.Tensor, *names: str) -> None:
        """Adds up the squared gradients of an output [..., N] when they come; several names have equal parts of it."""

        def add(gradient: torch.Tensor) -> None:
            squares = gradient.detach().float().square().flatten(0, -2).sum(0, dtype=torch.float64)
            for name, part in zip(names, squares.chunk(len(names)), strict=True):
                self.squares[name] = self.squares[name] + part if name in self.squares else part

        output.register_hook(add)

    def share(self, name: str, amount: torch.Tensor) -> None:
        self.shares[name] = self.shares[name] + amount if name in self.shares else amount


class _Experts:
    """Stands in for the forward of a transformers experts module: the same sums, with every output watched."""

    def __init__(self, module: Any, bank: str, refs: Iterable[WeightRef], sums: _Sums) -> None:
        """Raises CalibrationError where the module is not gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
        self.module, self._sums = module, sums
        self._names = {(ref.expert, ref.projection): ref.name for ref in refs}
        shapes = {ref.projection: ref.shape for ref in refs}
        self._count = len(self._names) // len(shapes)
        inner, hidden = shapes["gate"]
        expected = (self._count, 2 * inner, hidden), (self._count, *shapes["down"])
        parameters = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
        found = tuple(tuple(p.shape) if isinstance(p, torch.Tensor) else None for p in parameters)
        if found != expected:
            raise CalibrationError(
                f"{bank}: gate_up_proj and down_proj are {found} in {type(module).__name__} and {expected} by the "
                "checkpoint; gradients need the model as transformers itself builds it from this checkpoint"
            )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """x [T, H], ids and routing weights [T, k] -> [T, H]; ids outside the bank run nothing."""
        self._count_tokens(top_k_index, top_k_weights.detach().double())
        return run_experts(hidden_states, top_k_index, top_k_weights, self._count, self._run)

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        both = linear(x, self.module.gate_up_proj[expert])
        self._sums.watch(both, self._names[expert, "gate"], self._names[expert, "up"])
        gate, up = both.chunk(2, dim=-1)
        y = linear(self.module.act_fn(gate) * up, self.module.down_proj[expert])
        self._sums.watch(y, self._names[expert, "down"])
        return y

    def _count_tokens(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        hit = ids.unsqueeze(-1) == torch.arange(self._count, device=ids.device)  # (T, k, E)
        tokens = hit.sum((0, 1)).double()
        squares = (hit * weights.square().unsqueeze(-1)).sum((0, 1))
        for (expert, projection), name in self._names.items():
            self._sums.share(name, (squares if projection == "down" else tokens)[expert])


def _backward(model: Any, ids: torch.Tensor, number: int) -> None:
    """One window's loss and its gradients; the graph starts at the embedded tokens, which are few."""
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids.unsqueeze(0)).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
        loss = cross_entropy(logits.float(), ids[1:], reduction="sum")
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"the loss of window {number} is {loss.item()}; load the model in float32, and if it is already, "
                "the checkpoint or its config.json is damaged"
            )
        loss.backward()


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter asks for a gradient inside the block."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _tapped(module: Any, ref: WeightRef, sums: _Sums) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, args, output: sums.watch(output, ref.name))
    try:
        yield
    finally:
        handle.remove()


def _mean(ref: WeightRef, sums: _Sums, tokens: int) -> torch.Tensor:
    """F of one weight from its sums."""
    squares = sums.squares.get(ref.name)
    if squares is None:
        if ref.expert is None:
            raise CalibrationError(f"the model never ran {ref.name}; this architecture cannot be measured")
        return torch.zeros(ref.shape[0])
    rows = squares / (tokens if ref.expert is None else sums.shares[ref.name])
    if squares.any() and not torch.isfinite(rows).all():
        raise CalibrationError(
            f"{ref.name}: {int((~rows.isfinite()).sum())} of {len(rows)} gradients are not finite; load the model in "
            "float32, and if it is already, calibrate on another text"
        )
    return rows.nan_to_num().float().cpu()  # 0 / 0: routing weights that are all zero


def _banks(refs: Iterable[WeightRef]) -> dict[str, list[WeightRef]]:
    banks: dict[str, list[WeightRef]] = {}
    for ref in refs:
        if ref.bank is not None:
            banks.setdefault(ref.bank, []).append(ref)
    return banks


def _module(model: Any, graph: ModelGraph, stored: str) -> Any:
    name = graph.family.module_name(stored)
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CalibrationError(f"{type(model).__name__} has no module {name}, which the checkpoint names") from error


def _check(model: Any, windows: torch.Tensor) -> None:
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise CalibrationError(
            f"gradients need token ids of shape (windows, tokens) with 2 tokens or more, not {tuple(windows.shape)}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    low, high = (int(value) for value in windows.aminmax())
    if low < 0 or high >= rows:
        raise CalibrationError(
            f"token ids run from {low} to {high}, the model knows 0 to {rows - 1}; use its own tokenizer"
        )
    if model.training:
        raise CalibrationError("the model is in training mode, where a loss may be random; call model.eval() first")
