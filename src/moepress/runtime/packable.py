# SPDX-License-Identifier: Apache-2.0
"""Packable: a layer that gives its weights the order in which CUDA kernels read them, and runs on these kernels.

Which kernel runs is settled once for each dtype of inputs, by `kernels.registry`: after loading, or when the first such
input comes. Where the choice is CUDA the stored parts become records and are freed. Records of widths up to 4 take the
bytes that the parts took (and padding of odd shapes); codes of 5 and 6 bits take a byte each.

A packed layer is still the stored one: `state_dict()`, `save_pretrained()`, `parts()` and `dequantize()` give what the
checkpoint holds, to the byte. Loading a state dict unpacks, and so does moving the layer off CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from moepress.errors import KernelError
from moepress.kernels.banks import Weights, Where, describe
from moepress.kernels.problem import Problem
from moepress.kernels.records import RecordLayout
from moepress.kernels.registry import CUDA, TRITON, select
from moepress.runtime.stored import StoredParts

Key = tuple[torch.dtype, int]
"""What a choice is made for: the inputs' dtype, and how many experts a token has (1 for a linear)."""


class Side(NamedTuple):
    """What one bank is made of: buckets (each with the one interleaved with it, if any) and each expert's place."""

    buckets: list[tuple[StoredParts, StoredParts | None]]
    where: Where

    def layouts(self) -> tuple[RecordLayout, ...]:
        """Of the records, bucket by bucket."""
        return tuple(bucket.layout(up is not None) for bucket, up in self.buckets)


class Packable(nn.Module):
    """Base of CompressedLinear and ExpertBank."""

    tables: tuple[str, ...]
    """Names of the buffers with the banks' tables, one for each side."""
    extras: tuple[str, ...] = ()
    """Further buffers that are made with the banks and go with them."""
    _settled: dict[Key, str]
    _settled_on: torch.device | None
    _banks: tuple[Weights, ...]
    _texts: tuple[str, ...]

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

    def banks(self) -> tuple[Weights, ...]:
        """What the kernels take, a bank for each side; () unless settled for CUDA."""
        if not torch.compiler.is_compiling():
            return self._banks
        # by the names of buffers, so that torch.compile knows that their addresses do not change
        return tuple(
            Weights([bucket.records for bucket, _ in side.buckets], getattr(self, table), text, None)
            for side, table, text in zip(self._sides(), self.tables, self._texts, strict=True)
        )

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
        from moepress.kernels.cuda import run

        made = []
        for side, table in zip(self._sides(), self.tables, strict=True):
            layouts = side.layouts()
            bank = run.RecordBank.build(tuple(bucket.records for bucket, _ in side.buckets), layouts, side.where)
            self.register_buffer(table, bank.table, persistent=False)
            made.append(Weights(list(bank.records), bank.table, describe(layouts, side.where), bank))
        self._banks, self._texts = tuple(made), tuple(weights.text for weights in made)

    def _forget(self) -> None:
        """Drops what was settled: the tables hold addresses of records that are about to move."""
        self._settled, self._settled_on, self._banks, self._texts = {}, None, (), ()
        for name in (*self.tables, *self.extras):
            if name in self._buffers:
                delattr(self, name)

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
        made = (*self.tables, *self.extras)
        buffers = {name: tensor for name, tensor in self._buffers.items() if name not in made}
        unsaved = self._non_persistent_buffers_set.difference(made)
        return self.__dict__ | {
            "_buffers": buffers, "_non_persistent_buffers_set": unsaved,
            "_settled": {}, "_settled_on": None, "_banks": (), "_texts": (),
        }  # fmt: skip


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate moves the module's buffers in for each call and out again, as with `offload_buffers=True`."""
    hook = getattr(module, "_hf_hook", None)
    hooks = (hook, *getattr(hook, "hooks", ()))
    return any(getattr(each, "offload", False) and getattr(each, "offload_buffers", False) for each in hooks)
