# SPDX-License-Identifier: Apache-2.0
"""Problem: what a kernel is asked to do, as far as it decides whether it can. Token counts are not part of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepress.format.spec import WeightSpec
from moepress.kernels.records import RecordLayout

LINEAR, EXPERTS, SELECTOR, ROUTER, PACKING = "linear", "experts", "selector", "router", "packing"
SILU = "silu"


@dataclass(frozen=True)
class Problem:
    """One layer on one device for inputs of one dtype.

    `layouts` are those of its records, each kind once: of the matrix, or of the experts' gate and up interleaved;
    `down` those of the experts' down, of which there are `experts`. `compensated` and `compensated_down` are the specs
    among them that have a compensator. `top_k` is how many experts a token has. `offloaded` weights come to the device
    for each call and go again. Selectors and routers have no records, but `columns` of inputs; packing has no inputs,
    but makes records of `layouts`.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    layouts: tuple[RecordLayout, ...]
    down: tuple[RecordLayout, ...] = ()
    compensated: tuple[WeightSpec, ...] = ()
    compensated_down: tuple[WeightSpec, ...] = ()
    experts: int = 1
    top_k: int = 1
    activation: str = SILU
    offloaded: bool = False
    columns: int = 0
