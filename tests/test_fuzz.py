# SPDX-License-Identifier: Apache-2.0
"""Damaged folders end in an error of ours or in success, never in another exception and never in a hang.

Each seed makes one reproducible damage. A failing seed is in the test's name of the batch; `damage` tells what it did.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moepress
from moepress import planning
from moepress.checkpoint.layout import lay_out
from moepress.errors import CheckpointError, MoepressError
from moepress.source import open_source
from tiny import tiny_checkpoint

SECONDS = 20
FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3", "granitemoe")
SETTINGS = moepress.Settings(method="milo", ranks="dense-2+sparse-1", group_size=32, iterations=0)
BATCHES, EACH = 8, 20
SLOW_BATCHES, SLOW_EACH = 40, 50
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan"), 0.5, "", "x", "0",
    "../x", "model.safetensors", "é\x00", [], {}, [[]], [0], {"a": None}, [1, 2, 3], "b3g64", "0-999999999",
)  # fmt: skip


class Hang(BaseException):
    """The deadline has passed; no Exception, so that nothing swallows it."""


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def stop(_: int, frame: FrameType | None) -> None:
        raise Hang(f"no end after {seconds} s, in {frame}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------- damage


def flip_bytes(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"x")
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        limit = len(data) if dice.random() < 0.5 else min(len(data), 3000)
        data[dice.randrange(limit)] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.choice([0, 1, 8, 9, dice.randrange(len(data) + 1), len(data) - 1])])


def lengthen(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.choice([1, 8, 4096])))


def remove(path: Path, dice: random.Random) -> None:
    path.unlink()


def to_folder(path: Path, dice: random.Random) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path, dice: random.Random) -> None:
    path.unlink()
    path.symlink_to(dice.choice([path.name, "nowhere", "/dev/null", ".", "config.json"]))


def swap(path: Path, dice: random.Random) -> None:
    other = dice.choice(sorted(path.parent.iterdir()))
    if other != path and other.is_file():
        shutil.copyfile(other, path)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value of a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


def edit_document(document: Any, dice: random.Random) -> Any:
    """Some values replaced by odd ones, removed, or moved to another key."""
    for _ in range(dice.choice([1, 1, 1, 3])):
        found = places(document)
        if not found or dice.random() < 0.03:
            return dice.choice(ODD_VALUES)
        # choose a depth first, or the many leaves would hide the few sections
        container, key = dice.choice([p for p in found if p[0] is document] if dice.random() < 0.4 else found)
        action = dice.random()
        if action < 0.7:
            container[key] = dice.choice(ODD_VALUES)
        elif action < 0.85 or isinstance(container, list):
            del container[key]
        else:
            container[f"{key}{dice.choice(['x', '.weight', '9'])}"] = container.pop(key)
    return document


def edit_json_file(path: Path, dice: random.Random) -> None:
    path.write_text(json.dumps(edit_document(json.loads(path.read_text()), dice)))


def edit_header(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    entry = dice.choice(entries)
    action = dice.randrange(6)
    if action == 0:
        entry["dtype"] = dice.choice(
            ["F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "U8", "I16", "U16", "F32", "BOOL", "C64"]
        )
    elif action == 1:
        dice.shuffle(entry["shape"])
    elif action == 2:
        entry["shape"] = dice.choice(
            [[], [0], [1, *entry["shape"]], [*entry["shape"], 1], [-1], [2**40, 2**40], entry["shape"][:1]]
        )
    elif action == 3:
        entry["data_offsets"] = dice.choice(entries)["data_offsets"]
    elif action == 4:
        first, second = dice.sample([name for name in header if name != "__metadata__"], 2)
        header[first], header[second] = header[second], header[first]
    else:
        header = edit_document(header, dice)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


ANY_FILE = (flip_bytes, truncate, lengthen, remove, to_folder, to_link, swap)


def damage(folder: Path, seed: int) -> str:
    """Damages a file or two; returns what it did."""
    dice = random.Random(seed)
    told = []
    for _ in range(dice.choice([1, 1, 1, 2])):
        path = dice.choice([p for p in sorted(folder.iterdir()) if p.is_file()])
        actions: list[Callable[[Path, random.Random], None]] = [dice.choice(ANY_FILE)]
        if path.suffix == ".json":
            actions += [edit_json_file] * 3
        if path.suffix == ".safetensors":
            actions += [edit_header] * 3
        action = dice.choice(actions)
        told.append(f"{action.__name__}({path.name})")
        try:
            action(path, dice)
        except (ValueError, struct.error, KeyError, AttributeError, TypeError):  # damaged before, by this very seed
            flip_bytes(path, dice)
    return ", ".join(told)


# ---------------------------------------------------------------------------------------------- outcomes


def outcome(action: Callable[[], Any], note: str, foreign: bool = False) -> str:
    """Runs it against the clock: 'success' or our error's name. Anything else fails the test.

    With `foreign`, exceptions of transformers are fine too, but not one that passed through moepress.
    """
    try:
        with deadline(SECONDS):
            action()
    except MoepressError as error:
        if not str(error):
            raise AssertionError(f"{note}: {type(error).__name__} without a word") from error
        return type(error).__name__
    except Hang as error:
        raise AssertionError(f"{note}: {error}") from None
    except Exception as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/moepress/" in f.filename.replace("\\", "/")]
        if foreign and not ours:
            return type(error).__name__
        raise AssertionError(f"{note}: {type(error).__name__}: {error}") from error
    return "success"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """family -> a source of two shards and its compressed folder, also of several shards."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        source = tiny_checkpoint(folder / "source", family, shards=2, vocab_size=32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "lay_out", partial(lay_out, max_shard_bytes=40_000))
            moepress.compress_checkpoint(source, folder / "target", SETTINGS)
        assert len(list((folder / "target").glob("*.safetensors"))) > 1
        made[family] = (source, folder / "target")
    return made


def inspect(folder: Path) -> None:
    with open_source(folder) as src:
        src.copied_files()


def try_source(sound: dict[str, tuple[Path, Path]], tmp_path: Path, seed: int) -> list[str]:
    folder, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(sound[FAMILIES[seed % len(FAMILIES)]][0], folder)
    note = f"seed {seed}: {damage(folder, seed)}"
    told = [
        outcome(lambda: inspect(folder), note),
        outcome(lambda: moepress.plan_checkpoint(folder, SETTINGS), note),
        outcome(lambda: moepress.compress_checkpoint(folder, target, SETTINGS), note),
    ]
    if told[-1] == "success":
        told.append(outcome(lambda: moepress.verify_checkpoint(target, folder), note))
        assert told[-1] == "success", note
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["source"], f"{note}: half a target is left"
    clear(tmp_path)
    return told


def try_target(sound: dict[str, tuple[Path, Path]], tmp_path: Path, seed: int, load: bool) -> list[str]:
    source, whole = sound[FAMILIES[seed % len(FAMILIES)]]
    folder = tmp_path / "target"
    shutil.copytree(whole, folder)
    note = f"seed {seed}: {damage(folder, seed)}"
    told = [
        outcome(lambda: moepress.verify_checkpoint(folder), note),
        outcome(lambda: moepress.verify_checkpoint(folder, source), note),
        outcome(lambda: inspect(folder), note),
        outcome(lambda: moepress.compress_checkpoint(source, folder, SETTINGS, resume=True), note),
    ]
    if load:
        told.append(outcome(lambda: AutoModelForCausalLM.from_pretrained(folder), note, foreign=True))
    clear(tmp_path)
    return told


def clear(folder: Path) -> None:
    for path in list(folder.iterdir()):
        shutil.rmtree(path)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_sources(sound: dict[str, tuple[Path, Path]], tmp_path: Path, batch: int) -> None:
    told = [try_source(sound, tmp_path, batch * EACH + i) for i in range(EACH)]
    assert any(each[-1] != "success" for each in told), "nothing was damaged enough to be noticed"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_targets(sound: dict[str, tuple[Path, Path]], tmp_path: Path, batch: int) -> None:
    told = [try_target(sound, tmp_path, 5000 + batch * EACH + i, load=i % 2 == 0) for i in range(EACH)]
    assert any(each[0] != "success" for each in told), "nothing was damaged enough to be noticed"


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(SLOW_BATCHES))
def test_many_damaged_folders(sound: dict[str, tuple[Path, Path]], tmp_path: Path, batch: int) -> None:
    for seed in range(10_000 + batch * SLOW_EACH, 10_000 + (batch + 1) * SLOW_EACH):
        try_source(sound, tmp_path, seed)
        try_target(sound, tmp_path, seed, load=True)


# ---------------------------------------------------------------------------------------------- single bits


def is_found(folder: Path) -> bool:
    try:
        return bool(moepress.verify_checkpoint(folder).problems)
    except CheckpointError:
        return True


def positions(path: Path, dice: random.Random, count: int) -> list[int]:
    """Bits of a file: both ends, and at random, half of them in the header where it is a shard."""
    bits = 8 * path.stat().st_size
    chosen = [0, bits - 1]
    header = 8 * (8 + struct.unpack("<Q", path.read_bytes()[:8])[0]) if path.suffix == ".safetensors" else bits
    return chosen + [dice.randrange(header if i % 2 else bits) for i in range(count)]


def check_bits(whole: Path, folder: Path, count: int, seed: int) -> None:
    shutil.copytree(whole, folder)
    assert not is_found(folder)
    dice, missed = random.Random(seed), []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for bit in positions(path, dice, count):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with deadline(SECONDS):
                if not is_found(folder):
                    missed.append(f"{path.name} bit {bit}: {bytes(changed[max(0, bit // 8 - 20) : bit // 8 + 20])!r}")
        path.write_bytes(data)
    assert not missed, "\n".join(missed[:10])
    assert not is_found(folder)


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe"])
def test_any_flipped_bit_is_found(sound: dict[str, tuple[Path, Path]], tmp_path: Path, family: str) -> None:
    assert {p.suffix for p in sound[family][1].iterdir()} >= {".json", ".md", ".safetensors", ""}
    check_bits(sound[family][1], tmp_path / "target", 12, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_flipped_bit_is_found_again(sound: dict[str, tuple[Path, Path]], tmp_path: Path, family: str) -> None:
    check_bits(sound[family][1], tmp_path / "target", 300, 2)


def test_every_bit_of_a_shards_metadata_is_guarded(sound: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = tmp_path / "target"
    shutil.copytree(sound["olmoe"][1], folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    begin = data.index(b'"__metadata__"')
    for bit in range(8 * begin, 8 * (data.index(b"}", begin) + 1)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(changed)
        assert is_found(folder), f"bit {bit - 8 * begin} of the metadata"


def test_a_flipped_bit_in_the_values_changes_what_is_loaded(
    sound: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The test's own check: what verify finds is real damage."""
    folder = tmp_path / "target"
    shutil.copytree(sound["olmoe"][1], folder)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (sound["olmoe"][1], folder))
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1
