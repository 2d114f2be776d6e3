# SPDX-License-Identifier: Apache-2.0
"""LayerPass: one decoder layer of a calibration walk, input by input.

The attention core runs once: what its output projection reads is stored (A), and so is what the feed-forward block
reads (M) and the sum of the routed experts' outputs (X). Later runs of the layer take these instead of computing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moepress.errors import CalibrationError
from moepress.graph.view import ROUTED, WeightRef
from moepress.measure.experts import RoutedExperts
from moepress.measure.hidden import HiddenStates, Pool
from moepress.measure.probe import Probe
from moepress.measure.resident import ResidentStates
from moepress.measure.routing import Routing, RoutingRecord
from moepress.measure.site import Chunk, Site, stage
from moepress.measure.skeleton import Call, Skeleton
from moepress.measure.taps import Reached, forward_as, input_of

Scratch = HiddenStates | ResidentStates
_FIRST = ("attn.q", "attn.q_a", "attn.k", "attn.v", "attn.kv_a")
_LATENT = ("attn.q_b", "attn.kv_b")


@dataclass(frozen=True)
class Room:
    """Where a walk keeps its hidden states and how much it may hold in memory."""

    folder: Path
    pool: Pool
    stage_bytes: int
    windows: int
    length: int
    batch: int
    device: torch.device
    resident_bytes: int
    """What scratch states on the device may take, each; 0 keeps them on the host."""

    def batches(self) -> Iterator[tuple[int, int]]:
        """First and last + 1 window of each run of the layer."""
        for first in range(0, self.windows, self.batch):
            yield first, min(first + self.batch, self.windows)

    def scratch(self, name: str, columns: int, windows: int | None = None) -> Scratch:
        count = self.windows if windows is None else windows
        shape = (count, self.length, columns)
        if 4 * count * self.length * columns <= self.resident_bytes:
            return ResidentStates(shape, self.device)
        return HiddenStates(self.folder / f"{name}.scratch", shape, self.pool)


class LayerPass:
    """Ask `stages` for the sites in forward order, replace what you like, then `finish`."""

    def __init__(
        self, skeleton: Skeleton, room: Room, number: int, call: Call, states: HiddenStates, target: Path
    ) -> None:
        """`states` are the layer's inputs, which this pass closes; its outputs go to `target`."""
        self.number, self._target = number, target
        self.output: HiddenStates | None = None
        """What the next layer reads, once `finish` is done."""
        self._source, self._device = skeleton.source, skeleton.device
        self._layer, self._room, self._call, self._in = skeleton.load_layer(number), room, call, states
        self._a: Scratch | None = None
        self._m: Scratch | None = None
        self._x: Scratch | None = None
        self._experts: RoutedExperts | None = None
        self._routing: Routing | None = None
        self.residual = self._mean_square()
        """Mean square of the residual stream at the layer's input."""
        self._stages = self._run_stages()

    @property
    def refs(self) -> tuple[WeightRef, ...]:
        """All weights of the layer."""
        return self._layer.refs

    @property
    def routing(self) -> Routing | None:
        """Use of the experts, known once the attention stages are over; None for a dense layer."""
        if self._routing is None and self._layer.experts is not None:
            raise CalibrationError(f"the routing of layer {self.number} is not known before its attention stages end")
        return self._routing

    def stages(self) -> Iterator[list[Site]]:
        """Lists of sites whose inputs are known now and independent of each other. A second call goes on, not anew."""
        return self._stages

    def expert_error(
        self, expert: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, batch_windows: int = 8
    ) -> float:
        """How much the MoE block's output changes if this expert alone has these weights instead of the source's.

        The Frobenius norm over each batch of windows, summed (PMQ's epsilon). From the expert stages to `finish`.
        """
        if self._experts is None:
            raise CalibrationError(
                f"layer {self.number} has no expert inputs now; ask between its attention stages and finish()"
            )
        return self._experts.error(expert, gate, up, down, batch_windows)

    def sensitivities(self, windows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
        """Weight name -> F [N]: how much noise at each row's output becomes noise of the residual stream (see `probe`).

        Float32 on the CPU, from that many windows, evenly spaced; the same for the same inputs and seed. To be asked
        before anything is replaced: dense weights are used as they are now, the experts' are the source's.
        """
        if self._layer.module is None:
            raise CalibrationError(f"layer {self.number} is freed; ask for its sensitivities before finish()")
        probe = Probe(
            self._layer, self._in, self._device,
            run=self._run, route=self._route, load=self._load, scratch=self._room.scratch,
        )  # fmt: skip
        return probe.measure(windows, seed)

    def finish(self) -> None:
        """Runs what is left of the layer, stores its outputs for the next one and frees it. Safe to call twice."""
        if self.output is not None:
            return
        for _ in self._stages:
            pass
        self._experts = None
        if self._m is not None:
            self._m.close()
        output = HiddenStates(self._target, self._in.shape, self._room.pool, lasting=True)
        try:
            for first, last in self._room.batches():
                output.write(first, self._output(first, last))
                for states in (self._in, self._a, self._x):
                    if states is not None:
                        states.release(first, last)
            output.complete()
        except BaseException:
            output.close()
            raise
        self.close()
        self.output = output

    def close(self) -> None:
        """Frees everything but a finished output."""
        self._stages.close()
        self._experts = None
        for states in (self._in, self._a, self._m, self._x):
            if states is not None:
                states.close()
        self._layer.module = self._layer.attention = self._layer.block = None

    # ---------------------------------------------------------------------------------------------- stages

    def _run_stages(self) -> Iterator[list[Site]]:
        unknown = [
            ref.role for ref in self.refs if ref.group == "attn" and ref.role not in (*_FIRST, *_LATENT, "attn.o")
        ]
        if unknown:
            raise CalibrationError(f"layer {self.number} has weights of role {unknown[0]}, whose input is not known")
        normed = partial(self._dense_inputs, lambda h: input_of(self._layer.attention, partial(self._run, h)))
        yield from stage([self._site(self._of(*_FIRST), normed)])
        if latent := self._of(*_LATENT):
            yield from stage([self._site((ref,), partial(self._dense_inputs, self._stop_at(ref))) for ref in latent])
        (out,) = self._of("attn.o")
        self._store_attention(out)
        yield from stage([self._site((out,), partial(self._stored, self._a))])
        self._store_block_input()
        group = "mlp" if self._layer.experts is None else "shared"
        if down := self._of(f"{group}.down"):
            yield from stage([self._site(self._of(f"{group}.gate", f"{group}.up"), partial(self._stored, self._m))])
            yield from stage([self._site(down, partial(self._inner, down[0]))])
        if self._experts is not None:
            yield from self._experts.stages(self._room.stage_bytes)

    def _of(self, *roles: str) -> tuple[WeightRef, ...]:
        return tuple(ref for ref in self.refs if ref.role in roles)

    def _site(self, refs: tuple[WeightRef, ...], inputs: Callable[[], Iterator[Chunk]]) -> Site:
        total = self._room.windows * self._room.length
        return Site(refs, total, total, inputs, self._load, self._put, self._device)

    def _load(self, ref: WeightRef) -> torch.Tensor:
        return self._source.weight(ref).to(self._device, torch.float32)

    def _put(self, ref: WeightRef, tensor: torch.Tensor) -> None:
        self._layer.linear(ref).weight.data.copy_(tensor)

    # ---------------------------------------------------------------------------------------------- inputs

    def _read(self, states: Scratch, first: int, last: int) -> torch.Tensor:
        return states.read(first, last).to(self._device)

    def _run(self, hidden: torch.Tensor) -> Any:
        return self._layer.module(hidden, *self._call.args, **self._call.kwargs)

    def _stop_at(self, ref: WeightRef) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda hidden: input_of(self._layer.linear(ref), partial(self._run, hidden))

    def _dense_inputs(self, tap: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Chunk]:
        for first, last in self._room.batches():
            yield tap(self._read(self._in, first, last)).flatten(0, -2), None

    def _stored(self, states: Scratch) -> Iterator[Chunk]:
        for first, last in self._room.batches():
            yield self._read(states, first, last).flatten(0, 1), None

    def _inner(self, down: WeightRef) -> Iterator[Chunk]:
        parent, module = self._layer.parent(down), self._layer.linear(down)
        assert self._m is not None
        for first, last in self._room.batches():
            block_input = self._read(self._m, first, last)
            yield input_of(module, partial(parent, block_input)).flatten(0, -2), None

    # ---------------------------------------------------------------------------------------------- passes

    def _mean_square(self) -> float:
        total = sum(self._in.read(w, w + 1).double().square_().sum().item() for w in range(self._room.windows))
        return total / (self._room.windows * self._room.length * self._in.shape[2])

    def _store_attention(self, out: WeightRef) -> None:
        tap, self._a = self._stop_at(out), self._room.scratch("attention", out.shape[1])
        for first, last in self._room.batches():
            self._a.write(first, tap(self._read(self._in, first, last)).reshape(last - first, self._room.length, -1))

    def _attended(self, first: int, last: int) -> Any:
        """A context in which the layer's attention gives the output projection of what was stored."""
        assert self._a is not None
        (out,) = self._of("attn.o")
        stored, module = self._read(self._a, first, last), self._layer.linear(out)
        return forward_as(self._layer.attention, lambda *_, **__: (module(stored), None))

    def _store_block_input(self) -> None:
        layer, self._m = self._layer, self._room.scratch("block", self._in.shape[2])
        routed = tuple(ref for ref in self.refs if ref.group == ROUTED)
        record = RoutingRecord(1 + max((ref.expert or 0 for ref in routed), default=0), layer.probability)
        for first, last in self._room.batches():
            with self._attended(first, last):
                m = input_of(layer.block, partial(self._run, self._read(self._in, first, last)))
            self._m.write(first, m)
            if routed:
                self._route(m, record)
        if routed:
            self._routing, self._x = record.summary(), self._room.scratch("experts", self._in.shape[2])
            self._x.keep_zeros()
            self._experts = RoutedExperts(
                routed, record, self._m, self._x, layer.act_fn, self._load, self._device
            )  # fmt: skip

    def _route(self, block_input: torch.Tensor, record: RoutingRecord) -> None:
        def stop(hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> None:
            record.add(hidden, index, weight)
            raise Reached(hidden)

        with forward_as(self._layer.experts, stop):
            try:
                self._layer.block(block_input)
            except Reached:
                return
        raise CalibrationError(f"layer {self.number} does not call its experts; this architecture cannot be measured")

    def _output(self, first: int, last: int) -> torch.Tensor:
        hidden = self._read(self._in, first, last)
        with self._attended(first, last):
            if self._x is None:
                return self._run(hidden)
            routed = self._read(self._x, first, last)
            with forward_as(self._layer.experts, lambda h, *_, **__: routed.reshape(h.shape)):
                return self._run(hidden)
