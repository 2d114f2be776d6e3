# SPDX-License-Identifier: Apache-2.0
"""What selectors are trained on: what it costs to keep fewer experts, and choices that a gradient passes.

Two objectives, in this order, both in nats of KL divergence from the unpruned model (the order, the first objective and
all constants are ours):

Measured costs. Let w [k] be a token's routing weights, c_i what they become when its i-th expert is left out, e_m the
output of its m-th expert, and g the gradient, at the sum of these outputs, of log p(y) over the sequence, with each y
drawn from the model's own prediction. The divergence that leaving out this one expert causes is, to second order,

    y_i = 1/2 (sum_m (c_i - w)_m s_m)^2,   s_m = g . e_m,

in expectation over the drawn tokens: their gradients' second moment is the Fisher matrix, which is the Hessian of the
KL divergence at the model itself. s is the gradient with respect to the routing weights, so that one backward pass
gives y for every token, layer and choice, and needs no expert's output. If g . (a change) is Gaussian, y_i is its
variance times 1/2 chi^2_1, and the likelihood of exp(z_i) = E y_i is, but for constants, that of

    y_i exp(-z_i) + z_i,

which an outlier cannot dominate and which is proper for the mean whatever the distribution. Costs of several experts
are added, as if their outputs were uncorrelated along g. Models of the cost of each set were worse by a quarter, on
just these sets' measured costs: experts have costs of their own, which they could not tell (docs/LOG.md).

Distillation. A straight-through Gumbel-Softmax (Jang et al. and Maddison et al., ICLR 2017) over the scores, as OTP
trains its masks: forward runs the drawn choice alone, backward sees the mixture. The gradient at choice j is the
divergence's gradient along c_j, with the errors of all other layers and tokens in it, which measured costs do not know.
The divergence is of whole distributions, KL(unpruned || pruned).

Legend: T tokens, k choices, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot, pad

from moepress.pruning.rule import rescale

_LARGEST = 30.0
"""Log-costs are cut off there in training: no price comes near, and exp of it and its gradient are finite."""


def candidates(weights: torch.Tensor, renormalises: bool) -> torch.Tensor:
    """weights [T, k] in the order of keeping -> [T, k, k]: row j - 1 has those with which the first j are run."""
    k = weights.shape[-1]
    first = torch.ones(k, k, device=weights.device).tril()
    return rescale(weights.unsqueeze(-2).expand(-1, k, -1), first, renormalises)


def measured_costs(slopes: torch.Tensor, weights: torch.Tensor, renormalises: bool) -> torch.Tensor:
    """y from s and w, all float32 [T, k] in one order."""
    k = weights.shape[-1]
    others = 1 - torch.eye(k, device=weights.device)
    changes = rescale(weights.unsqueeze(-2).expand(-1, k, -1), others, renormalises) - weights.unsqueeze(-2)
    return 0.5 * (changes @ slopes.unsqueeze(-1)).squeeze(-1).square()


def cost_loss(log_costs: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Mean over all of y exp(-z) + z; log_costs and costs of one shape."""
    return (costs * (-log_costs).exp() + log_costs).mean()


def scores_of(log_costs: torch.Tensor) -> torch.Tensor:
    """z [T, k] descending -> -(costs of those left out + number of those run) for keeping the first j, [T, k]."""
    costs = log_costs.clamp(max=_LARGEST).exp()
    left_out = pad(costs.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
    return -(left_out + torch.arange(1, costs.shape[-1] + 1, device=costs.device, dtype=costs.dtype))


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
    """choice and weights [T, k] in the order of keeping -> [T, k]: the candidates' weights, mixed by choice."""
    return (choice.unsqueeze(-2) @ candidates(weights, renormalises)).squeeze(-2)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] of both -> mean over tokens of KL(teacher || student) in nats."""
    wanted, given = (logits.float().log_softmax(-1) for logits in (teacher, student))
    return (wanted.exp() * (wanted - given)).sum(-1).mean()
