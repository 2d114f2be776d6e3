# SPDX-License-Identifier: Apache-2.0
"""What a low-rank compensator would leave of an error, without fitting one.

With S = sqrt(F) E M E^T sqrt(F) the loss of an error E is tr S, and of all corrections of rank R the best one takes the
R largest eigenvalues of S away. They come from subspace iteration, with S applied and never formed. Storing the factors
in 4 bits gives some of that back, of which a fixed share is assumed. The prediction is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moepress.quantize.lowrank import seeded

ROUNDING = 0.02
"""Share of what a compensator takes away that the rounding of its factors to 4 bits gives back."""
_OVERSAMPLING = 32
_ITERATIONS = 4


def compensated_losses(
    name: str, error: torch.Tensor, moment: torch.Tensor | None, rows: torch.Tensor | None, loss: float,
    ranks: Sequence[int],
) -> dict[int, float]:  # fmt: skip
    """Rank -> loss left of `loss` = tr S, for E [N, K], M [K, K] and F [N]; None for an identity or ones.

    `name` seeds the start, so that the same input gives the same bytes.
    """
    root = None if rows is None else rows.to(error).clamp(min=0).sqrt_().unsqueeze(1)

    def apply(q: torch.Tensor) -> torch.Tensor:
        y = error.T @ (q if root is None else root * q)
        y = error @ (y if moment is None else moment @ y)
        return y if root is None else y.mul_(root)

    removed = _largest_sums(name, apply, len(error), ranks, error.device)
    return {rank: max(loss - gone, 0.0) + ROUNDING * min(gone, loss) for rank, gone in removed.items()}


def _largest_sums(
    name: str,
    apply: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    ranks: Sequence[int],
    device: torch.device,
) -> dict[int, float]:
    """Rank -> sum of that many largest eigenvalues of a symmetric operator [size, size], a lower bound."""
    columns = min(size, max(ranks) + _OVERSAMPLING)
    q = torch.randn(size, columns, generator=seeded(name)).to(device)
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(apply(q)).Q
    values = torch.linalg.eigvalsh((q.T @ apply(q)).double()).flip(0).clamp_(min=0)
    return {rank: values[:rank].sum().item() for rank in ranks}
