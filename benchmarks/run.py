# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that a CPU finishes in minutes: speed beside hqq, and logits of the compressed demo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from common import DEMO_MODEL, HERE

from moepress import Settings, compress_checkpoint


def main() -> int:
    with TemporaryDirectory(prefix="moepress-bench-") as folder:
        compressed = Path(folder) / "demo"
        compress_checkpoint(DEMO_MODEL, compressed, Settings(ranks="dense-32+sparse-4"))
        failed = run("logits.py", str(DEMO_MODEL), str(compressed))
    return run("hqq_peer.py", "--budget", "5") or failed


def run(script: str, *arguments: str) -> int:
    print(f"\n== {script}", flush=True)
    return subprocess.run([sys.executable, str(HERE / script), *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main())
