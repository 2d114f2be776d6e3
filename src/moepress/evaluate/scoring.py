# SPDX-License-Identifier: Apache-2.0
"""The one place where evaluation calls a model: token ids in, log-probabilities out.

    log p(token t | tokens before t) = logits[t - 1, token t] - logsumexp(logits[t - 1, :])

in float32. Only the logits from the first scored position on are asked of the model, and only
`CHUNK` rows of them are in float32 at a time: at a vocabulary of 150,000 a window of 2048 in
float32 would take 1.2 GB.

Refused: token ids outside the model's vocabulary (an index error on the CPU, a poisoned context on
a GPU).
"""

# B batch, T tokens, V vocabulary

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moepress.errors import EvaluationError

CHUNK = 256
"""Rows of logits that are held in float32 at a time."""


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's training flag is put back afterwards."""
    was_training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the whole text, never truncated, with the tokenizer's default special tokens."""
    # verbose=False: the warning about sequences beyond the model's positions does not apply,
    # windows follow
    return list(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest input, in tokens, of the model's configuration; None where it names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Raise EvaluationError if a token id has no row in the model's embedding."""
    vocabulary = model.config.get_text_config().vocab_size
    if ids and max(ids) >= vocabulary:
        raise EvaluationError(
            f"the tokenizer produced token id {max(ids)}, the model's vocabulary has {vocabulary} "
            "entries; use the tokenizer that belongs to this model"
        )


def suffix_logits(model: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor, keep: int) -> torch.Tensor:
    """Logits (B, keep, V) of the last `keep` positions, in the model's dtype, on its device."""
    narrowed = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        narrowed["logits_to_keep"] = keep
    output = model(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        use_cache=False,
        **narrowed,
    )
    logits_BTV: torch.Tensor = output.logits
    return logits_BTV[:, -keep:]


def log_probabilities(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """log p of each target under its row of logits: (T,) float32 on the CPU, NaN for NaN logits."""
    targets_T = targets_T.to(logits_TV.device)
    chunks = [
        -F.cross_entropy(rows.float(), targets, reduction="none")
        for rows, targets in zip(torch.split(logits_TV, CHUNK), torch.split(targets_T, CHUNK), strict=True)
    ]
    return torch.cat(chunks).cpu()
