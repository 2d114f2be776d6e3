# SPDX-License-Identifier: Apache-2.0
"""Expert frequencies: how many tokens each routed expert of each layer gets on a text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moepress.errors import PlanError
from moepress.graph.families import family_of
from moepress.graph.view import ModelGraph
from moepress.progress import Progress, silent

FREQUENCIES_VERSION = 1


def profile_frequencies(
    model: Any,
    tokenizer: Any,
    text: str,
    window: int = 2048,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Runs the model over the text in disjoint windows; bank name (the files' spelling) -> tokens per expert."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:max_tokens])
    if window < 1 or not len(ids):
        raise PlanError(f"nothing to profile: {len(ids)} tokens in windows of {window}")
    with _counting(model) as counts, torch.inference_mode(), progress("profiling", len(ids)) as advance:
        for chunk in ids.split(window):
            model(chunk.unsqueeze(0).to(model.device), use_cache=False)
            advance(len(chunk))
    banks = {name: each.tolist() for name, each in counts.items()}
    return {"moepress_frequencies": FREQUENCIES_VERSION, "tokens": len(ids), "banks": banks}


def read_frequencies(path: Path, graph: ModelGraph) -> dict[str, list[float]]:
    """Bank name -> counts, from our file or from a bare list of lists in layer order, as MiLo's code has it."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not readable JSON: {error}") from error
    experts: dict[str, int] = {}
    for ref in graph.weights:
        if ref.bank is not None and ref.expert is not None:
            experts[ref.bank] = max(experts.get(ref.bank, 0), ref.expert + 1)
    names = list(experts)
    banks = body.get("banks") if isinstance(body, dict) else body
    if isinstance(banks, list):
        if len(banks) != len(names):
            raise PlanError(f"{path} lists {len(banks)} layers, the source has {len(names)} layers with experts")
        banks = dict(zip(names, banks, strict=True))
    if not isinstance(banks, dict) or set(banks) != set(names):
        raise PlanError(
            f"{path} does not describe the {len(names)} expert layers of this source ({', '.join(names[:1])}, ...)"
        )
    for name, counts in banks.items():
        # the upper bound keeps out Infinity, which Python reads as JSON, and sums that overflow
        if not isinstance(counts, list) or not all(isinstance(c, int | float) and 0 <= c < 2**63 for c in counts):
            raise PlanError(f"{path}: the frequencies of {name} are not a list of numbers of at least 0")
        if len(counts) != experts[name]:
            raise PlanError(f"{path} has {len(counts)} frequencies for {name}, which has {experts[name]} experts")
    return banks


@contextmanager
def _counting(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    family = family_of(model.config.model_type)
    counts: dict[str, torch.Tensor] = {}
    handles = []
    for layer in range(model.config.num_hidden_layers):
        stored = family.bank.format(layer=layer)
        try:
            experts = model.get_submodule(family.module_name(stored))
        except AttributeError:
            continue  # a dense layer
        counts[stored] = torch.zeros(experts.num_experts, dtype=torch.long)

        def count(module: Any, args: tuple[Any, ...], name: str = stored) -> None:
            counts[name] += torch.bincount(args[1].flatten().cpu(), minlength=len(counts[name]))

        handles.append(experts.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
