# SPDX-License-Identifier: Apache-2.0
"""What leaving out each of a token's experts would cost, in plain torch: the definition of a selector's arithmetic.

For the token's hidden vector x [H] and a choice of expert e with routing weight w:

    f      = P x / rms(x)                       r features
    z      = o_e + S_e f + p log w
    cost   = exp(z)                             of leaving this choice out, where running an expert costs 1
    kept   = cost >= price, and the choice of the largest cost in any case

How it is learned: moepress/pruning/selector.py. Ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear

LEAST = 1e-6
"""In the mean square of x, as in the norms of transformers' models; and the least weight that has a logarithm."""


class Costs(NamedTuple):
    """The parameters of one layer, float32."""

    projection: torch.Tensor
    """P [r, H]."""
    sensitivity: torch.Tensor
    """S [E, r]."""
    offset: torch.Tensor
    """o [E]."""
    power: torch.Tensor
    """p []."""


def log_costs(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, costs: Costs) -> torch.Tensor:
    """hidden [T, H] in any dtype, ids [T, k], weights [T, k] float32 -> z [T, k] in the parameters' dtype."""
    x = hidden.to(costs.projection.dtype)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + LEAST)
    of_all = linear(linear(x, costs.projection), costs.sensitivity, costs.offset)
    return of_all.gather(-1, ids.long()) + costs.power * weights.clamp(min=LEAST).log()


def worth_running(log_costs: torch.Tensor, price: torch.Tensor | float = 1.0) -> torch.Tensor:
    """z [..., k] -> bool [..., k]: which are kept where an expert costs `price`."""
    return (log_costs.exp() >= price).scatter(-1, log_costs.argmax(-1, keepdim=True), True)
