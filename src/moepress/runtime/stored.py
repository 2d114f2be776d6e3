# SPDX-License-Identifier: Apache-2.0
"""StoredParts: a module that owns the stored tensors of one spec, under the names the format gives them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts

DTYPES = {"U8": torch.uint8, "F16": torch.float16}


class StoredParts(nn.Module):
    """The parts of one weight (N, K), or of `count` stacked ones, as buffers; filled by the checkpoint's loader."""

    def __init__(self, spec: WeightSpec, out_features: int, in_features: int, count: int | None = None) -> None:
        super().__init__()
        self.spec, self.out_features, self.in_features, self.count = spec, out_features, in_features, count
        lead = () if count is None else (count,)
        self.part_names = tuple(spec.parts(out_features, in_features))
        for name, (dtype, shape) in spec.parts(out_features, in_features).items():
            self.register_buffer(name, torch.empty((*lead, *shape), dtype=DTYPES[dtype]))

    def parts(self, slot: int | None = None) -> Parts:
        """The tensors by local name; with `slot`, those of one of the stacked weights."""
        whole = {name: self.get_buffer(name) for name in self.part_names}
        return whole if slot is None else {name: tensor[slot] for name, tensor in whole.items()}

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
        return f"{many}({self.out_features}, {self.in_features}), {self.spec.tag}"
