# SPDX-License-Identifier: Apache-2.0
"""Site: one input of the model, the weights that read it, and what a calibration pass knows about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from moepress.errors import CalibrationError
from moepress.graph.view import WeightRef

Chunk = tuple[torch.Tensor, torch.Tensor | None]
"""Input vectors x [n, K] and the factor s [n] that the model puts on their outputs; None where it is 1."""


class Site:
    """Valid while its stage is the current one; afterwards its inputs are gone and asking raises CalibrationError."""

    def __init__(
        self,
        refs: tuple[WeightRef, ...],
        tokens: int,
        total: int,
        inputs: Callable[[], Iterator[Chunk]],
        load: Callable[[WeightRef], torch.Tensor],
        put: Callable[[WeightRef, torch.Tensor], None],
        device: torch.device,
    ) -> None:
        self.refs = refs
        """The weights that read this input; all have K columns."""
        self.tokens = tokens
        """How many calibration tokens reach it."""
        self.weights: Mapping[str, torch.Tensor] = _Loading({ref.name: ref for ref in refs}, load)
        """Weight name -> the source's values, float32 [N, K] on the device; read anew at each access."""
        self.total, self.device = total, device
        """All calibration tokens, and where tensors are."""
        self._inputs, self._put = inputs, put
        self._moment: torch.Tensor | None = None
        self._open = True

    def __repr__(self) -> str:
        return f"Site({', '.join(ref.name for ref in self.refs)}; {self.tokens} tokens)"

    @property
    def moment(self) -> torch.Tensor:
        """[K, K] float32 on the device: sum of s² x xᵀ over the tokens that reach it / all calibration tokens.

        Computed when first asked for and then held until the stage ends or `release`.
        """
        if self._moment is None:
            self._moment = self._measure()
        return self._moment

    def release(self) -> None:
        """Frees the moment; asking again computes it again."""
        self._moment = None

    def inputs(self) -> Iterator[Chunk]:
        """The vectors themselves, in chunks; the same each time."""
        self._check_open()
        return self._inputs()

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """From here on the pass uses this weight [N, K] instead of the source's."""
        self._check_open()
        ref = next((ref for ref in self.refs if ref.name == name), None)
        if ref is None:
            raise CalibrationError(f"{name} does not read this input; {', '.join(r.name for r in self.refs)} do")
        if tuple(tensor.shape) != ref.shape:
            raise CalibrationError(f"the new {name} has shape {tuple(tensor.shape)}, the old one {ref.shape}")
        self._put(ref, tensor.detach())

    def close(self) -> None:
        """Ends the site's validity and frees what it holds."""
        self._open, self._moment = False, None

    def _measure(self) -> torch.Tensor:
        self._check_open()
        columns = self.refs[0].shape[1]
        total = torch.zeros(columns, columns, device=self.device)
        for x, scale in self._inputs():
            if scale is not None:
                x = x * scale.unsqueeze(1)
            total.addmm_(x.T, x)
        return total.div_(self.total)

    def _check_open(self) -> None:
        if not self._open:
            raise CalibrationError(f"the stage of {self.refs[0].name} is over; use a site before asking for the next")


def stage(sites: list[Site]) -> Iterator[list[Site]]:
    """Yields the sites once and closes them when the consumer moves on."""
    try:
        yield sites
    finally:
        for site in sites:
            site.close()


class _Loading(Mapping[str, torch.Tensor]):
    """Reads a weight at each access, so that none is held."""

    def __init__(self, refs: Mapping[str, WeightRef], load: Callable[[WeightRef], torch.Tensor]) -> None:
        self._refs, self._load = refs, load

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._load(self._refs[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)
