# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of `moepress calibrate` on a checkpoint of real width: layers of Mixtral-8x7B's shape.

The checkpoint is that of memory.py, with random bfloat16 weights. Few short windows of random tokens are enough, as
what takes memory at this width are the second moments of inputs and the weights themselves, and what takes time with
many windows grows with them evenly. Sampled is the child's RssAnon, as in memory.py. GPTQ at this width takes minutes a
matrix on two cores; with --experts 2 --layers 1 it is done within the hour and has the same peak.

    python benchmarks/calibrate_memory.py --dir /tmp --method hqq
    python benchmarks/calibrate_memory.py --dir /tmp --method gptq --experts 2 --layers 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import memory as wide
import torch
from common import Figure, finish

ALLOWED_OVER = 0.5
"""GB of the peak over --memory: the libraries themselves take 0.3."""
CHILD = """
import json, re, sys, time
from pathlib import Path
import torch
import moepress
from moepress.measure.calibrate import calibrate
from moepress.measure.calibration import CalibrationSettings
from moepress.source import open_source
status = Path("/proc/self/status").read_text()
source, stats, method, bits, memory, windows, length, threads = sys.argv[1:]
if int(threads):
    torch.set_num_threads(int(threads))
ids = torch.randint(0, 1024, (int(windows), int(length)), generator=torch.Generator().manual_seed(0))
settings = CalibrationSettings(method=method, bits=(int(bits),), group_sizes=(64,), ranks=(), min_tokens=1)
start = time.perf_counter()
with open_source(source) as opened:
    calibrate(opened, ids, stats, settings, memory=int(memory))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "imported": int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="where to put the temporary folder")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=wide.EXPERTS, help="of a layer; the peak is that of one")
    parser.add_argument("--scale", type=int, default=1, help="divides every side of every matrix")
    parser.add_argument("--memory", type=float, default=3.0, help="GB")
    parser.add_argument("--method", default="hqq", choices=("rtn", "hqq", "gptq"))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    options = parser.parse_args()
    limit = options.memory
    shrink(options.scale, options.experts)
    shards = list(wide.shapes(options.layers))
    size = 2 * sum(torch.Size(shape).numel() for shard in shards for shape in shard.values())
    if shutil.disk_usage(options.dir).free < 1.2 * size:
        raise SystemExit(f"{options.dir} needs {1.2 * size / 1e9:.1f} GB free")
    with TemporaryDirectory(dir=options.dir, prefix="moepress-calibrate-") as folder:
        source = Path(folder) / "source"
        wide.generate(source, shards, options.layers)
        given = (options.method, options.bits, int(limit * 1e9), options.windows, options.length, options.threads)
        result, peak = measure([str(source), str(Path(folder) / "stats"), *map(str, given)])
    seconds, imported = result["seconds"], result["imported"]
    target = limit + ALLOWED_OVER
    print(f"source        {size / 1e9:8.2f} GB, --memory {limit:g} GB, {options.windows} x {options.length} tokens")
    print(f"peak RssAnon  {peak / 1e9:8.2f} GB (target {target:.2f}); {imported / 1e9:.2f} after the imports")
    print(f"time          {seconds:8.1f} s")
    note = (
        f"{size / 1e9:.2f} GB random Mixtral shape / {options.scale}, {options.experts} experts, "
        f"{options.method} b{options.bits}g64, "
        f"{options.windows} x {options.length} tokens, memory {limit:g} GB"
    )
    figures = [
        Figure("peak RssAnon", peak / 1e9, "GB", f"at most {target:.3g}", note),
        Figure("RssAnon after imports", imported / 1e9, "GB", "", note),
        Figure("time", seconds, "s", "", note),
    ]
    finish(f"calibrate_memory {options.method}", figures)
    return int(peak > target * 1e9)


def shrink(scale: int, experts: int) -> None:
    """Sets what memory.py builds with."""
    wide.EXPERTS, wide.EXPERTS_PER_SHARD = experts, min(experts, wide.EXPERTS_PER_SHARD)
    wide.HIDDEN, wide.INTERMEDIATE, wide.KEY_VALUE = (
        side // scale for side in (wide.HIDDEN, wide.INTERMEDIATE, wide.KEY_VALUE)
    )
    wide.CONFIG |= {"hidden_size": wide.HIDDEN, "intermediate_size": wide.INTERMEDIATE}
    wide.CONFIG |= {
        "num_local_experts": experts,
        "num_attention_heads": 32 // scale,
        "num_key_value_heads": max(1, 8 // scale),
    }


def measure(words: list[str]) -> tuple[dict[str, float], int]:
    """The child's report and the largest RssAnon seen, in bytes."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True)
    peak = 0
    while child.poll() is None:
        peak = max(peak, wide.anonymous_bytes(child.pid))
        time.sleep(wide.SAMPLE_SECONDS)
    output = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"the child ended with status {child.returncode}")
    return json.loads(output.splitlines()[-1]), peak


if __name__ == "__main__":
    sys.exit(main())
