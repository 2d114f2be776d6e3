# SPDX-License-Identifier: Apache-2.0
"""Quality lost against the share of routed activations dropped: trained selectors, thresholds, ODP and chance.

    python benchmarks/pruning.py DIR --text FILE --ppl FILE [--ppl FILE ...] [--task lambada=FILE] [--trained DIR2 ...]
                                 [--only otp,threshold] [--targets 0.1,0.2,0.3] [--dials -0.4,0,0.5] [--device cuda]
    python benchmarks/pruning.py --plot MODEL [MODEL ...]

DIR is a checkpoint without rules, compressed or not; `--text` calibrates the thresholds, and each `--trained` is a
folder that `moepress train-pruning DIR` made, of which every dial is a point. Perplexity is that of disjoint windows
(`--window`) in float32, over the first 16,384 tokens; what is lost is log-perplexity, of a task accuracy. The share is
what was dropped on just that text. Rows go to pruning.csv as they are measured; `--plot` draws pruning.svg from the
newest row of each point of these models, which go by their folders' names (needs matplotlib).
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import HERE, append_rows, environment
from transformers import AutoConfig

from moepress.evaluate.load import load_model
from moepress.evaluate.perplexity import perplexity, read_text
from moepress.evaluate.tasks import load_task, run_task
from moepress.measure.corpus import read_windows
from moepress.progress import console
from moepress.pruning.attach import attach, counting, detach
from moepress.pruning.baselines import Odp, Threshold, calibrate, chance_rules
from moepress.pruning.dense import differentiable
from moepress.pruning.rule import Rule
from moepress.pruning.sites import moe_sites
from moepress.pruning.stored import PRUNING, read_rules

CSV, PLOT = HERE / "pruning.csv", HERE / "pruning.svg"
COLUMNS = ("date", "model", "curve", "point", "text", "metric", "dropped", "value", "loss", "device", "torch",
           "transformers", "moepress", "commit", "note")  # fmt: skip
TOKENS = 16384
CALIBRATION = (64, 512)
"""Windows and their length, 32,768 tokens; ODP's protection looks at whole windows."""
CURVES = ("otp", "threshold", "threshold (one mu)", "odp", "chance (weakest)", "chance")
AS_THEY_ARE = ", as they are"
"""Ends the name of a baseline whose kept weights do not take over the sum of all, though the family's would."""
Found = dict[str, tuple[float, float]]
"""Text or task -> its perplexity or accuracy, and the share that was dropped on it."""


class Bench:
    """A model without rules, and what it is measured on."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.model, self.tokenizer = load_model(given.source, torch.device(given.device), "float32", pruning=False)
        self.sites = moe_sites(self.model)
        self.texts: dict[str, Any] = {path.stem: read_text(path) for path in given.ppl}
        for each in given.task:
            name, _, file = each.partition("=")
            self.texts[name] = load_task(name, Path(file), limit=given.limit)
        windows, length = CALIBRATION
        self.windows = list(read_windows(given.text, self.tokenizer, windows=windows, length=length)[:, None])
        self.where = {key: value for key, value in environment(given.device).items() if key != "peer"}

    def points(self) -> Iterator[tuple[str, str, Sequence[Rule]]]:
        """Curve, name and rules of each point."""
        for curve in self.given.only.split(";") if self.given.only else CURVES:
            if curve == "otp":
                for folder in self.given.trained:
                    found = read_rules(folder, getattr(AutoConfig.from_pretrained(folder), PRUNING))
                    rules = [found[site.name] for site in self.sites]
                    for dial in self.given.dials:
                        for rule in rules:
                            rule.dial.fill_(dial)
                        yield curve, f"{folder.name} dial {dial:g}", rules
            else:
                for target in self.given.targets:
                    rules = self._baseline(curve.removesuffix(AS_THEY_ARE), target)
                    for rule in rules:
                        rule.renormalises = False if curve.endswith(AS_THEY_ARE) else None
                    yield curve, f"target {target:g}", rules

    def _baseline(self, curve: str, target: float) -> Sequence[Rule]:
        self.model.set_attn_implementation("eager" if curve == "odp" else "sdpa")
        if curve.startswith("chance"):
            return chance_rules(self.sites, target, strongest=curve != "chance")
        rules = [Odp() if curve == "odp" else Threshold() for _ in self.sites]
        calibrate(self.model, rules, self.windows, target, per_layer=curve != CURVES[2], progress=console)
        return rules

    def measure(self, rules: Sequence[Rule]) -> Found:
        found = {}
        if rules:
            attach(self.model, rules)
        for name, text in self.texts.items():
            with counting(self.model, self.given.window) if rules else nullcontext() as read:
                found[name] = self._quality(text), read().dropped if read else 0.0
        detach(self.model)
        return found

    def _quality(self, text: Any) -> float:
        if not isinstance(text, str):
            return run_task(self.model, self.tokenizer, text, batch_size=8, progress=console).metrics["acc"]
        return perplexity(
            self.model, self.tokenizer, text, window=self.given.window, stride=self.given.window, max_tokens=TOKENS
        ).ppl

    def run(self) -> None:
        self.base = self.measure([])
        self._record("unpruned", "", self.base)
        for curve, name, rules in self.points():
            self._record(curve, name, self.measure(rules))

    def _record(self, curve: str, point: str, found: Found) -> None:
        new = []
        for text, (value, dropped) in found.items():
            before, is_text = self.base[text][0], isinstance(self.texts[text], str)
            new.append({
                "model": self.given.source.name, "curve": curve, "point": point, "text": text,
                "metric": "perplexity" if is_text else "accuracy", "dropped": f"{dropped:.4f}",
                "value": f"{value:.4f}", "loss": f"{math.log(value / before) if is_text else before - value:.5f}",
                "note": self.given.note, **self.where,
            })  # fmt: skip
        append_rows(CSV, COLUMNS, new)
        for row in new:
            print(*(f"{row[key]!s:>18}" for key in ("curve", "point", "text", "dropped", "value", "loss")), flush=True)


def plot(models: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    newest: dict[tuple[str, ...], dict[str, str]] = {}
    with CSV.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] in models and row["metric"] == "perplexity":
                newest[row["model"], row["text"], row["curve"], row["point"]] = row
    # a text on which one rule was measured has nothing to compare
    curves = {(model, text): {each[2] for each in newest if each[:2] == (model, text)} for model, text, _, _ in newest}
    panels = [panel for panel, own in curves.items() if len(own - {"unpruned"}) > 1]
    figure = Figure(figsize=(6.5 * len(panels), 6), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in (*CURVES, *(curve + AS_THEY_ARE for curve in CURVES)):
            own = [row for (*where, name, _), row in newest.items() if (*where,) == panel and name == curve]
            found = sorted((float(row["dropped"]), max(float(row["loss"]), 1e-4)) for row in own)
            if found:
                axis.plot(*zip(*found, strict=True), marker="o", markersize=4, label=curve)
        axis.set(xlabel="share of routed activations dropped", ylabel="log-perplexity lost (1e-4: that or less)",
                 title=", ".join(panel), yscale="log")  # fmt: skip
        axis.grid(alpha=0.3, which="both")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.savefig(PLOT)
    print(f"wrote {PLOT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[float]:
        return [float(each) for each in text.split(",")]

    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, help="for calibration")
    parser.add_argument("--ppl", type=Path, action="append", default=[])
    parser.add_argument("--task", action="append", default=[], help="lambada=FILE")
    parser.add_argument("--limit", type=int, help="examples of a task")
    parser.add_argument("--window", type=int, default=2048, help="tokens of context; 512 for the demo model")
    parser.add_argument("--trained", type=Path, action="append", default=[])
    parser.add_argument(
        "--only",
        help=f"curves, parted by semicolons, of: {';'.join(CURVES)}; "
        f"behind a baseline '{AS_THEY_ARE}' leaves kept weights alone",
    )
    parser.add_argument("--targets", type=numbers, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--dials", type=numbers, default=[0.0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="")
    parser.add_argument("--plot", nargs="+", metavar="MODEL")
    given = parser.parse_args()
    if given.plot:
        return plot(given.plot)
    bench = Bench(given)
    # compressed layers are dequantised once, not for each call; the values are the same
    with torch.inference_mode(), differentiable(bench.model, keep=True):
        bench.run()
    return None


if __name__ == "__main__":
    main()
