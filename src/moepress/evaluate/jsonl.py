# SPDX-License-Identifier: Apache-2.0
"""Rows of a JSON-lines file, each with the line number that an error message needs.

Lines are parted by the byte `\\n` alone: a Unicode line separator inside a JSON string does not end
a row. Blank lines are skipped. Refused, with the file and the line: bytes that are not UTF-8, text
that is not JSON, and a row that is not a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moepress.errors import EvaluationError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One object of a JSON-lines file and where it stands; `line` counts from 1."""

    path: Path
    line: int
    fields: dict[str, Any]

    def fail(self, problem: str) -> NoReturn:
        """Raise EvaluationError with the file and the line in front of the problem."""
        raise EvaluationError(f"{self.path}, line {self.line}: {problem}")

    def value(self, name: str) -> Any:
        """The field's value, whatever its type; EvaluationError where the field is absent."""
        if name not in self.fields:
            present = ", ".join(self.fields) or "none"
            self.fail(f'the field "{name}" is missing; the row has: {present}')
        return self.fields[name]

    def text(self, name: str) -> str:
        """The field as a string (it may be empty); EvaluationError where it is absent or of another
        type.
        """
        value = self.value(name)
        if not isinstance(value, str):
            self.fail(f'the field "{name}" must be a string, not {type(value).__name__}')
        return value

    def words(self, name: str) -> str:
        """As `text`, but a string of white space alone is refused too."""
        value = self.text(name)
        if not value.strip():
            self.fail(f'the field "{name}" is empty')
        return value

    def index(self, name: str, size: int) -> int:
        """The field as an index of a list of `size` entries; EvaluationError where it is not
        one.
        """
        value = self.value(name)
        if type(value) is not int or not 0 <= value < size:  # a JSON true is an int to isinstance
            self.fail(f'the field "{name}" must be a whole number from 0 to {size - 1}, not {value!r}')
        return value


def read_bytes(path: Path) -> bytes:
    """The file's content; EvaluationError where it is absent or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from error


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows in order. A bad line raises EvaluationError when it is reached, not before."""
    path = Path(path)
    for number, raw in enumerate(read_bytes(path).split(b"\n"), start=1):
        if raw.strip():
            yield Row(path=path, line=number, fields=_parse(path, number, raw))


def _parse(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise EvaluationError(f"{path}, line {number}: a row must be a JSON object, not a {kind}")
    return fields
