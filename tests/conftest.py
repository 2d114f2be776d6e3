# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every test: tiny checkpoints, written once a session, and what moepress made of them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import moepress
from command import Cli, Run
from tiny import tiny_checkpoint

settings.register_profile(
    "moepress",
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("moepress")

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are tiny: more threads only get in each other's way, and sums come out alike on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(model_type, **arguments of tiny_checkpoint) -> a folder shared by all tests. Never write into it."""
    made: dict[Any, Path] = {}

    def get(model_type: str, **arguments: Any) -> Path:
        key = repr((model_type, sorted(arguments.items(), key=lambda item: item[0])))
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type) / "source"
            made[key] = tiny_checkpoint(folder, model_type, **arguments)
        return made[key]

    return get


@pytest.fixture(scope="session")
def pressed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """pressed(model_type, **settings) -> that tiny checkpoint compressed. Never write into it."""
    made: dict[str, Path] = {}

    def get(model_type: str, **chosen: Any) -> Path:
        key = repr((model_type, sorted(chosen.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type) / "pressed"
            moepress.compress_checkpoint(tiny(model_type), folder, moepress.Settings(**chosen))
            made[key] = folder
        return made[key]

    return get


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """copy_of(folder) -> a copy that a test may damage."""

    def get(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return get


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """cli("verify", folder) -> exit status and output of `moepress verify folder`, in this process."""
    from moepress.cli import main

    def run(*words: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["moepress", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        return Run(code, *capsys.readouterr())

    return run
