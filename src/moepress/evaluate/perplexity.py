# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a causal language model on a text, under the two protocols of the field.

    ppl = exp(mean of -log p(token | the tokens before it in its window))

The text is tokenised once, as a whole, and cut to `max_tokens`. What differs is how windows are
laid and averaged:

- disjoint (`stride == window`), as GPTQ (Frantar et al. 2022) and MC-MoE evaluate: floor(n /
  window) full windows, the first token of each is not scored because nothing precedes it, and the
  mean runs over all scored tokens. A text shorter than one window is one shorter window; otherwise
  the incomplete tail is dropped and counted.
- sliding (`stride < window`), as the MiLo paper evaluates: windows begin at 0, stride, 2 * stride,
  ...; each scores only the tokens that no earlier window has scored, the per-window means are
  averaged with equal weight, and the last window is the first to reach the end of the text. Its
  shorter last share weighs as much as a full one, as in the paper.

Figures of the two protocols are not comparable (Mixtral-8x7B: 3.84 disjoint, 3.42 sliding by 512),
hence the label in every result.

Refused: a stride beyond the window (tokens would go unscored in silence), a window beyond the
model's positions, a text with nothing to score, and logits that are NaN or infinite.
"""

# T tokens of a window

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moepress.errors import EvaluationError
from moepress.evaluate.jsonl import read_bytes, read_rows
from moepress.evaluate.scoring import (
    check_vocabulary,
    encode,
    inference,
    log_probabilities,
    max_positions,
    suffix_logits,
)
from moepress.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity together with what is needed to compare it with another one."""

    ppl: float
    """exp of the mean loss (nats per token); infinite where that overflows a float."""

    tokens: int
    """Tokens that were scored."""

    windows: int
    """Forward passes."""

    dropped: int
    """Tokens of an incomplete last window that the disjoint protocol leaves out."""

    protocol: str
    """What was averaged over what, in words; print it beside the figure."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Tokens [begin, end) are read; of these the tokens from `scored_from` on are scored."""

    begin: int
    end: int
    scored_from: int


def read_text(path: str | Path) -> str:
    """The text of an evaluation file.

    A `.jsonl` file gives the "text" fields of its rows, each as it is, joined by a blank line
    ("\\n\\n"), which is how WikiText-2 is put together by GPTQ and its successors; any other file
    is UTF-8 text.

    Raises EvaluationError, with file and line, for a file that cannot be read or decoded, a row
    that is not a JSON object or has no "text" string, and a text that is empty.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        text = "\n\n".join(row.text("text") for row in read_rows(path))
    else:
        text = _decode(path, read_bytes(path))
    if not text.strip():
        raise EvaluationError(f"{path} holds no text")
    return text


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise EvaluationError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 2048,
    stride: int = 2048,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity of `model` on `text`; see the module's docstring for the two protocols.

    `window`, `stride` and `max_tokens` count tokens; `stride == window` selects the disjoint
    protocol, a smaller stride the sliding one. Special tokens are those that the tokenizer adds by
    default: at most a leading one, before the first window only. Losses are computed in float32
    whatever the model's dtype, and summed in double precision.

    Raises EvaluationError for settings that contradict each other or the model, a text of fewer
    than two tokens, token ids outside the model's vocabulary, and logits that are NaN or infinite
    (the window is named).
    """
    _check_settings(window, stride, max_tokens)
    ids = encode(tokenizer, text)
    total = len(ids)
    ids = ids[:max_tokens]
    check_vocabulary(model, ids)
    _check_length(model, len(ids), window)

    sliding = stride < window
    windows = list(_sliding(len(ids), window, stride) if sliding else _disjoint(len(ids), window))
    losses = _window_losses(model, torch.tensor(ids), windows, progress)
    counts = [w.end - w.scored_from for w in windows]
    if sliding:
        means = [loss / count for loss, count in zip(losses, counts, strict=True)]
        mean = math.fsum(means) / len(means)
    else:
        mean = math.fsum(losses) / sum(counts)
    return Perplexity(
        ppl=_exp(mean),
        tokens=sum(counts),
        windows=len(windows),
        dropped=len(ids) - windows[-1].end,
        protocol=_protocol(window, stride, len(ids), cut=len(ids) < total),
    )


def _check_settings(window: int, stride: int, max_tokens: int | None) -> None:
    if window < 2:
        raise EvaluationError(f"window is {window}; at least 2 tokens are needed to score one")
    if not 1 <= stride <= window:
        raise EvaluationError(
            f"stride is {stride}, window is {window}; use a stride from 1 to {window} ({window}: disjoint windows)"
        )
    if max_tokens is not None and max_tokens < 2:
        raise EvaluationError(f"max_tokens is {max_tokens}; at least 2 tokens are needed to score one")


def _check_length(model: PreTrainedModel, length: int, window: int) -> None:
    if length < 2:
        raise EvaluationError(f"the text has {length} token(s); at least 2 are needed to score one")
    limit = max_positions(model)
    if limit is not None and min(window, length) > limit:
        raise EvaluationError(f"window is {window}, the model has {limit} positions; use a window of at most {limit}")


def _disjoint(length: int, window: int) -> Iterator[_Window]:
    window = min(window, length)
    for begin in range(0, length - window + 1, window):
        yield _Window(begin=begin, end=begin + window, scored_from=begin + 1)


def _sliding(length: int, window: int, stride: int) -> Iterator[_Window]:
    scored_from = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield _Window(begin=begin, end=end, scored_from=scored_from)
        if end == length:
            return
        scored_from = end


def _window_losses(
    model: PreTrainedModel, ids: torch.Tensor, windows: list[_Window], progress: Progress
) -> list[float]:
    """Summed loss (nats) of each window's scored tokens."""
    losses = []
    with inference(model), progress("perplexity", len(windows)) as advance:
        for number, w in enumerate(windows, start=1):
            loss = _loss(model, ids, w)
            if math.isnan(loss):
                raise EvaluationError(
                    f"the model's logits are NaN or infinite in window {number} of {len(windows)} "
                    f"(tokens {w.begin} to {w.end - 1}); its weights or its dtype are at fault"
                )
            losses.append(loss)
            advance(1)
    return losses


def _loss(model: PreTrainedModel, ids: torch.Tensor, w: _Window) -> float:
    inputs_BT = ids[None, w.begin : w.end]
    targets_T = ids[w.scored_from : w.end]
    # The logits at t - 1 predict token t: one row more than there are targets, and the last one
    # predicts nothing here.
    logits_BTV = suffix_logits(model, inputs_BT, torch.ones_like(inputs_BT), len(targets_T) + 1)
    return -float(log_probabilities(logits_BTV[0, :-1], targets_T).double().sum())


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _protocol(window: int, stride: int, length: int, *, cut: bool) -> str:
    if stride < window:
        label = f"sliding windows of {window} with stride {stride}, mean of per-window losses (MiLo)"
    elif length < window:
        label = f"one window of {length} (text shorter than {window}), first token not scored, mean over tokens"
    else:
        label = f"disjoint windows of {window}, first token of each not scored, mean over tokens"
    return label + (f"; first {length} tokens of the text" if cut else "")
