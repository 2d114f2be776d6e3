# SPDX-License-Identifier: Apache-2.0
"""Packable: a layer that gives its weights the order in which CUDA kernels read them, and runs on these kernels.

Which kernel runs is settled once for each dtype of inputs, by `kernels.registry`: after loading, or when the first such
input comes. Where the choice is CUDA the stored parts become records and are freed. Records of widths up to 4 take the
bytes that the parts took (and padding of odd shapes); codes of 5 and 6 bits take a byte each.

Compensators stay as they are stored, and their records stand beside them, made with the tables of addresses and dropped
with these.

A packed layer is still the stored one: `state_dict()`, `save_pretrained()`, `parts()` and `dequantize()` give what the
checkpoint holds, to the byte. Loading a state dict unpacks, and so does moving the layer off CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from moepress.errors import KernelError
from moepress.format.spec import WeightSpec
from moepress.kernels.banks import FactorWeights, Weights, Where, describe
from moepress.kernels.factors import FactorShape
from moepress.kernels.problem import Problem
from moepress.kernels.records import RecordLayout
from moepress.kernels.registry import CUDA, TRITON, select
from moepress.runtime.stored import StoredParts

Key = tuple[torch.dtype, int]
"""What a choice is made for: the inputs' dtype, and how many experts a token has (1 for a linear)."""
MADE = ("table", "v_records", "v_table", "u_records", "u_table")
"""Buffers that are made for a side's banks, after its prefix: they hold addresses, or are what addresses point to."""


class Side(NamedTuple):
    """What one bank is made of: buckets (each with the one interleaved with it, if any) and each expert's place."""

    buckets: list[tuple[StoredParts, StoredParts | None]]
    where: tuple[tuple[int, int], ...]

    def layouts(self) -> tuple[RecordLayout, ...]:
        """Of the records, bucket by bucket."""
        return tuple(bucket.layout(up is not None) for bucket, up in self.buckets)

    def records(self) -> list[torch.Tensor]:
        """Of packed buckets."""
        return [bucket.records for bucket, _ in self.buckets]

    def compensated(self) -> tuple[WeightSpec, ...]:
        """The specs that have a compensator."""
        return tuple(bucket.spec for bucket, _ in self.buckets if bucket.spec.rank)

    def factor_shape(self) -> FactorShape | None:
        """Of the compensators' records; None without compensators, or where they have none."""
        bucket, up = self.buckets[0]
        return FactorShape.of(self.compensated(), bucket.out_features, bucket.in_features, 1 if up is None else 2)

    def pack_factors(self, shape: FactorShape) -> tuple[list[torch.Tensor], Where]:
        """Records of v and of u, [experts with a compensator, *layout.shape], and where each expert's lie in them."""
        owners = [expert for expert, (which, _) in enumerate(self.where) if self.buckets[which][0].spec.rank]
        device = self.buckets[0][0].holder().device
        made = [torch.empty((len(owners), *each.shape), dtype=torch.uint8, device=device) for each in shape.layouts]
        for number, (bucket, up) in enumerate(self.buckets):
            if bucket.spec.rank:
                # an expert's slot is its place among the experts of its bucket
                rows = [row for row, expert in enumerate(owners) if self.where[expert][0] == number]
                halves = [each.factors() for each in (bucket, up) if each is not None]
                for whole, part in zip(made, shape.pack(halves, bucket.spec.rank), strict=True):
                    whole[rows] = part.view(-1, *whole.shape[1:])
        places = {expert: (0, row) for row, expert in enumerate(owners)}
        return made, tuple(places.get(expert) for expert in range(len(self.where)))


class Packable(nn.Module):
    """Base of CompressedLinear and ExpertBank."""

    prefixes: tuple[str, ...]
    """What the names of buffers that are made for a side's banks begin with, for each side."""
    _settled: dict[Key, str]
    _settled_on: torch.device | None
    _banks: tuple[Weights, ...]
    _factor_banks: tuple[FactorWeights | None, ...]
    _texts: tuple[tuple[str, ...], ...]
    """For each side the strings of its bank and, if there are, of v's and u's."""

    def _sides(self) -> tuple[Side, ...]:
        raise NotImplementedError

    def _problem(self, key: Key) -> Problem:
        raise NotImplementedError

    @property
    def is_packed(self) -> bool:
        """Whether records hold all weights."""
        return all(bucket.in_records for bucket, _ in self._buckets())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._buckets())[0].holder().device

    def pack(self) -> None:
        """Replaces the stored parts by records, bucket by bucket; on any device, though only CUDA has kernels."""
        with torch.inference_mode(False), torch.no_grad():  # they outlive the forward pass that may have asked for them
            for bucket, up in self._buckets():
                if not bucket.in_records:
                    bucket.to_records(up)

    def unpack(self) -> None:
        """Replaces records by the stored parts. On CUDA the next forward pass would pack again."""
        self._forget()
        with torch.inference_mode(False), torch.no_grad():
            for bucket, up in self._buckets():
                if bucket.in_records:
                    bucket.from_records(up)

    def settle(self, dtype: torch.dtype, top_k: int = 1) -> bool:
        """Whether the CUDA kernels run for inputs of this dtype; packs where they do.

        Raises KernelError while a CUDA graph is captured, and where MOEPRESS_KERNELS asks for the impossible.
        """
        if self._settled_on != self.device:
            self._forget()
            self._settled_on = self.device
        if (dtype, top_k) not in self._settled:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise KernelError(
                    "a compressed layer meets its first input while a CUDA graph is captured; run the model once "
                    "before, with as many tokens"
                )
            self._settled[dtype, top_k] = self._choose((dtype, top_k))
        return self._settled[dtype, top_k] == CUDA

    def layouts(self) -> tuple[tuple[RecordLayout, ...], ...]:
        """Of the records, packed or not: for each side those of its buckets."""
        return tuple(side.layouts() for side in self._sides())

    def factor_layouts(self) -> tuple[tuple[RecordLayout, RecordLayout] | None, ...]:
        """Of v's and u's records, packed or not: for each side, None where it has none."""
        shapes = (side.factor_shape() for side in self._sides())
        return tuple(None if shape is None else shape.layouts for shape in shapes)

    def banks(self) -> tuple[Weights, ...]:
        """What the kernels take, a bank for each side; () unless settled for CUDA."""
        if not torch.compiler.is_compiling():
            return self._banks
        # by the names of buffers, so that torch.compile knows that their addresses do not change
        return tuple(
            Weights(side.records(), self.get_buffer(f"{prefix}table"), text, None)
            for side, prefix, (text, *_) in zip(self._sides(), self.prefixes, self._texts, strict=True)
        )

    def factor_banks(self) -> tuple[FactorWeights | None, ...]:
        """The compensators' banks that belong to `banks`; None for a side that has none in records."""
        if not torch.compiler.is_compiling():
            return self._factor_banks
        return tuple(
            FactorWeights(*(self._named(f"{prefix}{name}_", text) for name, text in zip("vu", texts, strict=True)))
            if texts
            else None
            for prefix, (_, *texts) in zip(self.prefixes, self._texts, strict=True)
        )

    def _named(self, prefix: str, text: str) -> Weights:
        return Weights([self.get_buffer(f"{prefix}records")], self.get_buffer(f"{prefix}table"), text, None)

    def _ready(self, x: torch.Tensor, top_k: int = 1) -> bool:
        """`settle` for this input, at next to no cost where that has been done."""
        if x.device == self._settled_on and (found := self._settled.get((x.dtype, top_k))) is not None:
            return found == CUDA
        if torch.compiler.is_compiling() and x.device.type != "cuda":
            return False
        return self._settle_outside_graphs(x.device, x.dtype, top_k)

    @torch.compiler.disable(
        reason="a compressed layer meets its first input; run the model once, or moepress.warmup(model), before"
    )
    def _settle_outside_graphs(self, device: torch.device, dtype: torch.dtype, top_k: int) -> bool:
        # an input from elsewhere is left to torch, which knows what to say
        return device == self.device and self.settle(dtype, top_k)

    def _on_triton(self, x: torch.Tensor, top_k: int = 1) -> bool:
        """Whether Triton's kernels were chosen for this input, once `_ready` has been asked."""
        return self._settled.get((x.dtype, top_k)) == TRITON

    def _choose(self, key: Key) -> str:
        offloaded = any(_is_offloaded(module) for module in self.modules())
        chosen = select(replace(self._problem(key), offloaded=offloaded))
        if chosen != CUDA:
            return chosen
        self.pack()
        if not self._banks:
            with torch.inference_mode(False):
                self._make_banks()
        return chosen

    def _make_banks(self) -> None:
        made = [
            (
                self._make_bank(f"{prefix}table", side.records(), side.layouts(), side.where),
                self._make_factor_banks(prefix, side),
            )
            for prefix, side in zip(self.prefixes, self._sides(), strict=True)
        ]
        # all or none, should memory run out before
        self._texts = tuple((weights.text, *(each.text for each in factors or ())) for weights, factors in made)
        self._banks, self._factor_banks = zip(*made, strict=True)

    def _make_factor_banks(self, prefix: str, side: Side) -> FactorWeights | None:
        if (shape := side.factor_shape()) is None:
            return None
        both, where = side.pack_factors(shape)
        made = []
        for name, records, layout in zip("vu", both, shape.layouts, strict=True):
            self.register_buffer(f"{prefix}{name}_records", records, persistent=False)
            made.append(self._make_bank(f"{prefix}{name}_table", [records], [layout], where, is_v=name == "v"))
        return FactorWeights(*made)

    def _make_bank(
        self,
        table: str,
        records: Sequence[torch.Tensor],
        layouts: Sequence[RecordLayout],
        where: Where,
        *,
        is_v: bool = False,
    ) -> Weights:
        from moepress.kernels.cuda import run

        bank = run.RecordBank.build(records, layouts, where, is_v=is_v)
        self.register_buffer(table, bank.table, persistent=False)
        return Weights(list(bank.records), bank.table, describe(layouts, where), bank)

    def _forget(self) -> None:
        """Drops what was settled: the tables hold addresses of records that are about to move."""
        self._settled, self._settled_on, self._banks, self._factor_banks, self._texts = {}, None, (), (), ()
        for name in self._made() & self._buffers.keys():
            delattr(self, name)

    def _made(self) -> set[str]:
        return {f"{prefix}{name}" for prefix in self.prefixes for name in MADE}

    def _buckets(self) -> Iterator[tuple[StoredParts, StoredParts | None]]:
        for side in self._sides():
            yield from side.buckets

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        was_on_cuda = self.device.type == "cuda"
        self._forget()
        super()._apply(fn, recurse)
        if was_on_cuda and self.device.type != "cuda":
            self.unpack()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, has records elsewhere, and makes its own tables."""
        made = self._made()
        buffers = {name: tensor for name, tensor in self._buffers.items() if name not in made}
        unsaved = self._non_persistent_buffers_set.difference(made)
        return self.__dict__ | {
            "_buffers": buffers, "_non_persistent_buffers_set": unsaved,
            "_settled": {}, "_settled_on": None, "_banks": (), "_factor_banks": (), "_texts": (),
        }  # fmt: skip


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate moves the module's buffers in for each call and out again, as with `offload_buffers=True`."""
    hook = getattr(module, "_hf_hook", None)
    hooks = (hook, *getattr(hook, "hooks", ()))
    return any(getattr(each, "offload", False) and getattr(each, "offload_buffers", False) for each in hooks)
