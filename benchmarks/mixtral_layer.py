# SPDX-License-Identifier: Apache-2.0
"""How long one layer of Mixtral-8x7B takes to compress with the milo-s1 settings, and where the time goes.

Random Gaussian weights (std 0.02) of the real shapes, 3 bits, groups of 64, INT3 factors, 20 alternations.
Attention gets rank 512. For the experts there are two cases: the published kurtosis rule, which gives these weights
rank 0, and rank 16 everywhere, its nominal average, which is the harder and the more honest one. As in the pipeline
each matrix comes from pageable CPU memory by `.to(device)` and its stored parts go back.

The spans are taken with CUDA events around the calls (with the clock on a CPU) and add up to the time of the layer
but for the Python between them. `of which` lines lie inside other spans. The floor is the time for the memory
traffic of a perfectly fused solver at the measured copy bandwidth: each of the 20 HQQ iterations reads its float32
matrix once, each projection its residual six times.

    python benchmarks/mixtral_layer.py --device cuda
    python benchmarks/mixtral_layer.py --device cpu --small
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from common import Figure, finish, print_table, seconds

from moepress.format.spec import WeightSpec
from moepress.measure.weights import excess_kurtosis
from moepress.plan.ranks import milo_kurtosis_rank
from moepress.quantize import hqq as hqq_module
from moepress.quantize import job, lowrank, milo
from moepress.quantize.job import compress_weight

LAYERS, EXPERTS, ALTERNATIONS, AVERAGE_RANK = 32, 8, 20, 16
TARGET_MINUTES = 10
SMALL = 16
"""Every side and rank is divided by this under --small."""
CALLS = (
    (job, "check_finite", "NaN check"),
    (job, "hqq", "HQQ solves"),
    (milo, "hqq", "HQQ solves"),
    (milo, "affine", "dequantise"),
    (milo, "project", "projection"),
    (milo, "_left_over", "residual norm (sync)"),
    (milo, "balance", "balance/SVD"),
    (job, "quantize_factors", "factor quantisation"),
    (job, "pack_codes", "packing"),
    (job, "relative_error", "relative error"),
    (torch.linalg, "qr", "of which QR"),
    (torch, "randn", "of which random start (CPU)"),
)
"""Where the time goes: module, function, the span's label."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of the layer."""

    name: str
    shape: tuple[int, int]


class Spans:
    """Sums of the time between entering and leaving labelled stretches, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.taken: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def span(self, label: str) -> Iterator[None]:
        start = self._now()
        yield
        self.taken[label].append((start, self._now()))

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self.span(label):
                return function(*arguments, **named)

        return call

    def totals(self) -> dict[str, float]:
        """Seconds by label."""
        if self.cuda:
            torch.cuda.synchronize()
            return {k: sum(a.elapsed_time(b) for a, b in v) / 1e3 for k, v in self.taken.items()}
        return {k: sum(b - a for a, b in v) for k, v in self.taken.items()}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help=f"all sides and ranks divided by {SMALL}, for a test")
    options = parser.parse_args()
    device, scale = torch.device(options.device), SMALL if options.small else 1
    attention, experts = matrices(scale)
    dense, average = 512 // scale, max(1, AVERAGE_RANK // scale)
    warm_up(attention[0], experts[0], dense, average, device)
    parts = {
        "attention": lambda: measure(attention, lambda *_: dense, device),
        "experts, kurtosis rule": lambda: measure(experts, published_rank, device),
        "experts, rank 16": lambda: measure(experts, lambda *_: average, device),
    }
    took, figures = {}, []
    for name, run in parts.items():
        try:
            took[name], spans, floor = run()
        except Exception:  # a case that fails must not cost the others' results
            traceback.print_exc()
            continue
        figures += report(name, took[name], spans, floor)
    for name in ("experts, kurtosis rule", "experts, rank 16"):
        if "attention" in took and name in took:
            figures += model_time(name, took["attention"] + took[name])
    note = "small, no measure of speed" if options.small else ""
    finish("mixtral_layer", [Figure(f.metric, f.value, f.unit, f.baseline, f.note or note) for f in figures],
           device=options.device)  # fmt: skip
    return int(len(took) < len(parts))


def matrices(scale: int) -> tuple[list[Matrix], list[Matrix]]:
    hidden, inner, key_value = 4096 // scale, 14336 // scale, 1024 // scale
    attention = [Matrix(x, (n, hidden)) for x, n in zip("qkvo", (hidden, key_value, key_value, hidden), strict=True)]
    sides = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    return attention, [Matrix(f"experts.{e}.{w}", shape) for e in range(EXPERTS) for w, shape in sides.items()]


def published_rank(host: torch.Tensor, device: torch.device) -> int:
    """Brings the weight to the device, as the planner does before anything is compressed."""
    return milo_kurtosis_rank(excess_kurtosis(host.to(device)), AVERAGE_RANK)


def gaussian(matrix: Matrix, device: torch.device) -> torch.Tensor:
    """A weight in pageable CPU memory, drawn on the device because that is faster."""
    generator = torch.Generator(device).manual_seed(lowrank.seeded(matrix.name).initial_seed() % 2**31)
    drawn = torch.empty(matrix.shape, dtype=torch.bfloat16, device=device)
    return drawn.normal_(0, 0.02, generator=generator).cpu()


def warm_up(first: Matrix, second: Matrix, dense: int, average: int, device: torch.device) -> None:
    for matrix, rank in ((first, dense), (second, average)):
        compress_weight("warm up", gaussian(matrix, device).to(device), spec_of(rank), "milo", 1)


def spec_of(rank: int) -> WeightSpec:
    return WeightSpec(bits=3, group_size=64, rank=rank, factor_bits=3 if rank else 0)


def measure(
    chosen: list[Matrix], rank_of: Callable[[torch.Tensor, torch.device], int], device: torch.device
) -> tuple[float, dict[str, float], float]:
    """Seconds of all matrices together, seconds by span, and the floor of the memory traffic in bytes."""
    spans, total, floor = Spans(device), 0.0, 0.0
    with ExitStack() as stack:
        for module, name, label in CALLS:
            stack.enter_context(patch.object(module, name, spans.timed(label, getattr(module, name))))
        for matrix in chosen:
            host = gaussian(matrix, device)
            start = time.perf_counter()
            with spans.span("kurtosis, with its copy"):
                rank = rank_of(host, device)
            with spans.span("copies"):
                weight = host.to(device)
            done = compress_weight(matrix.name, weight, spec_of(rank), "milo", ALTERNATIONS)
            with spans.span("copies"):
                for part in done.parts.values():
                    part.cpu()
            total += time.perf_counter() - start
            floor += traffic(weight.numel(), done.alternations, rank)
            print(
                f"  {matrix.name}: rank {rank}, {done.alternations} alternations, error {done.error:.4f}",
                flush=True,
            )
    return total, spans.totals(), floor / bandwidth(device)


def traffic(numel: int, alternations: int, rank: int) -> float:
    """Bytes that a fused solver and the projections must read."""
    passes = hqq_module.ITERATIONS + (2 * lowrank.POWER_ITERATIONS + 2 if rank else 0)
    return 4.0 * numel * passes * (alternations + 1)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.empty(1 << (28 if device.type == "cuda" else 24), dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()

    copy()
    return 2 * source.nbytes / min(seconds(copy) for _ in range(5))


def report(name: str, took: float, spans: dict[str, float], floor: float) -> list[Figure]:
    inside = sum(value for label, value in spans.items() if not label.startswith("of which"))
    rows = [*sorted(spans.items(), key=lambda item: -item[1]), ("between the spans", took - inside)]
    print(f"\n{name}: {took:.3f} s a layer; the memory traffic of a fused solver takes {floor:.3f} s")
    print_table(("span", "s", "share"), [(label, f"{s:.3f}", f"{s / took:.1%}") for label, s in rows])
    print()
    figures = [Figure(f"{name}: {label}", value, "s/layer") for label, value in rows]
    return [Figure(name, took, "s/layer", f"memory traffic {floor:.3g} s"), *figures]


def model_time(name: str, layer: float) -> list[Figure]:
    minutes = layer * LAYERS / 60
    print(f"attention + {name}: {layer:.2f} s a layer, {minutes:.1f} min a model (target {TARGET_MINUTES})")
    return [
        Figure(f"layer with {name}", layer, "s"),
        Figure(f"model with {name}", minutes, "min", f"at most {TARGET_MINUTES}"),
    ]


if __name__ == "__main__":
    sys.exit(main())
