# SPDX-License-Identifier: Apache-2.0
"""Storing a compensator's factors in 3, 4, 8 or 16 bits, one fp16 scale per 64 consecutive row-major elements.

INT3 follows MiLo's released rule: scale = 2 c / 7 with c the *signed* maximum and code = round(x / scale) + 4 in 0..7,
range -8c/7 .. 6c/7 (measured there and here a little better than |x|'s maximum on Gaussian factors: relative error
0.206 against 0.223). INT4 and INT8 put the element of largest size on the lowest code -2^(b-1), which wastes none.
INT3 uses that rule too where the signed maximum is below a quarter of the largest size: a group of one sign, which the
released rule cannot represent and which factors of rank 1 do have.

MiLo quantises u and v independently. Refitting (ours) quantises u, solves v anew for what u has become, quantises v,
and solves and quantises u once more against that: the same bytes, a smaller error (see docs/LOG.md).
"""

from __future__ import annotations

import torch

from moepress.format.packing import pack_codes
from moepress.format.spec import FACTOR_GROUP
from moepress.format.weight import dequantize_factor
from moepress.quantize.affine import half


def quantize_factors(
    name: str, residual: torch.Tensor, u: torch.Tensor, v: torch.Tensor, bits: int, refit: bool
) -> dict[str, torch.Tensor]:
    """float32 u [N, R] and v [R, K] that approximate `residual` [N, K] -> the stored parts of both."""
    if refit and bits < 16:
        v = _solve(_round_trip(name, u, bits), residual)
        u = _solve(_round_trip(name, v, bits).T, residual.T).T
    return quantize_factor(name, "u", u, bits) | quantize_factor(name, "v", v, bits)


def quantize_factor(name: str, label: str, factor: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """float32 [A, B] -> the stored parts of the factor called `label` (u or v)."""
    if bits == 16:
        return {label: half(name, factor, f"factor {label}")}
    flat = factor.float().flatten()
    count = flat.numel()
    groups = torch.nn.functional.pad(flat, (0, -count % FACTOR_GROUP)).view(-1, FACTOR_GROUP)
    scale = half(name, _scale(groups, bits), "factor scale")
    # codes are chosen against the scale that will be stored
    divisor = torch.where(scale == 0, 1.0, scale.float()).unsqueeze(1)
    codes = (groups / divisor).round_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1).to(torch.uint8)
    return {f"{label}_packed": pack_codes(codes.flatten()[:count], bits), f"{label}_scale": scale}


def _solve(left: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """argmin_x |left x - target| for left [A, R] with R <= A, by normal equations in float64 with a tiny ridge."""
    gram = (left.T @ left).double()
    # the ridge stands for the columns that rounding to 3 bits may have emptied
    gram.diagonal().add_(1e-7 * gram.diagonal().mean() + 1e-30)
    return torch.cholesky_solve((left.T @ target).double(), torch.linalg.cholesky(gram)).float()


def _round_trip(name: str, factor: torch.Tensor, bits: int) -> torch.Tensor:
    stored = quantize_factor(name, "f", factor.contiguous(), bits)
    return dequantize_factor(stored["f_packed"], stored["f_scale"], bits, (factor.shape[0], factor.shape[1]))


def _scale(groups: torch.Tensor, bits: int) -> torch.Tensor:
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True)).squeeze(1)
    lowest_code = extreme / -(2.0 ** (bits - 1))
    if bits != 3:
        return lowest_code
    signed_max = groups.amax(1)
    return torch.where(4 * signed_max > extreme.abs(), 2 * signed_max / 7, lowest_code)
