# SPDX-License-Identifier: Apache-2.0
"""Models whose answers are known, and a tokenizer of one token per character; no download, no
file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
ID = {character: index for index, character in enumerate(CHARACTERS)}
VOCABULARY = len(CHARACTERS)


class Bigram(nn.Module):
    """A model whose logits are the row of a table for the current token: probabilities can be read
    off.

    Without a table all logits are equal.
    """

    characters = CHARACTERS
    index = ID

    def __init__(self, table_VV: torch.Tensor | None = None, positions: int = 4096) -> None:
        super().__init__()
        table_VV = self.table() if table_VV is None else table_VV
        self.table_VV = nn.Parameter(table_VV)
        self.config = LlamaConfig(vocab_size=len(table_VV), max_position_embeddings=positions)
        self.device = table_VV.device
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.seen.append(input_ids)
        assert not self.training, "evaluation must switch dropout off"
        return SimpleNamespace(logits=self.table_VV[input_ids])

    @staticmethod
    def table(*texts: str) -> torch.Tensor:
        """Logits under which each text's characters follow each other with near certainty."""
        table_VV = torch.zeros(VOCABULARY, VOCABULARY)
        for here, following in chain.from_iterable(map(pairwise, texts)):
            table_VV[ID[here], ID[following]] = 20.0
        return table_VV


@pytest.fixture(scope="session")
def bigram() -> type[Bigram]:
    """The class as a fixture: test modules cannot import this file under every import mode."""
    return Bigram


@pytest.fixture
def uniform() -> Bigram:
    return Bigram()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    """A random two-layer model with opinions: large weights, so that no two positions score
    alike.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character. Its own limit of 8 tokens must neither cut a text nor cause a
    warning.
    """
    model = Tokenizer(WordLevel(ID, unk_token="\n"))
    model.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=8, eos_token="\n", pad_token="\n")


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines; a string stands for a raw line."""

    def write(*rows: dict[str, Any] | str, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
