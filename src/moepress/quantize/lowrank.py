# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD by randomised subspace iteration, reproducible from a name.

Halko, Martinsson and Tropp, "Finding Structure with Randomness" (2011), with two power iterations and no oversampling:
what MiLo's `torch.svd_lowrank(W - D, q=rank)` does, except that the random start comes from the weight's name and is
drawn on the CPU, so that every device starts alike and no global random state is read or moved.
"""

from __future__ import annotations

import hashlib

import torch

POWER_ITERATIONS = 2


def seeded(name: str) -> torch.Generator:
    """A CPU generator seeded from the weight's name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def project(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K] -> orthonormal q [N, R] and b = q^T matrix [R, K]; q b is the rank-R approximation."""
    start = torch.randn(matrix.shape[1], rank, generator=generator)
    q = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    return q, q.T @ matrix


def balance(q: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [N, R], b [R, K] -> u = Q Uhat sqrt(S) and v = sqrt(S) Vhat^T with u v = q b (MiLo's split)."""
    # b's SVD through the small triangle of its QR: R x R instead of R x K, with no loss of accuracy
    right, triangle = torch.linalg.qr(b.T)
    left, sizes, rotation = torch.linalg.svd(triangle.T)
    root = sizes.sqrt()
    return (q @ left) * root, root.unsqueeze(1) * (rotation @ right.T)
