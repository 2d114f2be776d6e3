# SPDX-License-Identifier: Apache-2.0
"""What dropping experts saves on a GPU, and what deciding it costs: rows in results.csv.

    python benchmarks/pruned_layer.py [--share 0.3] [--tokens 1,16] [--seconds 0.3] [--note TEXT]

Both as a share of the whole layer's time, timed as `moepress bench` does: CUDA graphs, cold L2 by rotation, medians.

dropped     each copy of the weights has a routing of its own; of all of them together `--share` of the activations is
            dropped, a token's last choices at random, one kept. Bytes saved are those of experts that nobody chose any
            more, so with many tokens there is little to save. Aim: 0.8 of the bytes saved.
router      its one kernel, and the operations of transformers' routers (kernels/router/reference.py), in microseconds.
selectors   router and experts with a selector that keeps all (its dial is -1), beside the same without: in the router's
            launch, and by torch's operations behind the router's operations. Aim: 3 % of it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from common import Figure, finish

from moepress.bench.clock import CudaClock, Machine, copies_needed
from moepress.bench.ours import layouts_of, make_bank
from moepress.bench.problems import LAYERS, Draw, Problem
from moepress.kernels import registry
from moepress.kernels.experts.cuda import packed_experts
from moepress.kernels.router.cuda import route_tokens
from moepress.kernels.router.reference import Routing, route
from moepress.pruning.rule import prune
from moepress.pruning.selector import Selector

ROUTERS = {
    "mixtral-8x7b": Routing(2, True, float32_weights=True),
    "qwen3-30b-a3b": Routing(8, True),
    "deepseek-moe-16b": Routing(6, False, float32_weights=True, float32_logits=True),
}
LEAST_COPIES = 20
"""So that a few tokens' routing is many tokens' on average."""


def dropped_ids(draws: Sequence[Draw], share: float, seed: int) -> list[torch.Tensor]:
    """Of all draws' ids [T, k] together `share` as -1, to the nearest activation: last choices, one of each token kept.

    ValueError for a share that leaves a token without an expert.
    """
    ids = torch.stack([draw.ids for draw in draws])
    places = ids.shape[0] * ids.shape[1], ids.shape[2] - 1
    count = round(share * ids.numel())
    if count > places[0] * places[1]:
        raise ValueError(f"{share:g} of {ids.shape[2]} experts a token cannot be dropped; one is kept")
    order = torch.randperm(places[0] * places[1], generator=torch.Generator().manual_seed(seed))
    gone = torch.zeros(places[0] * places[1], dtype=torch.long).index_fill_(0, order[:count], 1).view(places).sum(-1)
    kept = torch.arange(ids.shape[2]) < (ids.shape[2] - gone).view(*ids.shape[:2], 1)
    return list(ids.where(kept.to(ids.device), -1))


def hit(ids: Sequence[torch.Tensor]) -> int:
    """Experts that are read, over all draws."""
    return sum(len(each[each >= 0].unique()) for each in ids)


class Layer:
    """Copies of one layer at one token count, each with inputs of its own."""

    def __init__(self, problem: Problem, clock: CudaClock, machine: Machine, seconds: float) -> None:
        self.clock, self.seconds, self.problem = clock, seconds, problem
        resident = problem.experts * sum(layout.num_bytes for layout in layouts_of(problem))
        read = resident * min(problem.tokens * problem.shape[1], problem.experts) // problem.experts
        copies = max(LEAST_COPIES, copies_needed(read, resident, machine.l2_bytes, clock.free_bytes()))
        self.draws = [problem.draw(seed, clock.device) for seed in range(copies)]
        self.banks = [
            [make_bank(problem, matrix, 0, copy, clock.device) for matrix in range(2)] for copy in range(copies)
        ]
        experts, _, hidden, _ = problem.shape
        generator = torch.Generator().manual_seed(1)
        drawn = (torch.randn(experts, hidden, generator=generator) / hidden**0.5 for _ in range(copies))
        self.routers = [each.to(clock.device, problem.torch_dtype) for each in drawn]
        self.routing = ROUTERS[problem.name]

    def time(self, ids: Sequence[torch.Tensor]) -> float:
        """Median microseconds of the experts with these ids."""
        return self._time(partial(self._experts, *each) for each in zip(self.draws, self.banks, ids, strict=True))

    def time_router(self, fused: bool) -> float:
        """The same of the router."""
        each = zip(self.draws, self.routers, strict=True)
        return self._time(partial(self._route, draw, weight, None, fused) for draw, weight in each)

    def time_block(self, rules: Sequence[Selector | None], fused: bool) -> float:
        """The same of the router and the experts, with a rule between them if there is one."""
        each = zip(self.draws, self.banks, self.routers, rules, strict=True)
        return self._time(partial(self._block, *those, fused) for those in each)

    def _time(self, calls: Iterable[Callable[[], torch.Tensor]]) -> float:
        with torch.no_grad():
            return median(self.clock.replay(self.clock.record(list(calls)), self.seconds))

    def _experts(self, draw: Draw, banks: Sequence[Any], ids: torch.Tensor, weights: torch.Tensor | None = None) -> Any:
        weights = draw.weights if weights is None else weights
        return packed_experts(draw.x, ids, weights, *banks, self.problem.shape[3])

    def _route(self, draw: Draw, weight: torch.Tensor, rule: Selector | None, fused: bool) -> Any:
        if not fused:
            _, weights, ids = route(draw.x, weight, self.routing)
            return (ids, weights) if rule is None else prune(rule, draw.x, ids, weights, False, skips=True)
        dtype, top_k = draw.x.dtype, self.routing.top_k
        selection = None if rule is None else rule.selection(self.clock.device, dtype, top_k, renormalises=False)
        _, weights, ids = route_tokens(draw.x, weight, self.routing, selection)
        return ids, weights

    def _block(
        self, draw: Draw, banks: Sequence[Any], weight: torch.Tensor, rule: Selector | None, fused: bool
    ) -> torch.Tensor:
        return self._experts(draw, banks, *self._route(draw, weight, rule, fused))

    def selectors(self) -> list[Selector]:
        """One for each copy, which keeps all and still computes."""
        experts, _, hidden, _ = self.problem.shape
        made = [Selector(hidden, experts).requires_grad_(False) for _ in self.draws]
        for seed, rule in enumerate(made):
            rule.initialise(seed)
            rule.offset.zero_()
            rule.dial.fill_(-1)
        return [rule.to(self.clock.device) for rule in made]


def figures(layer: Layer, share: float) -> Iterator[Figure]:
    name = f"{layer.problem.name} T={layer.problem.tokens}"
    whole, nobody = [draw.ids for draw in layer.draws], [None] * len(layer.draws)
    alone = layer.time(whole)
    fewer = dropped_ids(layer.draws, share, seed=0)
    after, saved = layer.time(fewer), 1 - hit(fewer) / hit(whole)
    baseline, note = f"{saved:.4f} of the bytes; at least 0.8 of that", f"{alone:.2f} us, dropped {after:.2f} us"
    yield Figure(f"{name} at {share:.0%} dropped", 1 - after / alone, "of the time saved", baseline, note)
    for kernel in (registry.CUDA, registry.REFERENCE):
        fused, rules = kernel == registry.CUDA, layer.selectors()
        label = "cuda" if fused else "torch operations"
        yield Figure(f"{name} router, {label}", layer.time_router(fused), "us")
        block = layer.time_block(nobody, fused)
        os.environ[registry.OVERRIDE] = kernel  # read when a selector meets its first input
        decided = layer.time_block(rules, fused)
        del os.environ[registry.OVERRIDE]
        yield Figure(f"{name} selectors, {kernel}", decided / block - 1, "of router and experts", "at most 0.03",
                     f"{block:.2f} us, with selectors {decided:.2f} us")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--tokens", type=lambda text: [int(each) for each in text.split(",")], default=[1, 16])
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each variant")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    clock = CudaClock(torch.device("cuda", torch.cuda.current_device()))
    machine, found = clock.machine(), []
    for name in ROUTERS:
        for tokens in given.tokens:
            layer = Layer(Problem("moe", LAYERS[name], tokens, name=name), clock, machine, given.seconds)
            for each in figures(layer, given.share):
                print(f"{each.metric:50} {each.value:8.4f} {each.unit}; {each.baseline}; {each.note}", flush=True)
                found.append(replace(each, note="; ".join(filter(None, (each.note, given.note)))))
            del layer
            clock.release()
    finish("pruned layer", found, device="cuda")


if __name__ == "__main__":
    main()
