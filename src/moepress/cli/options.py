# SPDX-License-Identifier: Apache-2.0
"""The options that say how a model shall be compressed, shared by `plan` and `compress`, and how they are settled.

Three ways to ask: a budget (the joint planner), the preset `pmq`, or settings (a method, or MiLo's presets).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moepress.errors import PlanError
from moepress.graph.view import ROUTED
from moepress.measure.frequency import read_frequencies
from moepress.plan.plan import Plan
from moepress.plan.settings import Settings, preset
from moepress.planning import plan_budget, plan_by_pmq
from moepress.progress import console
from moepress.source import Source, open_source

Budget = Annotated[str | None, typer.Option(help="How big the result may be: 2.5bpw (bits per compressed weight, "
                                                 "everything counted) or 18GB. Widths and ranks follow.")]  # fmt: skip
Stats = Annotated[Path | None, typer.Option(help="Statistics of `moepress calibrate`: evidence for the planner, and "
                                                 "the text that gptq is fitted to.")]  # fmt: skip
Preset = Annotated[str | None, typer.Option(help="milo-s1 (the default), milo-s2: the MiLo paper's settings; pmq: "
                                                 "MC#'s, with --bits 2.54 and --stats.")]  # fmt: skip
Method = Annotated[str | None, typer.Option(help="rtn, hqq, milo, mse, gptq (needs --stats) or gptq-mcmoe.")]
Bits = Annotated[float | None, typer.Option(help="1 to 6, or 8; with --preset pmq the average, such as 2.54.")]
GroupSize = Annotated[int | None, typer.Option(help="Inputs that share a scale and a zero: 32, 64 or 128.")]
DenseRank = Annotated[int | None, typer.Option(help="Compensator rank of attention, shared experts and dense MLPs.")]
SparseRank = Annotated[int | None, typer.Option(help="Compensator rank of every routed expert matrix.")]
RankPolicy = Annotated[
    str | None,
    typer.Option(help="A sum such as dense-512+kurtosis-16; kinds: uniform, dense, sparse, kurtosis, "
                      "milo-kurtosis, frequency."),
]  # fmt: skip
FactorBits = Annotated[int | None, typer.Option(help="Width of the compensators' factors: 3, 4, 8 or 16. Default: 3 "
                                                     "for milo, 4 where they are fitted to --stats.")]  # fmt: skip
Iterations = Annotated[int | None, typer.Option(help="Alternations of quantiser and compensator, at most.")]
Refit = Annotated[bool | None, typer.Option("--refit/--no-refit", help="Refit the factors to each other while they are "
                                            "quantised; --no-refit is MiLo's own way.")]  # fmt: skip
Keep = Annotated[list[str] | None, typer.Option(help="Leave these as they are: a name pattern, a role (attn.q) or a "
                                                     "group (attn, shared, mlp, expert). Repeatable.")]  # fmt: skip
Frequencies = Annotated[Path | None, typer.Option(help="Expert frequencies, as `moepress profile` writes them.")]
Windows = Annotated[int | None, typer.Option(help="Fit to this many windows of the calibration text, not all.")]
Gamma = Annotated[float | None, typer.Option(help="PMQ's exponent of the error: 1 as in its code (default), 2 as in "
                                                  "its paper.")]  # fmt: skip
Scope = Annotated[str | None, typer.Option(help="PMQ: layer (default), one average for every layer, or global.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line said; None or empty where it said nothing."""

    budget: str | None = None
    stats: Path | None = None
    preset: str | None = None
    method: str | None = None
    bits: float | None = None
    group_size: int | None = None
    dense_rank: int | None = None
    sparse_rank: int | None = None
    rank_policy: str | None = None
    factor_bits: int | None = None
    iterations: int | None = None
    refit: bool | None = None
    keep: list[str] | None = None
    frequencies: Path | None = None
    gamma: float | None = None
    scope: str | None = None

    def said(self) -> list[str]:
        """The options that were given, as they are typed."""
        given = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, []))
        return ["--" + name.replace("_", "-") for name in given]

    def only(self, allowed: set[str], because: str) -> None:
        """Raises PlanError, for this reason, where an option was given that is not allowed."""
        idle = sorted(set(self.said()) - allowed)
        if idle:
            raise PlanError(f"{because}; leave out {', '.join(idle)}")


def settle(source: Path, asked: Asked, device: torch.device) -> tuple[Plan | None, Settings | None, dict[str, Any]]:
    """A finished plan (budget, pmq), or settings and the frequencies that go with them."""
    keep = tuple(asked.keep or ())
    if asked.budget is not None:
        allowed = {"--budget", "--stats", "--method", "--keep"}
        asked.only(allowed, f"--budget {asked.budget} chooses widths and ranks itself")
        options: dict[str, Any] = {"statistics": asked.stats, "method": asked.method, "keep": keep}
        return plan_budget(source, asked.budget, device=device, progress=console, **options), None, {}
    if asked.preset == "pmq":
        return _pmq(source, asked, keep), None, {}
    asked.only({f"--{name}" for name in _NOT_PMQ}, "these belong to --preset pmq")
    with open_source(source) as src:
        counts = read_frequencies(asked.frequencies, src.graph) if asked.frequencies else {}
        return None, resolve_settings(src, asked, keep), counts


_NOT_PMQ = {f.name.replace("_", "-") for f in dataclasses.fields(Asked)} - {"gamma", "scope"}


def _pmq(source: Path, asked: Asked, keep: tuple[str, ...]) -> Plan:
    allowed = {"--preset", "--bits", "--stats", "--method", "--group-size", "--keep", "--gamma", "--scope"}
    asked.only(allowed, "--preset pmq chooses widths itself")
    if asked.bits is None or asked.stats is None:
        raise PlanError("--preset pmq needs an average and statistics: --bits 2.54 --stats FOLDER (moepress calibrate)")
    given = {"method": asked.method, "group_size": asked.group_size, "gamma": asked.gamma, "scope": asked.scope}
    options = {key: value for key, value in given.items() if value is not None}
    return plan_by_pmq(source, asked.bits, statistics=asked.stats, keep=keep, **options)


def ranks_from(dense: int | None, sparse: int | None, policy: str | None) -> str | None:
    """The rank options as one policy, or None where none was given."""
    if dense is None and sparse is None:
        return policy
    if policy is not None:
        raise PlanError("--rank-policy and --dense-rank/--sparse-rank say the same thing twice; give one of them")
    return f"dense-{dense or 0}+sparse-{sparse or 0}"


def resolve_settings(src: Source, asked: Asked, keep: tuple[str, ...]) -> Settings:
    """Options over a preset over defaults. Without a preset and a method the preset is milo-s1."""
    names = ("method", "group_size", "factor_bits", "iterations", "refit")
    given = {name: value for name in names if (value := getattr(asked, name)) is not None} | {"keep": keep}
    if asked.bits is not None:
        if asked.bits != int(asked.bits):
            raise PlanError(f"--bits {asked.bits} is not a whole number; averages go with --preset pmq or --budget")
        given["bits"] = int(asked.bits)
    ranks = ranks_from(asked.dense_rank, asked.sparse_rank, asked.rank_policy)
    if ranks is not None:
        given["ranks"] = ranks
    if asked.preset is None and given.get("method") not in (None, "milo"):
        return Settings(**given)
    experts = [ref.expert or 0 for ref in src.graph.weights if ref.group == ROUTED]
    hidden = src.reader.config.get("hidden_size")
    if not isinstance(hidden, int) or not experts:
        raise PlanError("presets need hidden_size in config.json and routed experts; give --method and ranks instead")
    base = preset(asked.preset or "milo-s1", src.graph.family.model_type, hidden, max(experts) + 1)
    return dataclasses.replace(base, **given)
