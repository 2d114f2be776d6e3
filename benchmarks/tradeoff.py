# SPDX-License-Identifier: Apache-2.0
"""Perplexity against stored bits a weight: RTN, HQQ, MSE, GPTQ, MiLo, PMQ and the joint planner with and without data.

    python benchmarks/tradeoff.py SRC --ppl FILE [--ppl FILE ...] --stats DIR --menus FILE [--only joint,pmq]
                                  [--device cuda]
    python benchmarks/tradeoff.py --plot

Every point is a folder that was compressed, published, loaded and evaluated (disjoint windows of 2048 tokens, float32,
the first 16,384 tokens). Rows go to tradeoff.csv as they are measured, and a point that is there for this commit is
not measured again; `--plot` draws tradeoff.svg from the newest row of each point (needs matplotlib).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import HERE, append_rows, environment

from moepress import Plan, Settings, compress_checkpoint, plan_budget, plan_by_pmq
from moepress.evaluate.load import load_model
from moepress.evaluate.perplexity import perplexity, read_text
from moepress.planning import data_free_menus
from moepress.progress import console
from moepress.source import open_source

CSV, PLOT = HERE / "tradeoff.csv", HERE / "tradeoff.svg"
COLUMNS = ("date", "model", "curve", "point", "bpw", "text", "ppl", "loss", "compress_s", "device", "torch",
           "transformers", "moepress", "commit", "note")  # fmt: skip
TARGETS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
BYTE_REFERENCE = 3.917535
"""What MiLo with dense-64 and INT3 factors takes on a model of 576 hidden channels."""
UNIFORM = ((2, 128), (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128))
"""2.25, 2.5, 3, 3.25, 3.5, 4 and 4.25 bits; no uniform width takes 2.75."""
WINDOW, TOKENS = 2048, 16384


@dataclass(frozen=True)
class Point:
    """One configuration of a curve: settings, or a function that makes its plan."""

    curve: str
    name: str
    how: Settings | Callable[[], Plan]


def points(source: Path, stats: Path | None, menus: Path, device: str) -> Iterator[Point]:
    """All points, cheapest curves first; those that need statistics only where there are some."""
    for method in ("rtn", "hqq", "mse", *(("gptq",) if stats else ())):
        for bits, group in UNIFORM:
            yield Point(method, f"b{bits}g{group}", Settings(method=method, bits=bits, group_size=group))
    for bits, ranks, factor_bits in ((3, "dense-64", 3), (3, "dense-64", 4), (3, "dense-16", 3), (2, "dense-64", 3)):
        settings = Settings(bits=bits, ranks=ranks, factor_bits=factor_bits, iterations=20)
        yield Point("milo", f"b{bits} {ranks} f{factor_bits}", settings)

    def free(budget: str) -> Plan:
        return plan_budget(source, budget, menus=read_menus(source, menus, device))

    budgets = [f"{target}bpw" for target in (*TARGETS, BYTE_REFERENCE)]
    yield from (Point("joint (no data)", budget, partial(free, budget)) for budget in budgets)
    if stats:
        for method in ("hqq", "gptq"):
            settings = Settings(method=method, ranks="dense-64", factor_bits=4)
            yield Point(f"{method} + whitened", "b3 dense-64 f4", settings)
        for label in (2.5, 2.69, 2.75, 3.0, 3.25, 3.5):
            yield Point("pmq", f"label {label}", partial(plan_by_pmq, source, label, statistics=stats))
        for budget in budgets:
            yield Point("joint", budget, partial(plan_budget, source, budget, statistics=stats))


def read_menus(source: Path, path: Path, device: str) -> dict[str, dict[str, float]]:
    """The data-free predicted losses, measured once for all budgets."""
    if not path.exists():
        with open_source(source) as src:
            path.write_text(json.dumps(data_free_menus(src, device=device, progress=console)))
    return json.loads(path.read_text())


def measure(source: Path, point: Point, texts: dict[str, str], base: dict[str, float], stats: Path | None,
            windows: int | None, device: str) -> list[dict[str, object]]:  # fmt: skip
    """Compresses, loads and evaluates one point: a row for each text."""
    made = None if isinstance(point.how, Settings) else point.how()
    settings = point.how if isinstance(point.how, Settings) else None
    work = Path(tempfile.mkdtemp(prefix="moepress-tradeoff-"))
    try:
        begin = time.perf_counter()
        result = compress_checkpoint(
            source, work / "out", settings, plan=made, statistics=stats, windows=windows, device=device
        )
        seconds = time.perf_counter() - begin
        found = evaluate(work / "out", texts, device)
    finally:
        shutil.rmtree(work)
    bpw = result.summary["bpw"]
    return [
        {"curve": point.curve, "point": point.name, "bpw": f"{bpw:.4f}", "text": name, "ppl": f"{ppl:.4f}",
         "loss": f"{math.log(ppl / base[name]):.4f}", "compress_s": f"{seconds:.1f}"}
        for name, ppl in found.items()
    ]  # fmt: skip


def evaluate(folder: Path, texts: dict[str, str], device: str) -> dict[str, float]:
    import torch

    model, tokenizer = load_model(folder, torch.device(device), "float32")
    options = {"window": WINDOW, "stride": WINDOW, "max_tokens": TOKENS}
    return {name: perplexity(model, tokenizer, text, **options).ppl for name, text in texts.items()}


def rows() -> list[dict[str, str]]:
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def known_base(model: str, texts: Mapping[str, str]) -> dict[str, float] | None:
    """The original's perplexities, where they were measured before."""
    found = {row["text"]: float(row["ppl"]) for row in rows() if (row["model"], row["curve"]) == (model, "original")}
    return {name: found[name] for name in texts} if set(texts) <= set(found) else None


def plot() -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    newest: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows():
        newest[row["text"], row["curve"], row["point"]] = row
    names = list(dict.fromkeys(text for text, _, _ in newest))
    figure, axes = pyplot.subplots(1, len(names), figsize=(6.5 * len(names), 5), squeeze=False)
    for axis, text in zip(axes[0], names, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for (own, curve, _), row in newest.items():
            if own == text and curve != "original":
                curves.setdefault(curve, []).append((float(row["bpw"]), max(float(row["loss"]), 1e-3)))
        for curve, found in curves.items():
            found.sort()
            axis.plot(*zip(*found, strict=True), marker="o", markersize=4, label=curve)
        axis.set(xlabel="stored bits per compressed weight", ylabel="log-perplexity lost", title=text, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.tight_layout()
    figure.savefig(PLOT)
    print(f"wrote {PLOT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--ppl", type=Path, action="append", default=[])
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--windows", type=int, help="fit to this many windows of the statistics' text")
    parser.add_argument("--point", help="only points with this in their name")
    parser.add_argument("--menus", type=Path, default=Path("menus.json"), help="where data-free losses are kept")
    parser.add_argument("--only", help="curves, parted by commas, in the order to measure them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no point after this")
    parser.add_argument("--note", default="")
    parser.add_argument("--plot", action="store_true")
    given = parser.parse_args()
    if given.plot:
        return plot()
    begin = time.monotonic()
    where = {k: v for k, v in environment(given.device).items() if k != "peer"}
    texts = {path.stem: read_text(path) for path in given.ppl}
    head = {"model": given.source.name, "note": given.note, **where}
    base = known_base(given.source.name, texts) or evaluate(given.source, texts, given.device)
    if not rows() or base != known_base(given.source.name, texts):
        head_row = head | {"curve": "original", "point": "bf16", "bpw": 16, "loss": 0}
        append_rows(CSV, COLUMNS, [head_row | {"text": name, "ppl": f"{ppl:.4f}"} for name, ppl in base.items()])
    done = {(row["curve"], row["point"]) for row in rows() if row["commit"] == where["commit"] != "dirty"}
    chosen = list(points(given.source, given.stats, given.menus, given.device))
    if given.only:
        order = given.only.split(",")
        chosen = sorted((p for p in chosen if p.curve in order), key=lambda p: order.index(p.curve))
    for point in chosen:
        if (point.curve, point.name) in done or (given.point and given.point not in point.name):
            continue
        if time.monotonic() - begin > 60 * given.minutes:
            print(f"{given.minutes} minutes are over; run again for the rest", flush=True)
            return None
        new = measure(given.source, point, texts, base, given.stats, given.windows, given.device)
        append_rows(CSV, COLUMNS, [head | row for row in new])
        for row in new:
            print(
                *(f"{row[key]!s:>16}" for key in ("curve", "point", "bpw", "text", "ppl", "loss", "compress_s")),
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
