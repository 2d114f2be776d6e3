# SPDX-License-Identifier: Apache-2.0
"""The routed experts of one layer, run one at a time over the tokens that the router sent to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import linear

from moepress.errors import CalibrationError
from moepress.graph.view import WeightRef
from moepress.measure.hidden import HiddenStates
from moepress.measure.resident import ResidentStates
from moepress.measure.routing import RoutingRecord
from moepress.measure.site import Chunk, Site, stage

_ROWS = 1024
"""Tokens at a time; a constant, so that neither batch nor memory can change the order of sums."""
_COPIES = 3
"""Of a moment and of an expert's weights: one here, two for a consumer that factors and compresses them."""


class RoutedExperts:
    """Stages over the experts in ascending order; their weighted outputs add up in `outputs` [windows, T, D]."""

    def __init__(
        self,
        refs: tuple[WeightRef, ...],
        record: RoutingRecord,
        inputs: HiddenStates | ResidentStates,
        outputs: HiddenStates | ResidentStates,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        load: Callable[[WeightRef], torch.Tensor],
        device: torch.device,
    ) -> None:
        """`inputs` are those of the MoE block; `load` gives a weight of the source in float32 on the device."""
        self._refs = {(ref.expert, ref.projection): ref for ref in refs}
        self._record, self._inputs, self._outputs = record, inputs, outputs
        self._act_fn, self._load, self._device = act_fn, load, device
        self._changed: dict[str, torch.Tensor] = {}

    def stages(self, limit: int) -> Iterator[list[Site]]:
        """For each group of experts that fits into `limit` bytes: gate and up, then down."""
        experts = range(self._record.num_experts)
        size = max(1, limit // self._num_bytes())
        for first in experts[::size]:
            group = experts[first : first + size]
            yield from stage([self._site(e, ("gate", "up"), partial(self._x, e)) for e in group])
            yield from stage([self._site(e, ("down",), partial(self._inner, e)) for e in group])
            for expert in group:
                self._add_output(expert)
            self._changed.clear()

    def error(self, expert: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, batch_windows: int) -> float:
        """PMQ's epsilon: the Frobenius norm of the change of the block's output, summed over batches of windows."""
        if (expert, "gate") not in self._refs:
            raise CalibrationError(f"there is no expert {expert}; the layer has {self._record.num_experts}")
        new = [w.detach().to(self._device, torch.float32) for w in (gate, up, down)]
        for weight, projection in zip(new, ("gate", "up", "down"), strict=True):
            if tuple(weight.shape) != (ref := self._refs[expert, projection]).shape:
                raise CalibrationError(f"the new {ref.name} has shape {tuple(weight.shape)}, the old one {ref.shape}")
        old = [self._load(self._refs[expert, projection]) for projection in ("gate", "up", "down")]
        tokens, scale = self._record.of(expert)
        per_batch = batch_windows * self._inputs.shape[1]
        ends = torch.arange(per_batch, self._inputs.shape[0] * self._inputs.shape[1] + per_batch, per_batch)
        sizes = torch.diff(torch.searchsorted(tokens, ends), prepend=torch.zeros(1, dtype=torch.int64)).tolist()
        norms = 0.0
        for part, weight in zip(tokens.split(sizes), scale.split(sizes), strict=True):
            square = 0.0
            for x, s in self._chunks(part, weight):
                change = (self._run(x, *new) - self._run(x, *old)).mul_(s.unsqueeze(1))
                square += change.double().square_().sum().item()
            norms += square**0.5
        return norms

    def add_outputs(self) -> None:
        """Adds up what all experts put out, with no stages."""
        for expert in range(self._record.num_experts):
            self._add_output(expert)

    def sensitivities(self, expert: int, outer: HiddenStates | ResidentStates) -> dict[str, torch.Tensor]:
        """Weight name -> mean squared gradient of its rows, float32 [N] on the CPU; zeros if no token comes.

        `outer` [windows, T, D] are the gradients at the sum of the experts' outputs. The mean is over the tokens, for
        the down-projection weighted by s², which its moment has too. The source's weights are used.
        """
        gate, up, down = refs = tuple(self._refs[expert, projection] for projection in ("gate", "up", "down"))
        tokens, scale = self._record.of(expert)
        if not len(tokens):
            return {ref.name: torch.zeros(ref.shape[0]) for ref in refs}
        weights = [self._load(ref) for ref in refs]
        sums = [torch.zeros(ref.shape[0], dtype=torch.float64, device=self._device) for ref in refs]
        for part, (x, s) in zip(tokens.split(_ROWS), self._chunks(tokens, scale), strict=True):
            gradients = self._gradients(x, outer.rows(part).to(self._device) * s.unsqueeze(1), *weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.square().sum(0, dtype=torch.float64)
        shares = {gate.name: len(tokens), up.name: len(tokens), down.name: scale.double().square().sum().item() or 1.0}
        return {ref.name: (total / shares[ref.name]).float().cpu() for ref, total in zip(refs, sums, strict=True)}

    def _num_bytes(self) -> int:
        gate, down = self._refs[0, "gate"].shape, self._refs[0, "down"].shape
        moment = max(gate[1], down[1]) ** 2
        return 4 * _COPIES * (moment + 2 * gate[0] * gate[1] + down[0] * down[1])

    def _site(self, expert: int, projections: tuple[str, ...], inputs: Callable[[], Iterator[Chunk]]) -> Site:
        refs = tuple(self._refs[expert, projection] for projection in projections)
        total = self._inputs.shape[0] * self._inputs.shape[1]
        return Site(refs, len(self._record.of(expert)[0]), total, inputs, self._load, self._put, self._device)

    def _put(self, ref: WeightRef, tensor: torch.Tensor) -> None:
        self._changed[ref.name] = tensor.to(self._device, torch.float32)

    def _weight(self, expert: int, projection: str) -> torch.Tensor:
        ref = self._refs[expert, projection]
        return self._changed[ref.name] if ref.name in self._changed else self._load(ref)

    def _chunks(self, tokens: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part, weight in zip(tokens.split(_ROWS), scale.split(_ROWS), strict=True):
            if len(part):
                yield self._inputs.rows(part).to(self._device), weight.to(self._device)

    def _x(self, expert: int) -> Iterator[Chunk]:
        for x, _ in self._chunks(*self._record.of(expert)):
            yield x, None

    def _inner(self, expert: int) -> Iterator[Chunk]:
        tokens, scale = self._record.of(expert)
        if not len(tokens):
            return
        gate, up = self._weight(expert, "gate"), self._weight(expert, "up")
        for x, s in self._chunks(tokens, scale):
            yield self._act_fn(linear(x, gate)).mul_(linear(x, up)), s

    def _run(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return linear(self._act_fn(linear(x, gate)).mul_(linear(x, up)), down)

    def _gradients(
        self, x: torch.Tensor, outer: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`outer` [n, D] at the output of down -> the gradients at the outputs of gate, up and down."""
        with torch.enable_grad():
            outputs = linear(x, gate).requires_grad_(), linear(x, up).requires_grad_()
            inner = self._act_fn(outputs[0]) * outputs[1]
            return *torch.autograd.grad(inner, outputs, outer @ down), outer

    def _add_output(self, expert: int) -> None:
        tokens, scale = self._record.of(expert)
        if not len(tokens):
            return
        weights = [self._weight(expert, projection) for projection in ("gate", "up", "down")]
        parts = tokens.split(_ROWS)
        for part, (x, s) in zip(parts, self._chunks(tokens, scale), strict=True):
            self._outputs.add_rows(part, self._run(x, *weights).mul_(s.unsqueeze(1)))
