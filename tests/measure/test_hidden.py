# SPDX-License-Identifier: Apache-2.0
"""Hidden states on disk: what is written is read, whatever the cache holds, and files are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.errors import CalibrationError, ReadError, WriteError
from moepress.measure.hidden import HiddenStates, Pool

SHAPE = (5, 7, 3)
WINDOW = 7 * 3 * 4


def values(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("limit", [0, WINDOW, 3 * WINDOW, 100 * WINDOW])
def test_what_is_written_is_read(limit: int, lasting: bool, tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "a", SHAPE, Pool(limit), lasting=lasting)
    expected = values()
    states.write(3, expected[3:])
    states.write(0, expected[:3])
    assert torch.equal(states.read(0, 5), expected)
    states.write(1, 2 * expected[1:2])
    expected[1] *= 2
    for first in range(5):
        for last in range(first + 1, 6):
            assert torch.equal(states.read(first, last), expected[first:last])
    taken = states.read(0, 5)
    taken.zero_()  # a copy
    assert torch.equal(states.read(0, 5), expected)
    states.close()


@given(st.sets(st.integers(0, 34)), st.sampled_from([0, 2 * WINDOW, 5 * WINDOW]), st.booleans())
def test_rows_are_read_and_added_to(
    tmp_path_factory: pytest.TempPathFactory, chosen: set[int], limit: int, zero: bool
) -> None:
    states = HiddenStates(tmp_path_factory.mktemp("rows") / "a", SHAPE, Pool(limit))
    expected = torch.zeros(SHAPE) if zero else values()
    if zero:
        states.keep_zeros()
    else:
        states.write(0, expected)
    tokens = torch.tensor(sorted(chosen), dtype=torch.int64)
    assert torch.equal(states.rows(tokens), expected.reshape(35, 3)[tokens])
    more = values(1, (len(tokens), 3))
    for _ in range(2):
        states.add_rows(tokens, more)
        expected.view(35, 3)[tokens] += more
    assert torch.equal(states.read(0, 5), expected)
    states.close()


def test_the_cache_keeps_to_the_limit_and_gives_it_back(tmp_path: Path) -> None:
    pool = Pool(4 * WINDOW + 1)
    first = HiddenStates(tmp_path / "a", SHAPE, pool)
    first.write(0, values())
    assert pool.used == 4 * WINDOW
    second = HiddenStates(tmp_path / "b", SHAPE, pool, lasting=True)
    second.write(0, values(1))
    assert pool.used == 4 * WINDOW
    first.release(0, 2)
    assert pool.used == 2 * WINDOW
    assert torch.equal(second.read(0, 5), values(1))
    assert pool.used == 4 * WINDOW  # what was read is kept
    first.close()
    first.close()
    assert pool.used == 2 * WINDOW
    second.close()
    assert pool.used == 0
    assert not list(tmp_path.iterdir())


def test_scratch_writes_only_what_the_cache_cannot_hold(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "a", (5, 700, 300), Pool(4 * 700 * 300 * 4))
    states.write(0, values(0, (5, 700, 300)))
    on_disk = 512 * (tmp_path / "a.partial").stat().st_blocks
    assert 700 * 300 * 4 <= on_disk < 1.2 * 700 * 300 * 4


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "a", SHAPE, Pool(0), lasting=True)
    states.write(0, values())
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
    states.complete()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == values().numpy().tobytes()
    states.close()
    again = HiddenStates.open(tmp_path / "a", SHAPE, Pool(0))
    assert torch.equal(again.read(0, 5), values())
    again.close()
    assert (tmp_path / "a").exists()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(CalibrationError, match=r"has 4 bytes, but hidden states of shape \(5, 7, 3\) have 420"):
        HiddenStates.open(tmp_path / "a", SHAPE, Pool(0))
    with pytest.raises(CalibrationError, match="has -1 bytes"):
        HiddenStates.open(tmp_path / "b", SHAPE, Pool(0))


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "a", SHAPE, Pool(0))
    os.truncate(tmp_path / "a.partial", 100)
    with pytest.raises(ReadError, match="ends at byte 100 of 420"):
        states.read(0, 5)


def test_a_full_disk_is_told_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = (10**9, 1000, 1000)
    with pytest.raises(WriteError, match=r"GB free, the hidden states a need 4000000\.00 GB; free some space"):
        HiddenStates(tmp_path / "a", huge, Pool(0))
    states = HiddenStates(tmp_path / "a", SHAPE, Pool(0), lasting=True)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match=r"No space left on device.*continue from the last complete layer"):
        states.write(0, values())
    states.close()
    assert not list(tmp_path.iterdir())
