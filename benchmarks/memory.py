# SPDX-License-Identifier: Apache-2.0
"""Peak memory and speed of compressing a checkpoint of real width: 3 layers of Mixtral-8x7B's shape, 8.7 GB.

Random bfloat16 weights are written shard by shard into a temporary folder and compressed with RTN at 3 bits in a
child process. Sampled is the child's RssAnon, the memory it owns: pages of the memory-mapped source belong to the
kernel's cache, which takes them back whenever something else needs them. Everything generated is removed at the
end.

    python benchmarks/memory.py --dir /tmp [--layers 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import Figure, finish
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEY_VALUE, EXPERTS, VOCABULARY = 4096, 14336, 1024, 8, 1024
EXPERTS_PER_SHARD = 4
TARGET_GB = 1.5
SAMPLE_SECONDS = 0.02
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16",
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
CHILD = """
import json, re, sys, time
from pathlib import Path
import moepress
status = Path("/proc/self/status").read_text()
start = time.perf_counter()
moepress.compress_checkpoint(sys.argv[1], sys.argv[2], moepress.Settings(method="rtn", bits=3))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "imported": int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024}))
"""

Shapes = dict[str, tuple[int, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="where to put the temporary folder")
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    shards = list(shapes(options.layers))
    size = 2 * sum(torch.Size(shape).numel() for shard in shards for shape in shard.values())
    free = shutil.disk_usage(options.dir).free
    if free < 1.4 * size:
        raise SystemExit(f"{options.dir} has {free / 1e9:.1f} GB free and this needs {1.4 * size / 1e9:.1f} GB")
    with TemporaryDirectory(dir=options.dir, prefix="moepress-memory-") as folder:
        source = Path(folder) / "source"
        generate(source, shards, options.layers)
        result, peak = compress(source, Path(folder) / "target")
    seconds, imported = result["seconds"], result["imported"]
    print(f"source        {size / 1e9:8.2f} GB in {len(shards)} shards")
    print(f"peak RssAnon  {peak / 1e9:8.2f} GB (target {TARGET_GB}); {imported / 1e9:.2f} after the imports")
    print(f"time          {seconds:8.1f} s, {size / 1e6 / seconds:.0f} MB/s of source")
    note = f"{size / 1e9:.2f} GB random Mixtral shape, rtn b3g64"
    figures = [
        Figure("peak RssAnon", peak / 1e9, "GB", f"at most {TARGET_GB}", note),
        Figure("RssAnon after imports", imported / 1e9, "GB", "", note),
        Figure("time", seconds, "s", "", note),
        Figure("throughput", size / 1e6 / seconds, "MB/s", "", note),
    ]
    finish("memory", figures)
    return int(peak > TARGET_GB * 1e9)


def shapes(layers: int) -> Iterator[Shapes]:
    """Tensor shapes by name, one dictionary for each shard."""
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for first in range(0, EXPERTS, EXPERTS_PER_SHARD):
            shard: Shapes = {}
            for expert in range(first, first + EXPERTS_PER_SHARD):
                name = f"{prefix}block_sparse_moe.experts.{expert}."
                shard |= {f"{name}{w}.weight": (INTERMEDIATE, HIDDEN) for w in ("w1", "w3")}
                shard[f"{name}w2.weight"] = (HIDDEN, INTERMEDIATE)
            yield shard
        rows = {"q": HIDDEN, "k": KEY_VALUE, "v": KEY_VALUE, "o": HIDDEN}
        attention: Shapes = {f"{prefix}self_attn.{w}_proj.weight": (n, HIDDEN) for w, n in rows.items()}
        norms: Shapes = {f"{prefix}{w}_layernorm.weight": (HIDDEN,) for w in ("input", "post_attention")}
        yield attention | norms | {f"{prefix}block_sparse_moe.gate.weight": (EXPERTS, HIDDEN)}
    vocabulary = (VOCABULARY, HIDDEN)
    yield {
        "model.embed_tokens.weight": vocabulary,
        "lm_head.weight": vocabulary,
        "model.norm.weight": (HIDDEN,),
    }


def generate(folder: Path, shards: list[Shapes], layers: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: gaussian(shape, generator) for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        print(f"wrote {file}", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def compress(source: Path, target: Path) -> tuple[dict[str, float], int]:
    """The child's report and the largest RssAnon seen, in bytes."""
    command = [sys.executable, "-c", CHILD, str(source), str(target)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(SAMPLE_SECONDS)
    output = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"the child ended with status {child.returncode}")
    return json.loads(output.splitlines()[-1]), peak


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # the process is about to end and owns nothing any more


if __name__ == "__main__":
    sys.exit(main())
