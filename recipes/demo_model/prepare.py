# SPDX-License-Identifier: Apache-2.0
"""Step 1: corpus -> training documents, held-out excerpt, tokenizer and token files.

The corpus is one xz text file, its documents parted by a line `<|endoftext|>`. Four steps:

1. Only narrative prose from Standard Ebooks (CC0) is kept. The corpus also holds textbooks, a
   manual and two Project Gutenberg e-books; their licences differ, so none of them is used.
2. Six chapters from six novels become `excerpt.txt`; they are never trained on.
3. About one document in sixty-four (by the hash of its text) becomes the validation set.
4. The rest trains a byte-level BPE tokenizer and is written out as 16-bit token ids.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"
VOCAB_SIZE = 4096

# Chapters and diary months open with one of these lines; no textbook section does.
HEADING = re.compile(
    r"(?:[IVXLC]+|Chapter .*|(?:January|February|March|April|May|June|July|August|September"
    r"|October|November|December) 16.*)\n"
)
# Short stories open with a bare title. They are told apart from textbook sections by how often
# they use the words that narrative lives on, and by the absence of anything that only a textbook,
# a manual or a Gutenberg file would say.
NARRATIVE_WORD = re.compile(r"\b(?:he|she|him|her|his|said|had|was|I|you)\b")
NARRATIVE_SHARE = 0.045
NOT_FICTION = re.compile(
    r"Learning (?:Outcomes|Objectives)|OpenStax|[Cc]redit(?::| “)|attribution:|^Standards$"
    r"|Written by:|Bill of Rights|Gutenberg|^=+ |\(\(\(",
    re.MULTILINE,
)

# The held-out chapters: how each one begins after its heading.
EXCERPT = {
    "Pride and Prejudice, chapter XI": "When the ladies removed after dinner, Elizabeth ran up",
    "Moby-Dick, chapter XCIII": "It was but some few days after encountering the Frenchman",
    "Adventures of Huckleberry Finn, chapter V": "I had shut the door to. Then I turned around",
    "Anne of Green Gables, chapter XIII": "“It’s time Anne was in to do her sewing,” said Marilla",
    "The Brothers Karamazov, book IV, chapter II": "First of all, Alyosha went to his father.",
    "War and Peace, book XI, chapter XII": "The Rostóvs remained in Moscow till the first",
}


def read_documents(path: Path) -> list[str]:
    """The documents of the corpus, in file order, without the separator lines."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        parts = file.read().split(f"\n{SEPARATOR}\n")
    return [part.strip("\n") for part in parts if part.strip()]


def is_standard_ebooks_prose(text: str) -> bool:
    """True for chapters, diary months and short stories; false for everything else."""
    if HEADING.match(text):
        return True
    words = len(re.findall(r"\w+", text)) or 1
    share = len(NARRATIVE_WORD.findall(text)) / words
    return share >= NARRATIVE_SHARE and not NOT_FICTION.search(text)


def split_documents(documents: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Training documents, validation documents, and the held-out chapters in EXCERPT's order."""
    train, valid, held_out = [], [], {}
    for text in documents:
        body = text[:400].split("\n", 3)
        name = next((n for n, start in EXCERPT.items() if any(b.startswith(start) for b in body)), None)
        if name is not None:
            if name in held_out:
                raise SystemExit(f"two documents match the held-out chapter {name!r}")
            held_out[name] = text
        elif hashlib.sha256(text.encode()).digest()[0] < 4:
            valid.append(text)
        else:
            train.append(text)
    missing = [name for name in EXCERPT if name not in held_out]
    if missing:
        raise SystemExit(f"held-out chapters not found in the corpus: {missing}")
    return train, valid, [held_out[name] for name in EXCERPT]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A lossless byte-level BPE with one special token, which starts, ends and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write_tokens(tokenizer: Tokenizer, documents: list[str], path: Path) -> int:
    """Write every document, each led by the separator token, as little-endian 16-bit ids."""
    end = tokenizer.token_to_id(SEPARATOR)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(documents):
        ids.append(end)
        ids.extend(encoding.ids)
    np.asarray(ids, dtype="<u2").tofile(path)
    return len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="corpus_train.txt.xz")
    parser.add_argument("work", type=Path, help="folder for the results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    everything = read_documents(args.corpus)
    kept = [text for text in everything if is_standard_ebooks_prose(text)]
    train, valid, held_out = split_documents(kept)
    excerpt = "\n\n".join(held_out) + "\n"
    (args.work / "excerpt.txt").write_text(excerpt, encoding="utf-8")

    tokenizer = train_tokenizer(train)
    tokenizer.save(str(args.work / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": SEPARATOR,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (args.work / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")

    summary = {
        "documents_in_corpus": len(everything),
        "documents_kept": len(kept),
        "train_documents": len(train),
        "train_bytes": sum(len(text.encode()) for text in train),
        "train_tokens": write_tokens(tokenizer, train, args.work / "train.bin"),
        "valid_documents": len(valid),
        "valid_tokens": write_tokens(tokenizer, valid, args.work / "valid.bin"),
        "excerpt_documents": len(held_out),
        "excerpt_bytes": len(excerpt.encode()),
    }
    (args.work / "data.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
