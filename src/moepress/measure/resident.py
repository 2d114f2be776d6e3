# SPDX-License-Identifier: Apache-2.0
"""ResidentStates: scratch hidden states that stay on an accelerator with room for them.

On the host every expert's tokens are gathered by the processor and cross the bus: of an H200's 1.9 s a layer of a small
model (65,536 tokens) that was most.
"""

from __future__ import annotations

import torch


class ResidentStates:
    """[windows, T, D] float32 on a device; what HiddenStates offers for scratch, with the same values."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.shape = shape
        self._values: torch.Tensor | None = torch.zeros(shape, device=device)

    def read(self, first: int, last: int) -> torch.Tensor:
        """Windows first to last - 1, a copy."""
        return self._all[first:last].clone()

    def write(self, first: int, values: torch.Tensor) -> None:
        """Sets windows from `first` on to values [n, T, D]."""
        self._all[first : first + len(values)] = values.detach()

    def keep_zeros(self) -> None:
        """They are zero from the start."""

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The vectors [n, D] of tokens [n] (window * T + position)."""
        return self._all.flatten(0, 1)[tokens.to(self._all.device)]

    def add_rows(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """Adds values [n, D] to the vectors of tokens [n], each once."""
        places = tokens.to(self._all.device)
        flat = self._all.view(-1, self.shape[2])
        flat[places] += values.detach()

    def release(self, first: int = 0, last: int | None = None) -> None:
        """Nothing is freed window by window."""

    def close(self) -> None:
        """Gives the memory back."""
        self._values = None

    @property
    def _all(self) -> torch.Tensor:
        assert self._values is not None, "these hidden states are closed"
        return self._values
