# SPDX-License-Identifier: Apache-2.0
"""Both protocols against a plain double-precision computation, and every refusal."""

from __future__ import annotations

import copy
import logging
import math
import random
import string
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import EvaluationError
from moepress.evaluate.perplexity import perplexity, read_text

# An evaluation-data folder beside the repository, absent in a user's clone.
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

LETTERS = string.ascii_letters + string.digits + " \n"


def some_text(length: int) -> str:
    return "".join(random.Random(length).choices(LETTERS, k=length))


def token_losses(model, ids: list[int]) -> list[float]:
    """-log p of tokens 1, 2, ... of one window, in double precision."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return [-logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(1, len(ids))]


@pytest.mark.parametrize(("length", "windows", "dropped"), [(48, 3, 0), (50, 3, 2), (63, 3, 15), (16, 1, 0)])
def test_disjoint_is_the_mean_over_the_tokens_of_full_windows(llama, tokenizer, length, windows, dropped):
    text = some_text(length)
    ids = tokenizer.encode(text)
    losses = [x for begin in range(0, 16 * windows, 16) for x in token_losses(llama, ids[begin : begin + 16])]

    result = perplexity(llama, tokenizer, text, window=16, stride=16)

    assert result.ppl == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.tokens, result.windows, result.dropped) == (15 * windows, windows, dropped)
    assert result.protocol == "disjoint windows of 16, first token of each not scored, mean over tokens"


def test_a_short_text_is_one_shorter_window(llama, tokenizer):
    text = some_text(11)
    losses = token_losses(llama, tokenizer.encode(text))

    result = perplexity(llama, tokenizer, text, window=16, stride=16)

    assert result.ppl == pytest.approx(math.exp(sum(losses) / 10), rel=1e-5)
    assert (result.tokens, result.windows, result.dropped) == (10, 1, 0)
    assert result.protocol.startswith("one window of 11 (text shorter than 16)")


@pytest.mark.parametrize("length", [50, 51, 46, 16, 9])
def test_sliding_averages_window_means_and_scores_each_token_once(llama, tokenizer, length):
    window, stride = 16, 5
    text = some_text(length)
    ids = tokenizer.encode(text)
    means, scored = [], 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        share = token_losses(llama, ids[begin:end])[scored - begin - 1 :]
        means.append(sum(share) / len(share))
        scored = end
        if end == length:
            break

    result = perplexity(llama, tokenizer, text, window=window, stride=stride)

    assert result.ppl == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)
    assert (result.tokens, result.windows, result.dropped) == (length - 1, len(means), 0)
    assert result.protocol == "sliding windows of 16 with stride 5, mean of per-window losses (MiLo)"


def test_the_protocols_differ(llama, tokenizer):
    text = some_text(50)
    disjoint = perplexity(llama, tokenizer, text, window=16, stride=16)
    sliding = perplexity(llama, tokenizer, text, window=16, stride=5)
    assert abs(disjoint.ppl / sliding.ppl - 1) > 1e-3


@given(length=st.integers(2, 90), window=st.integers(2, 40), data=st.data())
def test_uniform_logits_score_the_vocabulary_size(tokenizer, length, window, data, bigram):
    stride = data.draw(st.integers(1, window))
    model = bigram()
    result = perplexity(model, tokenizer, "x" * length, window=window, stride=stride)
    assert result.ppl == pytest.approx(len(bigram.characters), rel=1e-5)
    assert result.windows == len(model.seen)
    if stride < window:
        assert (result.tokens, result.dropped) == (length - 1, 0)
    else:
        assert result.tokens + result.windows + result.dropped == length


def test_losses_are_float32_whatever_the_logits(tokenizer, bigram):
    table = torch.randn(bigram.table().shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    text = some_text(700)  # more rows than one float32 chunk holds
    ids = torch.tensor(tokenizer.encode(text))
    losses = -table.double().log_softmax(-1)[ids[:-1], ids[1:]]
    result = perplexity(bigram(table), tokenizer, text)
    assert result.ppl == pytest.approx(losses.mean().exp().item(), rel=1e-6)  # bfloat16 losses are off by 1e-3


def test_max_tokens_cuts_the_text_and_says_so(llama, tokenizer):
    text = some_text(60)
    cut = perplexity(llama, tokenizer, text, window=16, stride=16, max_tokens=33)
    assert cut.ppl == perplexity(llama, tokenizer, text[:33], window=16, stride=16).ppl
    assert (cut.windows, cut.dropped) == (2, 1)
    assert cut.protocol.endswith("; first 33 tokens of the text")
    assert "first 60" not in perplexity(llama, tokenizer, text, window=16, max_tokens=60, stride=16).protocol


def test_long_texts_are_tokenised_whole_and_without_a_warning(uniform, tokenizer, caplog, monkeypatch):
    fresh = copy.deepcopy(tokenizer)  # a tokenizer warns once
    fresh.deprecation_warnings.clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = some_text(100)  # the tokenizer's own limit is 8

    assert perplexity(uniform, fresh, text).tokens == 99
    assert not caplog.records
    fresh(text)
    assert caplog.records, "a plain call warns; without this line the test could not fail"


def test_the_model_is_left_as_it_was(uniform, tokenizer):
    uniform.train()
    perplexity(uniform, tokenizer, "abc")
    assert uniform.training


def test_progress_counts_windows(uniform, tokenizer):
    seen = []

    @contextmanager
    def record(label, total):
        seen.append((label, total))
        yield seen.append

    perplexity(uniform, tokenizer, "x" * 12, window=4, stride=4, progress=record)
    assert seen == [("perplexity", 3), 1, 1, 1]


def test_overflow_is_infinite(tokenizer, bigram):
    table = bigram.table()
    table[:, 0] = 1e4
    assert perplexity(bigram(table), tokenizer, "xxx").ppl == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_their_window(tokenizer, bad, bigram):
    table = bigram.table()
    table[bigram.index["z"]] = bad
    with pytest.raises(EvaluationError, match=r"NaN or infinite in window 2 of 3 \(tokens 4 to 7\)"):
        perplexity(bigram(table), tokenizer, "aaaaazaaaaaa", window=4, stride=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 8, "stride": 9}, "stride is 9, window is 8; use a stride from 1 to 8"),
        ({"window": 8, "stride": 0}, "stride is 0, window is 8"),
        ({"window": 1, "stride": 1}, "window is 1; at least 2"),
        ({"max_tokens": 1}, "max_tokens is 1; at least 2"),
        ({"max_tokens": -5}, "max_tokens is -5"),
    ],
)
def test_refused_settings(uniform, tokenizer, settings, message):
    with pytest.raises(EvaluationError, match=message):
        perplexity(uniform, tokenizer, "some text", **settings)


def test_refused_text_and_model(tokenizer, bigram):
    with pytest.raises(EvaluationError, match=r"the text has 1 token\(s\)"):
        perplexity(bigram(), tokenizer, "a")
    with pytest.raises(EvaluationError, match="window is 16, the model has 8 positions"):
        perplexity(bigram(positions=8), tokenizer, "a" * 9, window=16, stride=16)
    with pytest.raises(EvaluationError, match="token id 95, the model's vocabulary has 90 entries"):
        perplexity(bigram(torch.zeros(90, 90)), tokenizer, "a~")


def test_a_window_beyond_the_positions_is_fine_for_a_shorter_text(tokenizer, bigram):
    model = bigram(positions=8)
    assert perplexity(model, tokenizer, "a" * 8, window=16, stride=16).tokens == 7


def test_read_text_joins_rows_as_they_are(write_rows, tmp_path):
    path = write_rows({"text": ""}, {"text": " = A = \n", "more": 1}, "", {"text": "b\u2028c"})
    assert read_text(path) == "\n\n = A = \n\n\nb\u2028c"
    plain = tmp_path / "plain.txt"
    plain.write_bytes("é\r\n{\n".encode())
    assert read_text(str(plain)) == "é\r\n{\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"text": "a"}\n{"text": \n',
            r"x\.jsonl, line 2: not JSON \(Expecting value, column 10\)",
        ),
        (
            b'{"text": "a"}\n\n{"title": "a"}',
            r'line 3: the field "text" is missing; the row has: title',
        ),
        (b'{"text": 3}', 'line 1: the field "text" must be a string, not int'),
        (b'["a"]', "line 1: a row must be a JSON object, not a list"),
        (b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8 text"),
        (b'{"text": ""}\n{"text": " "}', r"x\.jsonl holds no text"),
        (b"", r"x\.jsonl holds no text"),
    ],
)
def test_refused_rows(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_text(path)


def test_refused_files(tmp_path):
    path = tmp_path / "x.txt"
    with pytest.raises(EvaluationError, match=r"x\.txt cannot be read: No such file"):
        read_text(path)
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(EvaluationError, match=r"x\.txt, line 2: not UTF-8 text"):
        read_text(path)
    path.write_bytes(b" \n")
    with pytest.raises(EvaluationError, match=r"x\.txt holds no text"):
        read_text(path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data is not beside the repository")
def test_wikitext_is_read_whole():
    text = read_text(DATA / "wikitext2_raw_test.jsonl")
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    assert text.count(" = Robert Boulter = ") == 1
    assert len(text) > 1_290_000
