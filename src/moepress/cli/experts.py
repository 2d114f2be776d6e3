# SPDX-License-Identifier: Apache-2.0
"""Which layers and positions of a pruned model ran how many experts: tables, a plot, and the same as a dictionary."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moepress.cli.app import table
from moepress.errors import MoepressError
from moepress.pruning.attach import Counts

ROWS = 16
"""Rows of the positions' table at most; positions are put together in powers of two."""


def tell_experts(counts: Counts | None, tables: bool, plot: Path | None) -> dict[str, Any]:
    """Prints and draws what is wanted of `counts`; returns what they add to the JSON line, nothing without counts."""
    if counts is None:
        return {}
    if tables:
        show_experts(counts)
    print(experts_line(counts))
    if plot:
        plot_experts(counts, plot)
    return {"experts": summarise_counts(counts)}


def summarise_counts(counts: Counts) -> dict[str, Any]:
    """`top_k`, `per_token`, `dropped`, `layers` (name -> experts per token), `positions` ([first, last, the same])."""
    return {
        "top_k": counts.top_k,
        "per_token": counts.per_token,
        "dropped": counts.dropped,
        "layers": dict(zip(counts.names, counts.per_layer.tolist(), strict=True)),
        "positions": position_bins(counts),
    }


def position_bins(counts: Counts) -> list[tuple[int, int, float]]:
    """First and last position and experts run per token and layer, of at most `ROWS` bins of equal width."""
    tokens, kept = counts.tokens_at.sum(0), counts.kept_at.sum(0)
    seen = int(tokens.nonzero().max()) + 1 if tokens.any() else 0
    width = 1
    while seen > width * ROWS:
        width *= 2
    means = [
        (first, min(first + width, seen) - 1, int(kept[first : first + width].sum()), int(each.sum()))
        for first, each in zip(range(0, seen, width), tokens[:seen].split(width), strict=True)
    ]
    return [(first, last, ran / count) for first, last, ran, count in means if count]


def show_experts(counts: Counts) -> None:
    """Both tables."""
    shares = counts.tokens_by_kept.double() / counts.tokens_by_kept.sum(1, keepdim=True)
    start = 1 if not counts.tokens_by_kept[:, 0].any() else 0  # no rule drops all; other functions may
    rows = [
        (name, *(f"{share:.1%}" for share in own[start:].tolist()), f"{mean:.3f}")
        for name, own, mean in zip(counts.names, shares, counts.per_layer.tolist(), strict=True)
    ]
    heads = ("experts of", *(f"ran {number}" for number in range(start, counts.top_k + 1)), "per token")
    table("experts that tokens ran", heads, rows)
    ranges = [(f"{first}-{last}", f"{mean:.3f}") for first, last, mean in position_bins(counts)]
    table("by position", ("positions", "per token"), ranges, text=())


def experts_line(counts: Counts) -> str:
    """The whole in one line."""
    return f"experts run per token: {counts.per_token:.3f} of {counts.top_k} ({counts.dropped:.1%} dropped)"


def check_plot(path: Path | None) -> None:
    """Raises MoepressError, before the work, where `plot_experts` could not draw."""
    if path is not None and find_spec("matplotlib") is None:
        raise MoepressError("a plot needs matplotlib: pip install 'moepress[plot]'")


def plot_experts(counts: Counts, path: Path) -> None:
    """Draws both. Raises MoepressError where the file cannot be written, or not in the format that its name says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1)
    _draw_layers(above, counts)
    bins = position_bins(counts)
    below.stairs([mean for _, _, mean in bins], [*(first for first, _, _ in bins), bins[-1][1] + 1], baseline=None)
    below.set(xlabel="position", ylabel="experts run per token", ylim=(0, counts.top_k * 1.05))
    for axes in (above, below):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(experts_line(counts))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise MoepressError(f"the plot cannot be written to {path}: {error}") from error


def _draw_layers(axes: Any, counts: Counts) -> None:
    """Bars of tokens by how many experts they ran, the mean as a line."""
    shares = (counts.tokens_by_kept.double() / counts.tokens_by_kept.sum(1, keepdim=True)).T
    layers, bottom = range(len(counts.names)), torch.zeros(len(counts.names), dtype=torch.float64)
    for number, share in enumerate(shares):
        if share.any():
            axes.bar(layers, share.tolist(), bottom=bottom.tolist(), label=f"ran {number}", alpha=0.6)
        bottom += share
    axes.set(xlabel="layer of experts", ylabel="share of tokens", ylim=(0, 1))
    mean = axes.twinx()
    mean.plot(layers, counts.per_layer.tolist(), "k.-")
    mean.set(ylabel="experts run per token (line)", ylim=(0, counts.top_k))
    axes.legend(loc="lower right")
