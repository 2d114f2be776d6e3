# SPDX-License-Identifier: Apache-2.0
"""The run-time compiler and its cache; needs NVRTC, no GPU."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moepress.errors import KernelError
from moepress.kernels.cuda import compiler
from moepress.kernels.cuda.compiler import Compiled, Request, Warmed, cache_folder, compile_kernel, warm, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
HEADER = "template <int N> __device__ int times(int x) { return N * x; }\n"
MIDDLE = '#pragma once\n  #  include "inner.cuh"  // transitively\n'
SOURCE = """#include "middle.cuh"
#ifndef OFFSET
#define OFFSET 0
#endif
template <int N, bool ADD> __global__ void scale(int* p) { *p = times<N>(*p) + (ADD ? OFFSET : 0); }
extern "C" __global__ void plain(int* p) { *p = 1; }
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_warned", set())
    monkeypatch.setattr(compiler, "_unsaved", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sources = tmp_path / "sources"
    sources.mkdir()
    for name, text in {"k.cu": SOURCE, "middle.cuh": MIDDLE, "inner.cuh": HEADER}.items():
        (sources / name).write_text(text)
    return sources


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The instances that NVRTC compiled."""
    made: list[str] = []
    inner = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda r, *rest: made.append(r.instance) or inner(r, *rest))
    return made


def files() -> list[Path]:
    return sorted(cache_folder().iterdir())


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_templates_and_plain_kernels_compile(folder: Path, arch: str) -> None:
    made = compile_kernel("k.cu", "scale<3, true>", arch, folder=folder)
    assert made.cubin.startswith(b"\x7fELF") and made.name.encode() in made.cubin
    assert made.name.startswith("_Z5scaleILi3ELb1EE")
    assert compile_kernel("k.cu", "plain", arch, folder=folder).name == "plain"


def test_second_time_comes_from_the_cache(folder: Path, calls: list[str]) -> None:
    first = compile_kernel("k.cu", "scale<3, true>", "sm_80", folder=folder)
    again = compile_kernel("k.cu", "scale<3, true>", "sm_80", folder=folder)
    assert first == again and calls == ["scale<3, true>"] and len(files()) == 1


def change_header(folder: Path) -> None:
    (folder / "inner.cuh").write_text(HEADER.replace("N * x", "N * x + 1"))


@pytest.mark.parametrize(
    ("change", "instance", "arch", "defines"),
    [
        (change_header, "scale<3, true>", "sm_80", ()),
        (lambda folder: None, "scale<4, true>", "sm_80", ()),
        (lambda folder: None, "scale<3, true>", "sm_89", ()),
        (lambda folder: None, "scale<3, true>", "sm_80", ("OFFSET=7",)),
    ],
    ids=["header", "instance", "arch", "defines"],
)
def test_what_changes_the_outcome_changes_the_key(
    folder: Path, calls: list[str], change: Callable[[Path], None], instance: str, arch: str, defines: tuple[str, ...]
) -> None:
    before = compile_kernel("k.cu", "scale<3, true>", "sm_80", folder=folder)
    change(folder)
    after = compile_kernel("k.cu", instance, arch, defines, folder=folder)
    assert len(calls) == 2 and len(files()) == 2 and before.cubin != after.cubin


def test_another_nvrtc_changes_the_key(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel("k.cu", "plain", "sm_80", folder=folder)
    monkeypatch.setattr(compiler, "_version", lambda: (99, 9))
    compile_kernel("k.cu", "plain", "sm_80", folder=folder)
    assert len(calls) == 2


def test_place_of_the_sources_does_not_matter(folder: Path, calls: list[str]) -> None:
    compile_kernel("k.cu", "plain", "sm_80", folder=folder)
    compile_kernel("k.cu", "plain", "sm_80", folder=folder.rename(folder.with_name("elsewhere")))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"?", lambda b: b"[]\n", lambda b: b""]
)
def test_damaged_file_is_compiled_again(folder: Path, calls: list[str], damage: Callable[[bytes], bytes]) -> None:
    good = compile_kernel("k.cu", "scale<3, true>", "sm_80", folder=folder)
    (path,) = files()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"):
        assert compile_kernel("k.cu", "scale<3, true>", "sm_80", folder=folder) == good
    with warnings.catch_warnings(action="error"):
        assert compile_kernel("k.cu", "scale<3, true>", "sm_80", folder=folder) == good
    assert len(calls) == 2 and len(files()) == 1


def test_unwritable_folder_warns_once_and_is_done_without(
    folder: Path, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder, not even for root")
    monkeypatch.setenv("MOEPRESS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep compiled kernels in .*/file/kernels .*MOEPRESS_CACHE") as told:
        made = [compile_kernel("k.cu", f"scale<{n}, true>", "sm_80", folder=folder) for n in (3, 3, 4)]
    assert made[0] == made[1] and len(told) == 1 and calls == ["scale<3, true>", "scale<4, true>"]


def test_compile_error_shows_the_log(folder: Path) -> None:
    (folder / "k.cu").write_text(SOURCE.replace("times<N>", "twice<N>"))
    with pytest.raises(KernelError, match=r'(?s)scale<3, true> for sm_89: .*k\.cu\(5\).*"twice" is undefined'):
        compile_kernel("k.cu", "scale<3, true>", "sm_89", folder=folder)
    assert not cache_folder().exists()


def test_unknown_instance_architecture_and_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match='"shrink" is undefined'):
        compile_kernel("k.cu", "shrink<3>", "sm_80", folder=folder)
    with pytest.raises(KernelError, match="gpu-architecture"):
        compile_kernel("k.cu", "plain", "sm_1", folder=folder)
    with pytest.raises(KernelError, match=r"no kernel source .*nothing\.cu"):
        compile_kernel("nothing.cu", "plain", "sm_80", folder=folder)
    (folder / "inner.cuh").rename(folder.parent / "inner.cuh")
    monkeypatch.chdir(folder.parent)  # where NVRTC must not look
    with pytest.raises(KernelError, match=r"inner\.cuh"):
        compile_kernel("k.cu", "plain", "sm_80", folder=folder)


def test_interrupted_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compile_kernel("k.cu", "plain", "sm_80", folder=folder)
    assert not files()


def test_killed_write_leaves_no_kernel(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr(compiler, "_compile", lambda *_: Compiled("plain", b"never seen"))
            monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            compile_kernel("k.cu", "plain", "sm_80", folder=folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.suffix for path in files()] == [".part"]
    with warnings.catch_warnings(action="error"):
        compile_kernel("k.cu", "plain", "sm_80", folder=folder)
    assert calls == ["plain"]


def test_warm_counts(folder: Path, calls: list[str]) -> None:
    compile_kernel("k.cu", "scale<1, true>", "sm_80", folder=folder)
    requests = [Request("k.cu", f"scale<{n}, true>", "sm_80") for n in (1, 2, 3, 4, 4)]
    assert warm(requests, workers=2, folder=folder) == Warmed(compiled=3, cached=1)
    assert warm(iter(requests), folder=folder) == Warmed(compiled=0, cached=4)
    assert warm([], folder=folder) == Warmed(0, 0)
    assert sorted(calls) == [f"scale<{n}, true>" for n in (1, 2, 3, 4)]
    with pytest.raises(KernelError, match="shrink"):
        warm([*requests, Request("k.cu", "shrink<3>", "sm_80")], folder=folder)


def test_who_comes_second_waits_and_reads(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes want the same kernel; threads take file locks from each other as processes do."""
    both, inner = threading.Barrier(2), compiler._compile

    def slow(*arguments: Any) -> Compiled:
        time.sleep(0.3)
        return inner(*arguments)

    def ask(_: int) -> tuple[Compiled, bool]:
        both.wait()
        return compiler._get(Request("k.cu", "plain", "sm_80"), folder)

    monkeypatch.setattr(compiler, "_compile", slow)
    with ThreadPoolExecutor(2) as pool:
        (first, is_new), (second, is_new_too) = pool.map(ask, range(2))
    assert first == second and is_new != is_new_too and calls == ["plain"]
    (path,) = files()
    assert not compiler.lock_of(path).exists()


def test_without_locks_everybody_compiles(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: compiler.FileLock, timeout: float) -> None:
        raise NotImplementedError("this file system has no locks")

    monkeypatch.setattr(compiler.FileLock, "acquire", refuse)
    assert compile_kernel("k.cu", "plain", "sm_80", folder=folder).name == "plain"
    assert calls == ["plain"] and len(files()) == 1


def test_nobody_waits_forever(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "PATIENCE", 0.1)
    compile_kernel("k.cu", "plain", "sm_80", folder=folder)
    (path,) = files()
    path.unlink()
    with compiler.FileLock(compiler.lock_of(path)):
        compile_kernel("k.cu", "plain", "sm_80", folder=folder)
    assert calls == ["plain", "plain"] and files() == [path]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPRESS_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/a/kernels")
    monkeypatch.delenv("MOEPRESS_CACHE")
    assert cache_folder() == Path("/b/moepress/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path("/c/.cache/moepress/kernels")


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'cuda'"), RuntimeError("Failure finding libnvrtc\nhints")]
)
def test_without_nvrtc(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise error

    monkeypatch.setattr(compiler, "_version", missing)
    assert "pip install 'moepress[gpu]'" in why_not() and "\n" not in why_not()
    with pytest.raises(KernelError, match="NVRTC cannot be loaded"):
        compile_kernel("k.cu", "plain", "sm_80", folder=folder)
