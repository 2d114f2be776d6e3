# SPDX-License-Identifier: Apache-2.0
"""What selectors are trained on: what it costs to keep fewer experts, and choices that a gradient passes.

Two objectives, in this order, both in nats of KL divergence from the unpruned model (the order, the first objective and
all constants are ours):

Measured costs. Let c_j [k] be a token's routing weights when its first j experts are kept (c_k = w), e_i the output of
its i-th expert, and g the gradient, at the sum of these outputs, of log p(y) over the sequence, with each y drawn from
the model's own prediction. The divergence that dropping in this one place causes is, to second order,

    y_j = 1/2 (sum_i (c_j - w)_i s_i)^2,   s_i = g . e_i,

in expectation over the drawn tokens: their gradients' second moment is the Fisher matrix, which is the Hessian of the
KL divergence at the model itself. s is the gradient with respect to the routing weights, so that one backward pass
gives y for every token, layer and j, and needs no expert's output. If g . (a change) is Gaussian, y_j is its variance
times 1/2 chi^2_1, and the likelihood of exp(z_j) = E y_j is, but for constants, that of

    y_j exp(-z_j) + z_j,

which an outlier cannot dominate and which is proper for the mean whatever the distribution.

Distillation. A straight-through Gumbel-Softmax (Jang et al. and Maddison et al., ICLR 2017) over the scores, as OTP
trains its masks: forward runs the drawn choice alone, backward sees the mixture. The gradient at choice j is the
divergence's gradient along c_j, with the errors of all other layers and tokens in it, which measured costs do not know.
The divergence is of whole distributions, KL(unpruned || pruned).

Legend: T tokens, k choices, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from moepress.pruning.rule import rescale

_LARGEST = 30.0
"""Log-costs are cut off there in training: no price comes near, and exp of it and its gradient are finite."""


def candidates(weights: torch.Tensor, renormalises: bool) -> torch.Tensor:
    """weights [T, k] descending -> [T, k, k]: row j - 1 has the weights with which the first j experts are run."""
    k = weights.shape[-1]
    first = torch.ones(k, k, device=weights.device).tril()
    return rescale(weights.unsqueeze(-2).expand(-1, k, -1), first, renormalises)


def measured_costs(slopes: torch.Tensor, weights: torch.Tensor, renormalises: bool) -> torch.Tensor:
    """y [T, k - 1] from s and w, both float32 [T, k] in descending order of w."""
    changes = candidates(weights, renormalises)[:, :-1] - weights.unsqueeze(-2)
    return 0.5 * (changes @ slopes.unsqueeze(-1)).squeeze(-1).square()


def cost_loss(log_costs: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Mean over all of y exp(-z) + z; log_costs and costs of one shape."""
    return (costs * (-log_costs).exp() + log_costs).mean()


def draw_choice(scores: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """scores [T, k] -> one-hot [T, k], the softmax of (scores + Gumbel noise) / temperature in backward.

    The noise is scaled by the temperature as well: draws become the argmax that runs in the end as it falls.
    """
    scores = scores.clamp(min=-_LARGEST)
    noise = torch.empty(scores.shape).exponential_(generator=generator).log().neg().to(scores.device)
    soft = (scores / temperature + noise).softmax(-1)
    hard = one_hot(soft.argmax(-1), scores.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def mix(choice: torch.Tensor, weights: torch.Tensor, renormalises: bool) -> torch.Tensor:
    """choice [T, k] and weights [T, k] descending -> [T, k]: the candidates' weights, mixed by choice."""
    return (choice.unsqueeze(-2) @ candidates(weights, renormalises)).squeeze(-2)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] of both -> mean over tokens of KL(teacher || student) in nats."""
    wanted, given = (logits.float().log_softmax(-1) for logits in (teacher, student))
    return (wanted.exp() * (wanted - given)).sum(-1).mean()
