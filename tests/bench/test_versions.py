# SPDX-License-Identifier: Apache-2.0
"""Versions of the package in one process: each is whole, and has nothing of another."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).parents[2]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module("versions")


def has_commit() -> bool:
    return (
        bool(shutil.which("git")) and not subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=False).returncode
    )


def test_a_copy_is_a_package_of_its_own(versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions.copy_package(".", tmp_path, "moepress_copied")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = [importlib.import_module(f"moepress_copied.{each}") for each in ("kernels.cuda.run", "bench.problems")]
    sources = sys.modules["moepress_copied.kernels.cuda.compiler"].SOURCES
    assert sources.is_relative_to(tmp_path) and (sources / "gemv.cu").exists()
    assert modules[0].RecordBank is not importlib.import_module("moepress.kernels.cuda.run").RecordBank
    problem = versions.parse(modules[1], "qwen3-30b-a3b,64,32")
    assert (problem.shape, problem.tokens, problem.rank, problem.moe) == ((128, 8, 2048, 768), 64, 32, True)
    problem = versions.parse(modules[1], "4096x512,1,0")
    assert (problem.shape, problem.tokens, problem.rank, problem.moe) == ((4096, 512), 1, 0, False)
    for wrong in ("qwen3-30b-a3b", "qwen3-30b-a3b,64", "4096x512,1,-2"):
        with pytest.raises(SystemExit, match=f"{wrong!r} is not of the form"):
            versions.parse(modules[1], wrong)


def test_no_benchmark_has_the_name_of_a_package_that_transformers_looks_for() -> None:
    """It would find the benchmark: its folder is the first that a running benchmark looks in."""
    looked_for = {*re.findall(r'_is_package_available\("(\w+)', inspect.getsource(import_utils))}
    assert {"kernels", "torch"} <= looked_for
    assert not looked_for & {path.stem for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.skipif(not has_commit(), reason="needs git and a repository with a commit")
def test_a_commit_is_one(versions: ModuleType, tmp_path: Path) -> None:
    versions.copy_package("HEAD", tmp_path, "moepress_committed")
    found = {path.relative_to(tmp_path / "moepress_committed") for path in tmp_path.rglob("*.py")}
    assert Path("kernels/cuda/run.py") in found and list(tmp_path.iterdir()) == [tmp_path / "moepress_committed"]
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.py")]
    assert any("from moepress_committed." in text for text in texts)
    assert not any("from moepress." in text or "import moepress\n" in text for text in texts)
    with pytest.raises(SystemExit, match="no-such-version is no folder with src/moepress and no commit"):
        versions.copy_package("no-such-version", tmp_path, "moepress_none")
