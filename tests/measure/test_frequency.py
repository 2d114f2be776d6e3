# SPDX-License-Identifier: Apache-2.0
"""Expert frequencies: counted as transformers routes, and read only from files that fit the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moepress.errors import PlanError
from moepress.measure.frequency import profile_frequencies, read_frequencies
from moepress.source import Source, open_source
from tiny import EXPERTS, LAYERS, VOCABULARY

Tiny = Callable[..., Path]
TEXT = "".join(chr(33 + 7 * i * i % 90) for i in range(50))


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


def counted_from_router_logits(model: Any, window: int, tokens: int) -> list[list[int]]:
    """Tokens per expert and layer, from the logits that transformers itself gives out; ties do not occur."""
    ids = torch.tensor(Letters()(TEXT)["input_ids"][:tokens])
    counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.long)
    for first in range(0, len(ids), window):
        chunk = ids[first : first + window].unsqueeze(0)
        with torch.no_grad():
            routers = model(chunk, output_router_logits=True, use_cache=False).router_logits
        for layer, logits in zip(range(LAYERS - len(routers), LAYERS), routers, strict=True):
            for token in logits.reshape(-1, EXPERTS).tolist():
                for expert in sorted(range(EXPERTS), key=lambda e: -token[e])[:2]:
                    counts[layer, expert] += 1
    return counts.tolist()


@pytest.mark.parametrize(("family", "block"), [("mixtral", "block_sparse_moe"), ("olmoe", "mlp"), ("qwen2_moe", "mlp")])
@pytest.mark.parametrize(("window", "max_tokens"), [(64, None), (16, None), (16, 40), (7, 7)])
def test_counts_are_those_of_the_router(
    family: str, block: str, window: int, max_tokens: int | None, tiny: Tiny
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    tokens = max_tokens or len(TEXT)
    body = profile_frequencies(model, Letters(), TEXT, window, max_tokens)
    expected = counted_from_router_logits(model, window, tokens)
    # qwen2_moe's first layer is dense here and has no router
    named = {f"model.layers.{i}.{block}.experts": row for i, row in enumerate(expected) if any(row)}
    assert body == {"moepress_frequencies": 1, "tokens": tokens, "banks": named}
    assert all(sum(counts) == 2 * tokens for counts in named.values())
    assert any(len(set(counts)) > 1 for counts in named.values())


def test_the_hooks_are_gone_afterwards(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32)
    profile_frequencies(model, Letters(), TEXT, 16)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_progress_counts_every_token(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32)
    seen: list[float] = []

    class Recorder:
        def __init__(self, label: str, total: float) -> None:
            assert (label, total) == ("profiling", 50)

        def __enter__(self) -> Callable[[float], None]:
            return seen.append

        def __exit__(self, *_: object) -> None:
            pass

    profile_frequencies(model, Letters(), TEXT, 16, progress=Recorder)
    assert seen == [16, 16, 16, 2]


@pytest.mark.parametrize(("text", "window"), [("", 16), (TEXT, 0)])
def test_nothing_to_count_is_told(text: str, window: int, tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32)
    with pytest.raises(PlanError, match=f"nothing to profile: {len(text)} tokens in windows of {window}"):
        profile_frequencies(model, Letters(), text, window)


@pytest.fixture
def source(tiny: Tiny) -> Source:
    with open_source(tiny("mixtral")) as src:
        yield src


BANKS = {f"model.layers.{i}.block_sparse_moe.experts": [i, 2, 3.5, 4] for i in range(LAYERS)}


def read(tmp_path: Path, source: Source, body: Any) -> dict[str, list[float]]:
    path = tmp_path / "freq.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return read_frequencies(path, source.graph)


@pytest.mark.parametrize(
    "body",
    [
        {"moepress_frequencies": 1, "tokens": 9, "banks": BANKS},
        {"banks": dict(reversed(BANKS.items()))},
        list(BANKS.values()),  # in layer order, as MiLo's code has it
        {"banks": list(BANKS.values())},
    ],
)
def test_both_forms_are_read(body: Any, tmp_path: Path, source: Source) -> None:
    assert read(tmp_path, source, body) == BANKS


def test_what_is_written_can_be_read(tiny: Tiny, tmp_path: Path, source: Source) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32)
    body = profile_frequencies(model, Letters(), TEXT, 16)
    assert read(tmp_path, source, body) == body["banks"]


ONE = next(iter(BANKS))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ([[1, 2, 3, 4]], "lists 1 layers, the source has 2 layers with experts"),
        ([], "lists 0 layers"),
        ("3", "does not describe the 2 expert layers of this source"),
        ({}, "does not describe the 2 expert layers"),
        (
            {"banks": {ONE: [1, 2, 3, 4]}},
            r"does not describe .* \(model\.layers\.0\.block_sparse_moe\.experts, \.\.\.\)",
        ),
        ({"banks": BANKS | {"model.layers.9.block_sparse_moe.experts": [1]}}, "does not describe"),
        ({"banks": BANKS | {ONE: [1, 2, 3, -1]}}, f"frequencies of {ONE} are not a list of numbers of at least 0"),
        ({"banks": BANKS | {ONE: [1, 2, 3, "4"]}}, "are not a list of numbers"),
        ({"banks": BANKS | {ONE: {"0": 1}}}, "are not a list of numbers"),
        ({"banks": BANKS | {ONE: [1, 2, 3, float("nan")]}}, "are not a list of numbers"),
        ({"banks": BANKS | {ONE: [1, 2, 3, float("inf")]}}, "are not a list of numbers"),
        ({"banks": BANKS | {ONE: [1, 2, 3, 10**400]}}, "are not a list of numbers"),
        ({"banks": BANKS | {ONE: [1, 2, 3]}}, f"has 3 frequencies for {ONE}, which has 4 experts"),
        ({"banks": BANKS | {ONE: [1, 2, 3, 4, 5]}}, f"has 5 frequencies for {ONE}, which has 4 experts"),
    ],
)
def test_files_that_do_not_fit_are_refused(body: Any, message: str, tmp_path: Path, source: Source) -> None:
    with pytest.raises(PlanError, match=message):
        read(tmp_path, source, body)


def test_a_missing_file_is_told(tmp_path: Path, source: Source) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json is not readable JSON"):
        read_frequencies(tmp_path / "nowhere.json", source.graph)
