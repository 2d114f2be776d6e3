# SPDX-License-Identifier: Apache-2.0
"""Scale and zero of every group by weighted least squares: a search over clipped ranges, then regression on the codes.

    min over (scale, zero) of  sum_j d_j (w_j - (code_j - zero) scale)^2,   d = diag H of the inputs

24 ranges from the full one down to 0.4 of it are tried, shrunk around their middle; then, three times, the line
through (code, weight) is solved for and the codes are taken anew. Of all candidates the best is kept, judged as fp16
will store it. One bit is +-mean|w| (MC-MoE, arXiv 2410.06270, appendix A.2).

Legend: B weights, N rows, K columns, G groups of g columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moepress.quantize.affine import MAX_INVERSE_SCALE, MAX_ZERO, group_views, half

CLIP_POINTS = 24
SMALLEST_CLIP = 0.4
REFITS = 3
Candidate = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Error, scale and zero [B, N, G]."""


def fit_groups(
    names: Sequence[str], weights: torch.Tensor, importance: torch.Tensor, top: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N, K], d [B, K] and the highest codes [B] -> scale and zero [B, N, G], float32 holding fp16 values."""
    scales, zeros, start = [], [], 0
    for rows in group_views(weights.flatten(0, 1), group_size):
        shape = (*weights.shape[:2], *rows.shape[1:])
        columns = importance[:, start : start + shape[2] * shape[3]].reshape(-1, 1, *shape[2:])
        scale, zero = _fit(rows.view(shape), columns, top.view(-1, 1, 1))
        scales.append(scale)
        zeros.append(zero)
        start += shape[2] * shape[3]
    scale, zero = torch.cat(scales, 2), torch.cat(zeros, 2)
    for value, kind in ((scale, "scale"), (zero, "zero")):
        for i, name in enumerate(names):
            value[i] = half(name, value[i], kind).float()
    return scale, zero


def codes_of(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """clamp(round(value / scale + zero), 0, top) as float32."""
    return (values / scale).add_(zero).round_().clamp_(min=0).minimum(top)


def _fit(rows: torch.Tensor, importance: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = rows.aminmax(dim=-1)
    middle, reach = (high + low) / 2, torch.maximum(high.abs(), low.abs())
    whole = ((high - low) / top).clamp(min=1 / MAX_INVERSE_SCALE).maximum(reach / MAX_ZERO)
    best = (torch.full_like(whole, torch.inf), whole, top / 2 - middle / whole)
    for clip in torch.linspace(1.0, SMALLEST_CLIP, CLIP_POINTS).tolist():
        # the range shrinks around its middle: the zero moves with the scale
        scale = clip * whole
        best = _better(best, rows, importance, scale, top / 2 - middle / scale, top)
    # a group of one value: code 0 and that value to fp16's precision, so that zeros stay zeros
    flat = high == low
    scale, zero = torch.where(flat, 1.0, whole), torch.where(flat, -low, top / 2 - middle / whole)
    best = _better(best, rows, importance, scale, zero, top)
    for _ in range(REFITS):
        _, scale, zero = best
        codes = codes_of(rows, scale.unsqueeze(-1), zero.unsqueeze(-1), top.unsqueeze(-1))
        best = _better(best, rows, importance, *_regress(rows, codes, importance, scale, zero), top)
    sign = 2 * rows.abs().mean(-1).clamp(min=1 / MAX_INVERSE_SCALE)
    return torch.where(top == 1, sign, best[1]), torch.where(top == 1, 0.5, best[2])


def _better(
    best: Candidate,
    rows: torch.Tensor,
    importance: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    top: torch.Tensor,
) -> Candidate:
    """The better of two, group by group."""
    scale, zero = scale.half().float(), zero.half().float()
    codes = codes_of(rows, scale.unsqueeze(-1), zero.unsqueeze(-1), top.unsqueeze(-1))
    error = codes.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(rows).square_().mul_(importance).sum(-1)
    wins = error < best[0]
    return (
        torch.where(wins, error, best[0]),
        torch.where(wins, scale, best[1]),
        torch.where(wins, zero, best[2]),
    )


def _regress(
    rows: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The line through (code, weight) as scale and zero [B, N, G]; the old ones where the codes do not vary."""
    total = importance.sum(-1)
    mean_code, mean_weight = (codes * importance).sum(-1) / total, (rows * importance).sum(-1) / total
    centred = codes - mean_code.unsqueeze(-1)
    weighted = centred * importance
    spread = (weighted * centred).sum(-1)
    slope = (weighted * (rows - mean_weight.unsqueeze(-1))).sum(-1) / spread
    good = (spread > 0) & (slope > 1 / MAX_INVERSE_SCALE)
    return torch.where(good, slope, scale), torch.where(good, mean_code - mean_weight / slope, zero)
