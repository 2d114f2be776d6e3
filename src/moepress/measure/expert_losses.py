# SPDX-License-Identifier: Apache-2.0
"""PMQ's evidence: how much the MoE block's output changes when one expert alone has few bits.

Measured twice: with the authors' own plain rounding ("rtn", 1 to 3 bits), which gives their allocations, and with the
quantiser that will really be used (1 to 4 bits), both in groups of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from moepress.format.packing import pack_codes, unpack_codes
from moepress.format.spec import PROJECTIONS
from moepress.format.weight import affine
from moepress.graph.view import ROUTED
from moepress.measure.calibration import PMQ_BITS, PMQ_GROUP
from moepress.measure.layer_pass import LayerPass
from moepress.measure.site import Site
from moepress.measure.tables import Entry, reference_rtn

RTN_BITS = (1, 2, 3)


@dataclass(frozen=True)
class _Packed:
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    columns: int


class ExpertLosses:
    """Collects an expert's quantised gate and up until its down-projection is there; then its losses are measured."""

    def __init__(self, layer: LayerPass, method: str) -> None:
        self._layer, self._method = layer, method
        self._sources: dict[tuple[int, str], Callable[[], torch.Tensor]] = {}
        self._packed: dict[tuple[int, str, int], _Packed] = {}
        self.found: dict[int, dict[str, dict[int, float]]] = {}
        """Expert -> quantiser -> bits -> loss."""

    def keep(self, entry: Entry) -> None:
        """Remembers a routed weight's codes, packed, if this width is one that is asked for."""
        bits, group_size = entry.width
        if self._method != "rtn" and bits in PMQ_BITS and group_size == PMQ_GROUP:
            base, expert = entry.base, entry.ref.expert
            assert expert is not None, f"{entry.ref.name} is no routed expert's"
            self._packed[expert, entry.ref.projection, bits] = _Packed(
                pack_codes(base.codes, bits), base.scale, base.zero, entry.ref.shape[1]
            )

    def end_stage(self, stage: Iterable[Site]) -> None:
        """Measures each expert whose down-projection this stage had."""
        for site in stage:
            for ref in site.refs:
                if ref.group == ROUTED and ref.expert is not None:
                    self._sources[ref.expert, ref.projection] = _reading(site.weights, ref.name)
                    if ref.projection == "down":
                        self.found[ref.expert] = self._measure(ref.expert)

    def _measure(self, expert: int) -> dict[str, dict[int, float]]:
        read = {projection: self._sources.pop((expert, projection)) for projection in PROJECTIONS}
        losses = {
            "rtn": {
                bits: self._layer.expert_error(
                    expert, **{projection: reference_rtn(read[projection](), bits) for projection in PROJECTIONS}
                )
                for bits in RTN_BITS
            }
        }
        if self._method != "rtn":
            losses[self._method] = {
                bits: self._layer.expert_error(
                    expert,
                    **{projection: _unpack(self._packed.pop((expert, projection, bits)), bits)
                       for projection in PROJECTIONS},
                )
                for bits in PMQ_BITS
            }  # fmt: skip
        return losses


def _reading(weights: Mapping[str, torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: weights[name]


def _unpack(packed: _Packed, bits: int) -> torch.Tensor:
    codes = unpack_codes(packed.codes, bits, packed.columns)
    return affine(codes, packed.scale, packed.zero, PMQ_GROUP)
