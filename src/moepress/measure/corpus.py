# SPDX-License-Identifier: Apache-2.0
"""Calibration windows: equally long runs of token ids, drawn from a text by seed.

Only about as much text is tokenised as the windows need. Of a large plain text the file is cut into as many stretches
as there are windows, and each window starts at a random place of its own; a small one is tokenised whole and windows
lie at random distances. Records (JSON Lines, `datasets` folders) are taken in random order, at most one window's worth
of each as long as there are others, and joined. Documents are joined by the tokenizer's end-of-text token; no other
special token is added.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from moepress.errors import CalibrationError
from moepress.measure.records import JsonLines, dataset_records

_MARKER = re.compile(r"\r?\n?<\|endoftext\|>\r?\n?")
_BYTES_A_TOKEN = 16
"""More text than a token ever has on average; what a window's stretch must hold to be worth drawing from."""
_COMPRESSED = {".xz": lzma.open, ".gz": gzip.open}


def read_windows(
    path: str | Path, tokenizer: Any, *, windows: int = 128, length: int = 2048, seed: int = 0, field: str = "text"
) -> torch.Tensor:
    """ids [windows, length], int64, the same for the same file, tokenizer and arguments.

    `path` is plain text (.txt), JSON Lines (.jsonl, .json), either compressed with .xz or .gz, or a folder of the
    `datasets` library. `<|endoftext|>` ends a document of plain text; `field` names the text of a record.
    Raises CalibrationError if there is too little text or it cannot be read.
    """
    path = Path(path)
    if windows < 1 or length < 2:
        raise CalibrationError(
            f"{windows} windows of {length} tokens were asked for; the least is 1 window of 2 tokens"
        )
    encode = _Encoder(tokenizer)
    try:
        if path.is_dir():
            with dataset_records(path, field) as records:
                rows = _from_records(records, encode, windows, length, seed)
        else:
            with _plain(path) as (file, suffix):
                if suffix == ".txt":
                    rows = _from_text(file, encode, windows, length, seed)
                else:
                    rows = _from_records(JsonLines(path, file, field), encode, windows, length, seed)
    except _TooLittle as error:
        raise CalibrationError(
            f"{path} gives {error.tokens} tokens, {windows} windows of {length} need {windows * length}; name a longer "
            "text, or ask for fewer or shorter windows"
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    return torch.tensor(rows, dtype=torch.int64)


def evenly(ids: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the windows [windows, length], evenly spaced."""
    count = min(count, len(ids))
    return ids[[number * len(ids) // count for number in range(count)]]


def windows_digest(ids: torch.Tensor) -> str:
    """sha256 of the shape and the ids, for the record."""
    body = ids.to("cpu", torch.int64).contiguous()
    return hashlib.sha256(f"{tuple(body.shape)}".encode() + body.numpy().astype("<i8").tobytes()).hexdigest()


class _TooLittle(Exception):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens


class _Encoder:
    """Text to ids, with the end-of-text token between documents."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = getattr(tokenizer, "eos_token_id", None)
        self.end: list[int] = [] if end is None else [int(end)]

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, document in enumerate(_MARKER.split(text)):
            if i:
                ids += self.end
            if document:
                ids += self._tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


@contextmanager
def _plain(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """The file to read at any place, and its suffix without that of compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    unpack = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2] if unpack and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind not in {".txt", ".jsonl", ".json"}:
        raise CalibrationError(
            f"{path} is no calibration text that moepress reads; give .txt or .jsonl (also .xz or .gz), or a folder of "
            "the datasets library"
        )
    if unpack is None:
        with path.open("rb") as file:
            yield file, kind
        return
    # a compressed stream cannot be read at random places
    with unpack(path, "rb") as packed, tempfile.TemporaryFile() as file:
        shutil.copyfileobj(packed, file, 1 << 20)
        yield file, kind


def _from_text(file: IO[bytes], encode: _Encoder, windows: int, length: int, seed: int) -> list[list[int]]:
    size, draw = file.seek(0, 2), random.Random(seed)
    if size < _BYTES_A_TOKEN * windows * length:
        file.seek(0)
        ids = encode(_decode(file.read()))
        return _spread(ids, windows, length, draw)
    rows = []
    for i in range(windows):
        begin, end = i * size // windows, (i + 1) * size // windows
        start = draw.randint(begin, end - _BYTES_A_TOKEN * length)
        row = _stretch(file, encode, start, end, length)
        if len(row) < length:  # unusually few tokens there: from the beginning of the stretch
            row = _stretch(file, encode, begin, end, length)
        if len(row) < length:
            raise _TooLittle(sum(map(len, rows)) + len(row))
        rows.append(row)
    return rows


def _stretch(file: IO[bytes], encode: _Encoder, start: int, end: int, length: int) -> list[int]:
    """Up to `length` ids from the text between two bytes, reading no more of it than needed."""
    wanted = _BYTES_A_TOKEN // 2 * length
    while True:
        file.seek(start)
        data = file.read(min(wanted, end - start))
        whole = start + len(data) >= end
        ids = encode(_decode(data if start == 0 else _after_break(data)))
        # the last tokens of a cut text may not be those of the whole, so a few more are asked for
        if whole or len(ids) >= length + 8:
            return ids[:length]
        wanted *= 2


def _after_break(data: bytes) -> bytes:
    """Drops the rest of a line, or of a word where lines are long, that a random start cut in two."""
    head = data[:1024]
    at = head.find(b"\n")
    return data[(at if at >= 0 else head.find(b" ")) + 1 :]


def _decode(data: bytes) -> str:
    return data.decode("utf-8", errors="ignore")


def _spread(ids: Sequence[int], windows: int, length: int, draw: random.Random) -> list[list[int]]:
    spare = len(ids) - windows * length
    if spare < 0:
        raise _TooLittle(len(ids))
    gaps = sorted(draw.randint(0, spare) for _ in range(windows))
    return [list(ids[gap + i * length : gap + (i + 1) * length]) for i, gap in enumerate(gaps)]


def _from_records(records: Sequence[str], encode: _Encoder, windows: int, length: int, seed: int) -> list[list[int]]:
    needed, draw = windows * length, random.Random(seed)
    order = list(range(len(records)))
    draw.shuffle(order)
    ids: list[int] = []
    total = 0
    pick: Callable[[list[int]], list[int]]
    for pick in (lambda own: _crop(own, length, draw), lambda own: own):
        ids, total = [], 0
        for i in order:
            own = encode(records[i])
            total += len(own)
            ids += pick(own) + encode.end if own else []
            if len(ids) >= needed:
                return [ids[at : at + length] for at in range(0, needed, length)]
        if total < needed:  # the second sweep takes all of every record and cannot help either
            break
    raise _TooLittle(max(total, len(ids)))


def _crop(ids: list[int], length: int, draw: random.Random) -> list[int]:
    if len(ids) <= length:
        return ids
    start = draw.randint(0, len(ids) - length)
    return ids[start : start + length]
