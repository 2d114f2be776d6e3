# SPDX-License-Identifier: Apache-2.0
"""StoredParts: a module that owns the stored tensors of one spec, under the names the format gives them.

Packed, it holds records in the place of `packed`, `scale` and `zero`; gate and up share theirs. The stored tensors are
then made again when they are asked for, to the byte, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moepress.errors import KernelError
from moepress.format.packing import pack_codes
from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts
from moepress.kernels.packing import pack_gate_up, pack_parts
from moepress.kernels.records import RecordLayout, deinterleave, interleaved_rows, unpack_records

DTYPES = {"U8": torch.uint8, "F16": torch.float16}
BASE = ("packed", "scale", "zero")
"""The parts that records stand for."""


class StoredParts(nn.Module):
    """The parts of one weight (N, K), or of `count` stacked ones, as buffers; filled by the checkpoint's loader.

    Packed, `records` is uint8 [count or 1, *layout.shape]; an up has none and finds its own in those of its gate.
    """

    def __init__(self, spec: WeightSpec, out_features: int, in_features: int, count: int | None = None) -> None:
        super().__init__()
        self.spec, self.out_features, self.in_features, self.count = spec, out_features, in_features, count
        self._gate: tuple[StoredParts, ...] = ()  # of a packed up; in a tuple, or it would become a submodule
        self._half: int | None = None  # of interleaved records: 0 for gate, 1 for up
        self.part_names = tuple(spec.parts(out_features, in_features))
        for name, tensor in self._empty(self.part_names, None).items():
            self.register_buffer(name, tensor)

    @property
    def in_records(self) -> bool:
        """Whether records hold the weight."""
        return "packed" not in self._buffers

    def layout(self, interleaved: bool = False) -> RecordLayout:
        """Of its records, packed or not; `interleaved` with another weight of the same spec and shape."""
        rows = interleaved_rows(self.out_features) if interleaved else self.out_features
        return RecordLayout(rows, self.in_features, self.spec.bits, self.spec.group_size)

    def holder(self) -> torch.Tensor:
        """The tensor that has the weight: packed codes, or records."""
        owner = self._gate[0] if self._gate else self
        return owner.get_buffer("records" if "records" in owner._buffers else "packed")

    def forward(self, slot: int) -> Parts:
        """`parts`, by a call: accelerate moves what it offloads to the device for calls, and for nothing else."""
        return self.parts(slot)

    def parts(self, slot: int | None = None) -> Parts:
        """The tensors by local name; with `slot`, those of one of the stacked weights."""
        own = {name: self._buffers[name] for name in self.part_names if name in self._buffers}
        own = own if slot is None else {name: tensor[slot] for name, tensor in own.items()}
        if not self.in_records:
            return own
        if slot is None:
            return self._restored(self.holder().device) | own
        return self._unpacked(slot) | own

    def factors(self) -> Parts:
        """The parts that no records stand for: those of the compensator, if any, packed or not."""
        return {name: self._buffers[name] for name in self.part_names if name not in BASE}

    def to_records(self, up: StoredParts | None = None) -> None:
        """Replaces the base parts by records, those of `up` by the same. What they took in memory is free again."""
        base = self.spec, self.out_features, self.in_features
        records = pack_parts(self.parts(), *base) if up is None else pack_gate_up(self.parts(), up.parts(), *base)
        for half, each in enumerate((self,) if up is None else (self, up)):
            each._half = None if up is None else half
            for name in BASE:
                delattr(each, name)
        if up is not None:
            up._gate = (self,)
        self.register_buffer("records", records.view(-1, *self.layout(up is not None).shape), persistent=False)

    def from_records(self, up: StoredParts | None = None) -> None:
        """Undoes `to_records`."""
        restored = [(each, each._restored(self.holder().device)) for each in (self, up) if each is not None]
        for each, parts in restored:
            each._half, each._gate = None, ()
            others = {name: each._buffers.pop(name) for name in each.part_names if name in each._buffers}
            for name, tensor in (parts | others).items():  # in their usual order
                each.register_buffer(name, tensor)
        del self.records

    def _unpacked(self, slot: int) -> dict[str, torch.Tensor]:
        base = unpack_records(self.holder()[slot], self.layout(self._half is not None))
        if self._half is not None:
            base = tuple(deinterleave(tensor, self.out_features)[self._half].contiguous() for tensor in base)
        codes, scale, zero = base
        return {"packed": pack_codes(codes, self.spec.bits), "scale": scale, "zero": zero}

    def _restored(self, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The base parts of all weights on `device`."""
        whole = self._empty(BASE, device)
        for slot in range(self.count or 1):
            for name, tensor in self._unpacked(slot).items():
                (whole[name] if self.count is None else whole[name][slot]).copy_(tensor)
        return whole

    def _empty(self, names: tuple[str, ...], device: torch.device | str | None) -> dict[str, torch.Tensor]:
        kinds = self.spec.parts(self.out_features, self.in_features)
        lead = () if self.count is None else (self.count,)
        return {
            name: torch.empty((*lead, *shape), dtype=DTYPES[dtype], device=device)
            for name, (dtype, shape) in kinds.items() if name in names
        }  # fmt: skip

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The stored tensors, whatever stands for them; what records hold is made again on the CPU, in their order."""
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        if self.in_records:
            own |= {prefix + name: tensor for name, tensor in self._restored("cpu").items()}
            own |= {prefix + name: own.pop(prefix + name) for name in self.part_names}
        destination.update(own)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if self.in_records:
            raise KernelError("these weights are packed into records; load into the whole layer, which unpacks them")
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # model.bfloat16() and the like must move these tensors but never round the fp16 scales, which are the format
        stored = {id(buffer) for buffer in self.buffers(recurse=False)}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            same = id(tensor) not in stored or moved.dtype == tensor.dtype
            return moved if same else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        many = "" if self.count is None else f"{self.count} x "
        return f"{many}({self.out_features}, {self.in_features}), {self.spec.tag}{' in records' * self.in_records}"
