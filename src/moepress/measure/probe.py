# SPDX-License-Identifier: Apache-2.0
"""Probe: what noise at each weight's output does to the residual stream, with one decoder layer in memory.

A stand-in for the Fisher rows of `gradients` where the whole model's gradients cannot be had. Both make errors of
different weights comparable in sum_n F_n (E M E^T)_nn, E [N, K] being the error of a weight and M its inputs' moment;
here that is the noise that the error adds to the residual stream relative to the stream, so it has no unit. For row n
of a weight,

    F_n = mean over its tokens of (d(z . y) / d(its output n))^2,        expected over z

where y [T, D] is the residual stream after the sub-block (attention, or feed-forward) that the weight belongs to, and
z [T, D] has independent signs of size 1 / (sqrt(D) rms_t), rms_t being the root mean square of token t of that stream.
It is taken per token because few tokens of very large activations would hide all others in a mean over tokens.

Signs have the same expectation as a normal z, with less spread. Where noise goes into the stream as it is (attn.o,
every down), each single draw is exact: F_n = mean of 1 / (D rms_t^2), times the square of what the model scales that
output with. The means are those of `gradients`: over all tokens; over the expert's tokens for a routed gate or up; and
weighted by the squared routing weight, which M has already, for a routed down. The measure and its form are ours.

Costs, all over few windows: two runs of the layer's attention and one backward pass through it, and two runs and half a
backward pass of each expert, whose weights are read twice. Memory: the layer's dense weights, one expert's, and the
activations of one window, which for attention without a fused kernel include T x T scores a head.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from moepress.errors import CalibrationError
from moepress.graph.view import ROUTED, WeightRef
from moepress.measure.experts import RoutedExperts
from moepress.measure.hidden import HiddenStates
from moepress.measure.resident import ResidentStates
from moepress.measure.routing import RoutingRecord
from moepress.measure.skeleton import Layer
from moepress.measure.taps import forward_as


def end_factors(attn_o: Sequence[float]) -> list[float]:
    """By layer, what its losses are to be multiplied by once all layers are known: 1 + F_o(last) / F_o(layer).

    `attn_o` has the mean F of each layer's attn.o, in order. F is the harm that noise does as input of the layers that
    follow, which read the stream normalised; this adds the harm of what stays of it to the end, relative to the stream
    there. Only with it are late layers, whose stream is the largest, not underrated.
    """
    if not attn_o or not all(math.isfinite(value) and value > 0 for value in attn_o):
        raise CalibrationError(f"the sensitivities of attn.o must be above 0, one per layer, not {list(attn_o)}")
    # smol qwen2_moe, 30 layers: planning 3.9 / 2.5 bits by F alone costs 15 / 9 % more Fisher loss than planning by
    # Fisher itself, with these factors 8 / 6 %; 1 + 2 ratio and 1 + 4 ratio give 5 / 5 and 6 / 5 %
    return [1 + attn_o[-1] / value for value in attn_o]


class Probe:
    """Measures one layer. The layer is left as it was."""

    def __init__(
        self,
        layer: Layer,
        inputs: HiddenStates | ResidentStates,
        device: torch.device,
        *,
        run: Callable[[torch.Tensor], torch.Tensor],
        route: Callable[[torch.Tensor, RoutingRecord], None],
        load: Callable[[WeightRef], torch.Tensor],
        scratch: Callable[[str, int, int], HiddenStates | ResidentStates],
    ) -> None:
        """`run` is the whole layer, `route` notes where the router sends a block's input, `load` reads a weight, and
        `scratch` makes hidden states from a name, their columns and their windows."""
        self._layer, self._inputs, self._device = layer, inputs, device
        self._run, self._route, self._load, self._scratch = run, route, load, scratch
        self._routed = tuple(ref for ref in layer.refs if ref.group == ROUTED)

    def measure(self, windows: int, seed: int) -> dict[str, torch.Tensor]:
        """Weight name -> F, float32 [N] on the CPU, from that many windows, evenly spaced over the inputs."""
        if windows < 1:
            raise CalibrationError(f"sensitivities of {windows} windows cannot be measured; take 1 or more")
        total = self._inputs.shape[0]
        count = min(windows, total)
        chosen = [number * total // count for number in range(count)]
        rows = self._routed_block(chosen, seed) if self._routed else self._dense_block(chosen, seed)
        if self._routed and count < total:
            _fill_unseen(self._routed, rows)
        for name, values in rows.items():
            if not torch.isfinite(values).all():
                raise CalibrationError(
                    f"{name}: {int((~values.isfinite()).sum())} of {len(values)} sensitivities are not finite; "
                    "the weights or the hidden states of this layer are damaged, or the text is unusual"
                )
        return rows

    # ---------------------------------------------------------------------------------------------- sub-blocks

    def _dense_block(self, chosen: Sequence[int], seed: int) -> dict[str, torch.Tensor]:
        squares = _Squares(self._layer, len(chosen) * self._inputs.shape[1])
        for window in chosen:
            self._attention(window, seed, squares)
            self._feed_forward(window, seed, squares)
        return squares.means()

    def _routed_block(self, chosen: Sequence[int], seed: int) -> dict[str, torch.Tensor]:
        length, columns = self._inputs.shape[1:]
        squares = _Squares(self._layer, len(chosen) * length)
        record = RoutingRecord(1 + max(ref.expert or 0 for ref in self._routed), self._layer.probability)
        with ExitStack() as stack:
            # the block's inputs; the experts' summed outputs, which then make room for the gradients at them
            block, outer = (self._scratch(name, columns, len(chosen)) for name in ("probe-block", "probe-experts"))
            stack.callback(block.close)
            stack.callback(outer.close)
            for place, window in enumerate(chosen):
                block_input = self._attention(window, seed, squares)
                block.write(place, block_input)
                with torch.no_grad():
                    self._route(block_input, record)
            outer.keep_zeros()
            experts = RoutedExperts(
                self._routed, record, block, outer, self._layer.act_fn, self._load, self._device
            )  # fmt: skip
            experts.add_outputs()
            for place, window in enumerate(chosen):
                routed = outer.read(place, place + 1).to(self._device).requires_grad_()
                self._feed_forward(window, seed, squares, routed)
                assert routed.grad is not None
                outer.write(place, routed.grad)
            rows = squares.means()
            for expert in range(record.num_experts):
                rows |= experts.sensitivities(expert, outer)
        return rows

    def _attention(self, window: int, seed: int, squares: _Squares) -> torch.Tensor:
        """Probes the stream between attention and block. Returns the block's input [1, T, D]."""
        seen: list[torch.Tensor] = []

        def skip(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            seen.append(hidden.detach())
            return torch.zeros_like(hidden)  # so that what leaves the layer is the stream without the block

        with forward_as(self._layer.block, skip), squares.watching("attn"):
            self._backward(window, f"{seed} {self._layer.number} {window} attention")
        return seen[0]

    def _feed_forward(self, window: int, seed: int, squares: _Squares, routed: torch.Tensor | None = None) -> None:
        """Probes the stream after the block, whose routed experts sum up to `routed` [1, T, D]."""
        with ExitStack() as stack:
            if routed is not None:
                # a clone, because some models add to what the experts return in place
                stand_in = lambda hidden, *_, **__: routed.clone().reshape(hidden.shape)  # noqa: E731
                stack.enter_context(forward_as(self._layer.experts, stand_in))
            stack.enter_context(squares.watching("mlp", "shared"))
            self._backward(window, f"{seed} {self._layer.number} {window} block")

    def _backward(self, window: int, key: str) -> None:
        hidden = self._inputs.read(window, window + 1).to(self._device)
        with torch.enable_grad():
            stream = self._run(hidden)
        stream.backward(_signs(stream.shape, key).to(self._device) * stream.detach().square().sum(-1, True).rsqrt())


class _Squares:
    """Sums of squared gradients at the outputs of a layer's dense weights, by weight name: float64 [N]."""

    def __init__(self, layer: Layer, tokens: int) -> None:
        self._layer, self._tokens = layer, tokens
        self._refs = [ref for ref in layer.refs if ref.expert is None]
        self._sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self, *groups: str) -> Iterator[None]:
        """Inside the block, weights of these groups start a graph, and gradients that reach them count."""
        handles = [
            self._layer.linear(ref).register_forward_hook(partial(self._watch, ref.name))
            for ref in self._refs
            if ref.group in groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def means(self) -> dict[str, torch.Tensor]:
        if missing := [ref.name for ref in self._refs if ref.name not in self._sums]:
            raise CalibrationError(
                f"{missing[0]} does not act on the residual stream; this architecture cannot be measured"
            )
        return {name: (total / self._tokens).float().cpu() for name, total in self._sums.items()}

    def _watch(self, name: str, _: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        def add(gradient: torch.Tensor) -> None:
            squares = gradient.square().flatten(0, -2).sum(0, dtype=torch.float64)
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares

        if not output.requires_grad:
            output = output.requires_grad_()
            output.register_hook(add)
            return output.clone()  # some models clamp it in place, which a tensor that starts a graph forbids
        output.register_hook(add)
        return output


def _signs(shape: Sequence[int], key: str) -> torch.Tensor:
    """-1 or 1, float32 on the CPU; the same for the same key on every device and in every order."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    bits = torch.randint(0, 2, tuple(shape), generator=torch.Generator().manual_seed(number))
    return bits.float().mul_(2).sub_(1)


def _fill_unseen(refs: Sequence[WeightRef], rows: dict[str, torch.Tensor]) -> None:
    """Gives experts that none of the probed tokens reached the mean of the others.

    Tokens of other windows may reach them, and F = 0 would call their errors free.
    """
    for projection in ("gate", "up", "down"):
        names = [ref.name for ref in refs if ref.projection == projection]
        seen = [rows[name].mean() for name in names if rows[name].any()]
        for name in names:
            if seen and not rows[name].any():
                rows[name] = torch.full_like(rows[name], float(torch.stack(seen).mean()))
