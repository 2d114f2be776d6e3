# SPDX-License-Identifier: Apache-2.0
"""Kernels' own code, or parts of it, compiled for the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from moepress.kernels.cuda.compiler import SOURCES

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ for C++17")


def build(folder: Path, text: str, *options: str) -> ctypes.CDLL:
    """The functions of `text`; it can include the kernels' sources and what lies in `folder`."""
    (folder / "code.cpp").write_text(text)
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", f"-I{SOURCES}", *options, "-o", "code.so", "code.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "code.so"))
