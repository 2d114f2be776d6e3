# SPDX-License-Identifier: Apache-2.0
"""eval, generate and profile of a pruned folder: what they tell of experts, and the switch and the dial."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moepress
from command import Cli
from moepress.cli import experts
from moepress.cli.experts import position_bins, summarise_counts
from moepress.demo.run import EXCERPT, MODEL
from moepress.evaluate.load import load_model
from moepress.pruning.attach import Counts, counting
from moepress.pruning.baselines import Threshold
from moepress.pruning.sites import moe_sites
from moepress.pruning.stored import publish_pruned

MU = 0.4
PROMPT = ("-p", "It was", "-n", 6, "--device", "cpu")
PPL = ("--ppl", EXCERPT, "--window", 64, "--max-tokens", 512, "--device", "cpu")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with thresholds."""
    target = tmp_path_factory.mktemp("demo") / "pruned"
    model, _ = load_model(MODEL, torch.device("cpu"))
    publish_pruned(MODEL, target, {site.name: Threshold(MU) for site in moe_sites(model)})
    return target


def counts_of(folder: Path, text: str, new: int) -> Counts:
    model, tokenizer = load_model(folder, torch.device("cpu"))
    ids = tokenizer(text, return_tensors="pt")
    with counting(model, ids["input_ids"].shape[1] + new) as read:
        model.generate(**ids, max_new_tokens=new, do_sample=False)
        return read()


def test_generate_reports_what_ran(cli: Cli, pruned: Path) -> None:
    run = cli("generate", pruned, *PROMPT, "--experts-report", "--json")
    assert run.code == 0, run.err
    counts = counts_of(pruned, "It was", 6)
    found = run.json["experts"]
    assert found == json.loads(json.dumps(summarise_counts(counts)))
    assert found["per_token"] == pytest.approx(sum(found["layers"].values()) / 4) and 1 < found["per_token"] < 2
    assert found["dropped"] == pytest.approx(1 - found["per_token"] / 2)
    lines = run.out.splitlines()
    share = counts.tokens_by_kept[2, 1] / counts.tokens_by_kept[2].sum()
    row = next(line.split() for line in lines if line.startswith("model.layers.2.mlp.experts"))
    assert row[1:] == [f"{share:.1%}", f"{1 - share:.1%}", f"{counts.per_layer[2]:.3f}"]
    assert f"experts run per token: {found['per_token']:.3f} of 2 ({found['dropped']:.1%} dropped)" in lines


def test_generate_says_nothing_of_experts_unasked(cli: Cli, pruned: Path) -> None:
    run = cli("generate", pruned, *PROMPT, "--json")
    assert "experts" not in run.json and "experts" not in run.out


def test_the_switch_and_the_dial(cli: Cli, pruned: Path) -> None:
    whole = cli("eval", MODEL, *PPL, "--json").json
    off = cli("eval", pruned, *PPL, "--no-pruning", "--json").json
    assert off["ppl"] == pytest.approx(whole["ppl"]) and "experts" not in off and "experts" not in whole
    runs = [cli("eval", pruned, *PPL, "--dial", dial, "--json").json for dial in (-1, 0, 1)]
    assert [each["experts"]["per_token"] for each in (runs[0], runs[2])] == [2, 1]
    assert runs[0]["ppl"] == pytest.approx(whole["ppl"])
    assert whole["ppl"] < runs[1]["ppl"] < runs[2]["ppl"]
    assert runs[1] == cli("eval", pruned, *PPL, "--json").json


def test_eval_reports_experts_beside_perplexity(cli: Cli, pruned: Path) -> None:
    short, long = cli("eval", pruned, *PPL), cli("eval", pruned, *PPL, "--experts-report", "--json")
    line = next(line for line in short.out.splitlines() if line.startswith("experts run per token"))
    assert line in long.out and "model.layers.0" in long.out and "model.layers.0" not in short.out
    positions = long.json["experts"]["positions"]
    assert [position[:2] for position in positions] == [[first, first + 3] for first in range(0, 64, 4)]


@pytest.mark.parametrize(("words", "told"), [
    (("generate", MODEL, *PROMPT, "--experts-report"), "has no rules"),
    (("generate", MODEL, *PROMPT, "--dial", "1"), "has no rules"),
    (("eval", MODEL, *PPL, "--experts-report"), "has no rules"),
    (("eval", MODEL, "--task", "lambada=x.jsonl", "--experts-report"), "over the text of --ppl; give one"),
])  # fmt: skip
def test_what_is_told(cli: Cli, words: tuple[object, ...], told: str) -> None:
    run = cli(*words)
    assert (run.code, run.err.count("\n")) == (2, 1) and told in run.err, run


def test_profile_counts_what_routers_choose(cli: Cli, pruned: Path, tmp_path: Path) -> None:
    arguments = ("--text", EXCERPT, "--max-tokens", 256, "--device", "cpu")
    for folder, name in ((pruned, "pruned"), (MODEL, "whole")):
        assert cli("profile", folder, *arguments, "-o", tmp_path / name).code == 0
    assert (tmp_path / "pruned").read_text() == (tmp_path / "whole").read_text()


# ---------------------------------------------------------------------------------------------- plot


def test_a_plot_without_matplotlib_is_told_before_the_work(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(experts, "find_spec", lambda name: None)
    for words in (("generate", tmp_path / "none", *PROMPT), ("eval", tmp_path / "none", *PPL)):
        run = cli(*words, "--experts-plot", tmp_path / "plot.svg")
        assert run.code == 2 and "a plot needs matplotlib: pip install 'moepress[plot]'" in run.err


def test_a_plot_is_drawn(cli: Cli, pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = cli("generate", pruned, *PROMPT, "--experts-plot", tmp_path / "plot.svg")
    assert run.code == 0 and "experts run per token" in run.out, run
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    run = cli("generate", pruned, *PROMPT, "--experts-plot", tmp_path / "plot.odd")
    assert run.code == 2 and "cannot be written to" in run.err


# ---------------------------------------------------------------------------------------------- bins


@pytest.mark.parametrize(("seen", "width"), [(1, 1), (16, 1), (17, 2), (33, 4), (2048, 128)])
def test_positions_are_put_together(seen: int, width: int) -> None:
    kept = torch.arange(1, seen + 1)
    pad = torch.zeros(7, dtype=torch.int64)
    counts = SimpleNamespace(
        tokens_at=torch.cat([torch.ones_like(kept), pad])[None], kept_at=torch.cat([kept, pad])[None]
    )
    bins = position_bins(counts)  # type: ignore[arg-type]
    assert [first for first, _, _ in bins] == list(range(0, seen, width)) and len(bins) <= experts.ROWS
    assert bins[-1][1] == seen - 1 and all(last + 1 == after[0] for (_, last, _), after in pairwise(bins))
    for first, last, mean in bins:
        assert mean == pytest.approx((first + last) / 2 + 1)


def test_public_names() -> None:
    assert "set_pruning_dial" in moepress.__all__
