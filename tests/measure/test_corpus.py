# SPDX-License-Identifier: Apache-2.0
"""Calibration windows: the same by seed, from the text and nothing else, disjoint, and no more text than needed."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.errors import CalibrationError
from moepress.measure.corpus import read_windows, windows_digest

END = 0


class Words:
    """A tokenizer of one token a word: `w123` is 123; counts what it was given."""

    eos_token_id: int | None = END

    def __init__(self) -> None:
        self.letters = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens and "<|" not in text
        self.letters += len(text)
        words = [word for word in text.split() if word.startswith("w") and word[1:].isdigit()]
        return {"input_ids": [int(word[1:]) for word in words]}


def words(count: int, first: int = 1) -> str:
    """Numbered words, about 12 to a line."""
    return "".join(f"w{i}" + ("\n" if i % 12 == 0 else " ") for i in range(first, first + count))


def write(path: Path, text: str) -> Path:
    opener: Callable[..., Any] = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="\n") as file:
        file.write(text)
    return path


def runs(row: list[int]) -> bool:
    return all(b == a + 1 for a, b in pairwise(row))


@pytest.mark.parametrize("count", [1000, 200_000])  # tokenised whole; drawn from stretches
def test_windows_are_disjoint_runs_of_the_text(count: int, tmp_path: Path) -> None:
    tokenizer = Words()
    path = write(tmp_path / "a.txt", words(count))
    ids = read_windows(path, tokenizer, windows=20, length=30, seed=3)
    assert ids.dtype == torch.int64 and ids.shape == (20, 30)
    assert all(runs(row) for row in ids.tolist())
    assert torch.equal(ids.flatten(), ids.flatten().unique())  # ascending, and nothing twice
    assert 0.6 * count < int(ids.max()) <= count and int(ids.min()) < 0.25 * count
    if count == 200_000:
        assert tokenizer.letters < 0.02 * path.stat().st_size
    again = read_windows(path, Words(), windows=20, length=30, seed=3)
    assert torch.equal(ids, again) and windows_digest(ids) == windows_digest(again)
    other = read_windows(path, Words(), windows=20, length=30, seed=4)
    assert not torch.equal(ids, other) and windows_digest(ids) != windows_digest(other)


def test_the_digest_is_of_shape_and_values() -> None:
    ids = torch.arange(6).reshape(2, 3)
    assert windows_digest(ids) == windows_digest(ids.int()) == windows_digest(ids.T.contiguous().T)
    assert len({windows_digest(ids), windows_digest(ids.reshape(3, 2)), windows_digest(ids + 1)}) == 3


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz", ".jsonl", ".jsonl.xz", ".jsonl.gz"])
def test_compressed_files_are_read_like_plain_ones(suffix: str, tmp_path: Path) -> None:
    kind = suffix.split(".")[1]
    text = words(3000) if kind == "txt" else records([words(40, 1 + 40 * i) for i in range(75)])
    plain = read_windows(write(tmp_path / f"plain.{kind}", text), Words(), windows=3, length=50)
    assert torch.equal(read_windows(write(tmp_path / f"packed{suffix}", text), Words(), windows=3, length=50), plain)


@pytest.mark.parametrize("marker", ["\n<|endoftext|>\n", "<|endoftext|>", "\r\n<|endoftext|>\r\n"])
def test_the_marker_becomes_the_end_token(marker: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"w1 w2 w3{marker}w4 w5{marker}w6 w7 w8")
    assert read_windows(path, Words(), windows=1, length=10).tolist() == [[1, 2, 3, END, 4, 5, END, 6, 7, 8]]
    without = Words()
    without.eos_token_id = None
    assert read_windows(path, without, windows=2, length=4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_start_inside_a_word_or_a_letter_is_moved(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", " ".join(f"éw{i} w{i}" for i in range(1, 20_000)))
    for seed in range(5):
        for row in read_windows(path, Words(), windows=5, length=30, seed=seed).tolist():
            assert runs(row)


@pytest.mark.parametrize("count", [599, 600])
def test_a_text_that_is_just_long_enough_serves(count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", words(count))
    if count == 600:
        assert read_windows(path, Words(), windows=20, length=30).flatten().tolist() == list(range(1, 601))
        return
    with pytest.raises(CalibrationError, match=r"a\.txt gives 599 tokens, 20 windows of 30 need 600; name a longer"):
        read_windows(path, Words(), windows=20, length=30)


def test_a_large_file_of_few_tokens_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x " * 100_000)
    with pytest.raises(CalibrationError, match="gives 0 tokens, 5 windows of 30 need 150"):
        read_windows(path, Words(), windows=5, length=30)


def test_a_sparse_stretch_is_read_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"w{i}" + 60 * " " for i in range(1, 4001)))
    for row in read_windows(path, Words(), windows=20, length=100).tolist():
        assert runs(row)


# ---------------------------------------------------------------------------------------------- records


def records(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))


def test_records_come_in_random_order_joined_by_the_end_token(tmp_path: Path) -> None:
    texts = [words(5, 1 + 10 * i) for i in range(50)]
    path = write(tmp_path / "a.jsonl", records(texts))
    flat = read_windows(path, Words(), windows=10, length=12).flatten().tolist()
    order = [flat[i] // 10 for i in range(0, 120, 6)]
    assert flat == [token for i in order for token in [*range(1 + 10 * i, 6 + 10 * i), END]]
    assert len(set(order)) == 20 and order != sorted(order)
    assert read_windows(path, Words(), windows=10, length=12, seed=1).flatten().tolist() != flat


def test_no_record_gives_more_than_a_window_while_there_are_others(tmp_path: Path) -> None:
    texts = [words(1000, 1 + 1000 * i) for i in range(30)]
    path = write(tmp_path / "a.jsonl", records(texts))
    tokenizer = Words()
    ids = read_windows(path, tokenizer, windows=10, length=20)
    sources = {token // 1000 for token in ids.flatten().tolist() if token != END}
    assert len(sources) == 10
    assert tokenizer.letters <= 10 * max(map(len, texts))  # and no other record was looked at
    few = write(tmp_path / "few.jsonl", records(texts[:2]))
    assert read_windows(few, Words(), windows=10, length=20).shape == (10, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "w1"}\n{"text": 3}\n', r"line 2 has no text under 'text' \(it has the fields text\)"),
        ('{"text": "w1"}\n{"body": "w2"}\n', r"line 2 has no text under 'text' \(it has the fields body\); name the"),
        ('{"text": "w1"}\n[1]\n', r"line 2 has no text under 'text' \(it has list\)"),
        ('{"text": "w1"}\n{"text\n', "line 2 is no JSON"),
        ('{"text": "w1 w2"}\n\n', "gives 3 tokens, 2 windows of 5 need 10"),
        ("", "gives 0 tokens"),
    ],
)
def test_bad_records_are_told_by_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_windows(write(tmp_path / "a.jsonl", text), Words(), windows=2, length=5)


def test_another_field_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records([words(40)], "content"))
    assert read_windows(path, Words(), windows=2, length=20, field="content").flatten().tolist() == list(range(1, 41))


def test_a_saved_dataset_and_folders_of_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [words(40, 1 + 40 * i) for i in range(20)]
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "split"))
    for name in ("parquet", "lines"):
        (tmp_path / name).mkdir()
    rows.to_parquet(str(tmp_path / "parquet" / "a.parquet"))
    write(tmp_path / "lines" / "a.jsonl", records(texts))
    one = write(tmp_path / "a.jsonl", records(texts))
    expected = read_windows(one, Words(), windows=4, length=50)
    for name in ("saved", "split", "parquet", "lines"):
        assert torch.equal(read_windows(tmp_path / name, Words(), windows=4, length=50), expected), name
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"holds neither a saved dataset nor \.parquet or \.jsonl files"):
        read_windows(tmp_path / "empty", Words())
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(str(tmp_path / "ab"))
    with pytest.raises(CalibrationError, match="has the splits a, b and no train"):
        read_windows(tmp_path / "ab", Words())


def test_without_the_datasets_package_a_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        read_windows(tmp_path, Words())


# ---------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.pdf", "no calibration text"), ("none.txt", "cannot be read"), ("a.xz", "no calibration text")],
)
def test_what_is_no_text_is_refused(name: str, message: str, tmp_path: Path) -> None:
    if name.startswith("a."):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CalibrationError, match=message):
        read_windows(tmp_path / name, Words())


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_damaged_archive_is_refused(suffix: str, kept: float, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.txt{suffix}", words(5000) + str(random.Random(0).getrandbits(9999)))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)] if kept else b"no archive")
    with pytest.raises(CalibrationError, match=r"a\.txt.* cannot be read"):
        read_windows(path, Words(), windows=1, length=10)


@pytest.mark.parametrize("arguments", [{"windows": 0}, {"length": 1}])
def test_no_windows_are_refused(arguments: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="the least is 1 window of 2 tokens"):
        read_windows(write(tmp_path / "a.txt", words(10)), Words(), **arguments)


def test_a_real_tokenizer_adds_no_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from moepress.demo.run import EXCERPT, MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    whole = tokenizer(EXCERPT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    ids = read_windows(EXCERPT, tokenizer, windows=1, length=len(whole))
    assert ids.flatten().tolist() == whole
