# SPDX-License-Identifier: Apache-2.0
"""One weight's job: tensors in, tensors out. Opens no file, picks no device, leaves its input alone; the same input
gives the same bytes on the same machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepress.errors import CheckpointError, PlanError
from moepress.format.packing import pack_codes
from moepress.format.spec import WeightSpec
from moepress.format.weight import Parts, dequantize_base, dequantize_factors
from moepress.quantize.affine import AffineWeight
from moepress.quantize.factors import quantize_factors
from moepress.quantize.hqq import hqq
from moepress.quantize.milo import milo
from moepress.quantize.mse import mse
from moepress.quantize.rtn import rtn

DATA_FREE = {"rtn": rtn, "mse": mse, "hqq": hqq, "milo": hqq}
"""Methods that need no calibration, with the solver of weights without a compensator."""


@dataclass(frozen=True)
class CompressedWeight:
    """What a job produced: the parts of the format, and the relative error |W - W'| / |W| that they leave."""

    parts: Parts
    error: float
    alternations: int


def compress_weight(
    name: str, weight: torch.Tensor, spec: WeightSpec, method: str, iterations: int = 10, refit: bool = True
) -> CompressedWeight:
    """A float weight [N, K] on any device -> its stored parts on that device.

    A weight without a compensator is plain HQQ under `milo`, as in the paper. Raises CheckpointError for NaN or
    Inf, PlanError for a method that needs calibration (moepress.quantize.calibrated).
    """
    check_finite(name, weight)
    if method not in DATA_FREE or (spec.rank and method != "milo"):
        raise PlanError(f"{name}: {method} {spec.tag} is fitted to calibration statistics; give --stats FOLDER")
    if method == "milo" and spec.rank:
        fitted = milo(name, weight.float(), spec.bits, spec.group_size, spec.rank, iterations)
        base, alternations = fitted.base, len(fitted.residual_norms) - 1
        parts = quantize_factors(name, fitted.residual, fitted.u, fitted.v, spec.factor_bits, refit)
    else:
        base, parts, alternations = DATA_FREE[method](name, weight, spec.bits, spec.group_size), {}, 0
    return assemble(weight, spec, base, parts, alternations)


def assemble(
    weight: torch.Tensor, spec: WeightSpec, base: AffineWeight, factors: Parts, alternations: int = 0
) -> CompressedWeight:
    """A fitted base and the stored parts of its compensator, if any, to what a job returns."""
    packed = pack_codes(base.codes, spec.bits)
    parts = {"packed": packed, "scale": base.scale, "zero": base.zero, **factors}
    return CompressedWeight(parts, relative_error(weight, parts, spec), alternations)


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raises CheckpointError with the number of NaN and Inf values, if there are any."""
    # the sum is finite unless a value is not: one cheap pass, and the exact count only when it is needed
    if torch.isfinite(weight.sum(dtype=torch.float32)):
        return
    nans, infs = int(weight.isnan().sum()), int(weight.isinf().sum())
    if nans or infs:
        raise CheckpointError(
            f"{name} holds {nans} NaN and {infs} Inf of {weight.numel()} values; the source is damaged, fetch it again"
        )


def relative_error(weight: torch.Tensor, parts: Parts, spec: WeightSpec) -> float:
    """|W - W'|_F / |W|_F of stored parts, by rows so that no full float copy is made; 0 for a zero weight."""
    n, k = weight.shape
    factors = dequantize_factors(parts, spec, n, k) if spec.rank else None
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    step = max(1, (1 << 20) // k) if weight.device.type == "cpu" else n
    for first in range(0, n, step):
        rows = slice(first, first + step)
        part = {key: parts[key][rows] for key in ("packed", "scale", "zero")}
        approximate = dequantize_base(part, spec, k)
        if factors is not None:
            approximate = torch.addmm(approximate, factors[0][rows], factors[1])
        exact = weight[rows].float()
        squares[1] += exact.square().sum(dtype=torch.float64)
        squares[0] += exact.sub(approximate).square_().sum(dtype=torch.float64)
    lost, total = squares.tolist()
    return (lost / total) ** 0.5 if total else 0.0
