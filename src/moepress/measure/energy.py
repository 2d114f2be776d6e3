# SPDX-License-Identifier: Apache-2.0
"""How much of an MoE block's output comes from its routed experts, told from weights alone (ours).

With independent normal inputs of unit variance times the norm's gains, gate and up outputs of a unit are normal with
variances g and u, so that E a^2 = E[silu(z sqrt(g))^2] u, and a feed-forward part puts out energy
sum_i |W_down[:, i]|^2 E a_i^2. Of the routed part k of E experts of about equal weight are added: 1/k of one expert's
energy, the median over a few experts; of a shared expert behind a sigmoid gate a quarter of its own.

On two trained models with shared experts the ratio of the two came out at 0.5 to 0.9 and at 1.3 to 2.5; gradients on
text say 0.3 to 0.6 and about 3.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from moepress.errors import PlanError
from moepress.graph.view import ROUTED, ModelGraph, WeightRef

LOOKED_AT = 4
"""Experts of a layer that are read."""
GATED = 0.25
"""Mean square of sigmoid(0) and its surroundings."""
UNNORMALISED = 0.25
"""Mean square of the sum of k routing weights that are left as the softmax over all experts gave them."""
BOUNDS = (1 / 8, 8.0)
_TOP_K = ("num_experts_per_tok", "top_k", "num_experts_per_token")


def routed_energy(
    graph: ModelGraph,
    config: Mapping[str, object],
    weight: Callable[[WeightRef], torch.Tensor],
    gains: Callable[[int], torch.Tensor | None],
) -> dict[int, float]:
    """MoE layer -> energy of its routed part over that of its shared part, within BOUNDS; 1 where nothing is shared.

    `gains(layer)` are those of the norm before the block. Raises PlanError where config.json lacks top_k.
    """
    layers: dict[int, dict[tuple[str, int | None], dict[str, WeightRef]]] = {}
    for ref in graph.weights:
        if ref.group in ("shared", ROUTED):
            layers.setdefault(ref.layer, {}).setdefault((ref.group, ref.expert), {})[ref.projection] = ref
    found = {}
    for layer, parts in layers.items():
        shared = [own for (group, _), own in parts.items() if group == "shared"]
        experts = [own for (group, expert), own in parts.items() if group == ROUTED and (expert or 0) < LOOKED_AT]
        if not shared or not experts:
            found[layer] = 1.0
            continue
        gain = gains(layer)
        own, routed = _energy(shared[0], weight, gain), statistics.median(_energy(e, weight, gain) for e in experts)
        ratio = routed * _routing(config) / max(own * _gate(graph, layer), 1e-30)
        found[layer] = min(max(ratio, BOUNDS[0]), BOUNDS[1])
    return found


def _routing(config: Mapping[str, object]) -> float:
    """Mean sum of the squared routing weights of a token."""
    scaling = config.get("routed_scaling_factor", 1.0)
    square = float(scaling) ** 2 if isinstance(scaling, int | float) else 1.0
    return square / _top_k(config) * (1.0 if config.get("norm_topk_prob", True) else UNNORMALISED)


def _gate(graph: ModelGraph, layer: int) -> float:
    gated = any(f"layers.{layer}." in tensor.name and "shared_expert_gate" in tensor.name for tensor in graph.kept)
    return GATED if gated else 1.0


def _energy(
    part: Mapping[str, WeightRef], weight: Callable[[WeightRef], torch.Tensor], gain: torch.Tensor | None
) -> float:
    gate, up, down = (weight(part[name]).float() for name in ("gate", "up", "down"))
    if gain is not None:
        gate, up = gate * gain, up * gain
    spread, size = gate.square().sum(1).sqrt(), up.square().sum(1)
    return float((down.square().sum(0) * _silu_square(spread) * size).sum())


def _silu_square(spread: torch.Tensor) -> torch.Tensor:
    """E[silu(s z)^2] for normal z, by quadrature."""
    z = torch.linspace(-8, 8, 257)
    density = torch.exp(-z.square() / 2)
    values = torch.nn.functional.silu(spread.unsqueeze(1) * z).square()
    return values @ (density / density.sum())


def _top_k(config: Mapping[str, object]) -> int:
    found = next((config[key] for key in _TOP_K if key in config), None)
    if type(found) is not int or found < 1:
        raise PlanError(f"config.json says {found!r} experts run per token; it needs num_experts_per_tok of at least 1")
    return found
