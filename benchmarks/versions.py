# SPDX-License-Identifier: Apache-2.0
"""Versions of moepress's kernels beside each other in one process, since clocks move by more than what most changes do.

    python benchmarks/versions.py HEAD~3 . --problem qwen3-30b-a3b,64,32 --problem 4096x4096,1,0 [--rounds 3]
                                  [--seconds 0.05]

A version is a commit, or a folder that has `src/moepress` (`.` is the working tree). Each is copied into a package with
a name of its own. A problem is a known layer or the N x K of a matrix, tokens, and the rank of compensators. Versions
take turns; prints the median of each, the least and the most of its rounds, and how far its results are from the
first's. Appends nothing: `kernel_times.py` makes the rows.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

NAME = "moepress"
MOST_COPIES = 32
"""Of the weights of one version: all of them are in memory together."""


def copy_package(version: str, to: Path, name: str) -> None:
    """The package of a version as `name` in the folder `to`. SystemExit where there is none."""
    source = Path(version) / "src" / NAME
    if source.is_dir():
        shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    else:
        found = subprocess.run(["git", "archive", version, f"src/{NAME}"], capture_output=True, check=False)
        if found.returncode:
            raise SystemExit(f"{version} is no folder with src/{NAME} and no commit: {found.stderr.decode().strip()}")
        with TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
            archive.extractall(folder, filter="data")
            shutil.move(f"{folder}/src/{NAME}", to / name)
    for path in (to / name).rglob("*.py"):
        path.write_text(re.sub(rf"\b{NAME}\b", name, path.read_text(encoding="utf-8")), encoding="utf-8")


def parse(module: Any, text: str) -> Any:
    """`layer,tokens,rank` as a problem of a version's `bench.problems`. SystemExit where it is none."""
    shape, *numbers = text.split(",")
    if len(numbers) != 2 or not all(each.isdecimal() for each in numbers):
        raise SystemExit(f"--problem {text!r} is not of the form qwen3-30b-a3b,64,32 or 4096x4096,1,0")
    tokens, rank = map(int, numbers)
    dense, moe = (shape, None) if re.fullmatch(r"\d+x\d+", shape) else (None, shape)
    kind, sizes, name = module.parse_shape(moe, dense, None)
    return module.Problem(kind, sizes, tokens, rank=rank, name=name)


def compare(names: list[str], text: str, rounds: int, seconds: float) -> str:
    """One line of a problem."""
    device = torch.device("cuda", torch.cuda.current_device())
    recordings, times, first, changes = [], [[] for _ in names], None, []
    for name in names:
        bench = {each: importlib.import_module(f"{name}.bench.{each}") for each in ("clock", "ours", "problems")}
        problem, ours = parse(bench["problems"], text), bench["ours"].Moepress()
        clock = bench["clock"].CudaClock(device)
        ours.warm_up([problem], device)
        size = int(ours.bits_per_weight(problem) * problem.weights / 8)
        read = size * (problem.shape[1] if problem.moe else 1) // problem.experts
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(MOST_COPIES, bench["clock"].copies_needed(read, size, l2_bytes, clock.free_bytes()))
        calls = ours.prepare(problem, copies, 0, device)
        y = calls[0]().double()
        first = y if first is None else first
        changes.append(float((y - first).norm() / first.norm()))
        recordings.append((clock, clock.record(calls)))
    for _ in range(rounds):
        for (clock, recording), own in zip(recordings, times, strict=True):
            own.append(median(clock.replay(recording, seconds)))
    found = zip(times, changes, strict=True)
    return " | ".join(f"{median(own):8.2f} ({min(own):.2f} to {max(own):.2f}), {by:.0e}" for own, by in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--problem", action="append", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.05)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA device, and this machine has none")
    with TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        names = [f"{NAME}_{i}" for i in range(len(given.versions))]
        for version, name in zip(given.versions, names, strict=True):
            copy_package(version, Path(folder), name)
        print(f"us a call of {' | '.join(given.versions)}", flush=True)
        for text in given.problem:
            print(f"{text:28} {compare(names, text, given.rounds, given.seconds)}", flush=True)


if __name__ == "__main__":
    main()
