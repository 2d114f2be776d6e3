# SPDX-License-Identifier: Apache-2.0
"""Stored parts -> records: by the CUDA kernel where it can run, else by the definition in records.py.

The kernel reads and writes each byte once; torch's operations go over temporaries of several bytes a code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts
from moepress.kernels import records as reference
from moepress.kernels.banks import why_not_here
from moepress.kernels.problem import PACKING, Problem
from moepress.kernels.records import Base, RecordLayout, check_base, check_parts, interleaved_rows


def why_not(problem: Problem) -> str | None:
    """None where the kernel can run, else the reason it cannot."""
    if reason := why_not_here(problem):
        return reason
    if (capability := torch.cuda.get_device_capability(problem.device)) < (8, 0):
        here = ".".join(map(str, capability))
        return f"the packing kernel is for compute capability 8.0 and later, and {problem.device} has {here}"
    return None


def pack_parts(parts: Parts, spec: WeightSpec, out_features: int, in_features: int) -> torch.Tensor:
    """`records.pack_parts`, the same bytes and errors."""
    layout = RecordLayout(out_features, in_features, spec.bits, spec.group_size)
    if not _runs_kernel(layout, parts["packed"].device):
        return reference.pack_parts(parts, spec, out_features, in_features)
    lead, flat = check_parts(parts, spec, out_features, in_features)
    return _launch(lead, [flat], spec.bits, layout)


def pack_gate_up(gate: Parts, up: Parts, spec: WeightSpec, out_features: int, in_features: int) -> torch.Tensor:
    """`records.pack_gate_up`, the same bytes and errors."""
    layout = RecordLayout(interleaved_rows(out_features), in_features, spec.bits, spec.group_size)
    if not _runs_kernel(layout, gate["packed"].device):
        return reference.pack_gate_up(gate, up, spec, out_features, in_features)
    (lead, flat_gate), (up_lead, flat_up) = (check_parts(each, spec, out_features, in_features) for each in (gate, up))
    assert lead == up_lead, f"gate and up have different leading dimensions: {tuple(lead)} and {tuple(up_lead)}"
    return _launch(lead, [flat_gate, flat_up], spec.bits, layout)


def pack_codes(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """`records.pack_records` of codes that fit into the layout's bits; that they do is the caller's duty on a GPU."""
    if not _runs_kernel(layout, codes.device):
        return reference.pack_records(codes, scale, zero, layout)
    lead, flat = check_base(codes, scale, zero, layout)
    return _launch(lead, [flat], 8, layout)


def _runs_kernel(layout: RecordLayout, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    from moepress.kernels import registry  # here: its rows import factors.py, which packs

    return registry.select(Problem(PACKING, device, torch.uint8, (layout,))) == registry.CUDA


def _launch(lead: torch.Size, sources: Sequence[Base], stored_bits: int, layout: RecordLayout) -> torch.Tensor:
    from moepress.kernels.cuda.pack import launch_pack

    device = sources[0][0].device
    records = torch.empty((math.prod(lead), *layout.shape), dtype=torch.uint8, device=device)
    contiguous = [tuple(tensor.contiguous() for tensor in source) for source in sources]
    launch_pack(contiguous, stored_bits, layout, records)
    return records.view(*lead, *layout.shape)
