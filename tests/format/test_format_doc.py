# SPDX-License-Identifier: Apache-2.0
"""docs/FORMAT.md is right: its reader, which knows nothing of moepress, gives the weights that moepress gives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moepress
from moepress.checkpoint.reader import CheckpointReader
from moepress.format.manifest import Manifest
from moepress.format.packing import pack_codes
from moepress.format.spec import BITS, FACTOR_BITS, GROUP_SIZES, PROJECTIONS, WeightSpec
from moepress.format.weight import dequantize
from moepress.source import open_source
from moepress.verify import load_parts
from tiny import write_shards

DOC = Path(__file__).parents[2] / "docs" / "FORMAT.md"
DEMO = Path(moepress.__file__).parent / "demo" / "model"
FAMILY = "qwen2_moe"
"""Tiny, with a shared expert whose down projection has 96 inputs: a ragged last group of 64."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The names that the document's only Python block defines."""
    (text,) = blocks("python")
    assert "import moepress" not in text
    assert "from moepress" not in text
    names: dict[str, Any] = {}
    exec(compile(text, str(DOC), "exec"), names)
    return names


@pytest.fixture(scope="module")
def mixed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every width of codes and of factors, every group size that fits, and experts in several buckets."""
    source, target = tiny(FAMILY), tmp_path_factory.mktemp("mixed") / "target"
    with open_source(source) as src:
        refs = src.graph.weights
    chosen = {}
    for i, ref in enumerate(refs):
        expert = (ref.expert or 0) + (ref.projection == "down")
        number = i if ref.bank is None else 3 * (expert % 3)
        rank = (0, 5, 1, 9, 2)[number % 5]
        chosen[ref.name] = WeightSpec(
            bits=BITS[number % len(BITS)],
            group_size=(32, 64)[number % 2],
            rank=rank,
            factor_bits=FACTOR_BITS[number % len(FACTOR_BITS)] if rank else 0,
        )
    plan = moepress.plan_checkpoint(source, moepress.Settings(ranks="uniform-1", iterations=0))
    moepress.compress_checkpoint(source, target, plan=replace(plan, weights=chosen))
    return target


def compare(names: dict[str, Any], source: Path, target: Path) -> set[str]:
    """Every compressed weight by both readers; returns the tags that were met."""
    tags = set()
    with open_source(source) as src, CheckpointReader(target) as files:
        manifest = Manifest.from_config(files.config["quantization_config"])
        for ref in src.graph.weights:
            if ref.bank is None:
                spec = manifest.linears[ref.module].spec
                found = names["read_linear"](target, ref.module)
            else:
                found, spec = of_bank(names, target, manifest, ref)
            wanted = dequantize(load_parts(files, manifest, ref), spec, *ref.shape).numpy()
            assert found.dtype == np.float32
            assert found.shape == ref.shape
            if spec.rank:
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6, err_msg=ref.name)
            else:
                np.testing.assert_array_equal(found, wanted, err_msg=ref.name)
            tags.add(spec.tag)
    return tags


def of_bank(names: dict[str, Any], target: Path, manifest: Manifest, ref: Any) -> tuple[np.ndarray, WeightSpec]:
    """An expert's weight, its bucket and slot found from config.json's text as the document tells it."""
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    side = config["banks"][ref.bank]["down" if ref.projection == "down" else "gate_up"]
    for tag, text in side["experts"].items():
        ids = [i for run in text.split(",") for i in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)]
        if ref.expert in ids:
            prefix, slot = f"{ref.bank}.{ref.projection}.{tag}", sorted(ids).index(ref.expert)
            return names["read_weight"](target, prefix, tag, *side["shape"], slot), WeightSpec.parse(tag)
    raise AssertionError(f"{ref.name} has no spec")


@pytest.mark.parametrize("settings", [
    {"method": "rtn", "bits": 3}, {"method": "hqq", "bits": 2, "group_size": 32},
    {"ranks": "uniform-4", "iterations": 0}, {"ranks": "uniform-4", "iterations": 0, "factor_bits": 16},
], ids=["rtn", "hqq", "milo", "fp16"])  # fmt: skip
def test_the_reader_of_the_document_gives_our_weights(
    reader: dict[str, Any], tiny: Callable[..., Path], pressed: Callable[..., Path], settings: dict[str, Any]
) -> None:
    assert len(compare(reader, tiny(FAMILY), pressed(FAMILY, **settings))) == 1


def test_the_reader_knows_every_width_and_buckets(
    reader: dict[str, Any], tiny: Callable[..., Path], mixed: Path
) -> None:
    specs = [WeightSpec.parse(tag) for tag in compare(reader, tiny(FAMILY), mixed)]
    assert {spec.bits for spec in specs} == set(BITS)
    assert {spec.factor_bits for spec in specs} == {0, *FACTOR_BITS}
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert all(len(bank[side]["experts"]) > 1 for bank in config["banks"].values() for side in ("gate_up", "down"))


def test_the_reader_reads_shards(
    reader: dict[str, Any], pressed: Callable[..., Path], copy_of: Callable[[Path], Path]
) -> None:
    whole = pressed(FAMILY, method="rtn", bits=3)
    folder = copy_of(whole)
    write_shards(folder, load_file(folder / "model.safetensors"), shards=3)
    name = "model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(reader["read_linear"](folder, name), reader["read_linear"](whole, name))


@pytest.mark.parametrize(("key", "value"), [("format_version", 2), ("quant_method", "gptq")])
def test_the_reader_refuses_what_it_cannot_know(
    reader: dict[str, Any], pressed: Callable[..., Path], copy_of: Callable[[Path], Path], key: str, value: Any
) -> None:
    folder = copy_of(pressed(FAMILY, method="rtn", bits=3))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format 1"):
        reader["read_linear"](folder, "model.layers.0.self_attn.q_proj")


def test_the_example_is_what_the_demo_model_gives() -> None:
    example = json.loads(blocks("json")[0])
    settings = moepress.Settings(ranks="dense-8+sparse-2")
    with open_source(DEMO) as src:
        refs = [ref for ref in src.graph.weights if ref.layer == 0]
        plan = moepress.plan_checkpoint(DEMO, settings)
    manifest = Manifest.from_config(example)
    assert manifest.to_config() == example
    linears = {ref.module: (plan.weights[ref.name], ref.shape) for ref in refs if ref.bank is None}
    assert {name: (entry.spec, entry.shape) for name, entry in manifest.linears.items()} == linears
    ((name, bank),) = manifest.banks.items()
    for ref in refs:
        if ref.bank is not None:
            assert ref.bank == name
            assert bank.specs(ref.projection)[ref.expert or 0] == plan.weights[ref.name]
            assert bank.shape(ref.projection) == ref.shape
    stored = manifest.stored()
    assert stored["model.layers.0.self_attn.k_proj.packed"] == ("U8", (128, 96))
    assert stored["model.layers.0.mlp.experts.gate.b3g64r2f3.packed"] == ("U8", (8, 128, 96))


def test_small_statements_of_the_document() -> None:
    text = DOC.read_text(encoding="utf-8")
    packed = pack_codes(torch.arange(8, dtype=torch.uint8), 3)
    assert f"are the bytes `{bytes(packed.tolist()).hex(' ')}`" in text
    assert f"bits         {' '.join(map(str, BITS))}\n" in text
    assert f"group_size   {' '.join(map(str, GROUP_SIZES))}\n" in text
    assert f"factor_bits  {' '.join(map(str, FACTOR_BITS))}\n" in text
    assert "PROJECTION `gate`, `up` or `down`" in text
    assert PROJECTIONS == ("gate", "up", "down")
    for part in WeightSpec(bits=3, rank=2, factor_bits=3).parts(64, 64) | WeightSpec(
        bits=3, rank=2, factor_bits=16
    ).parts(64, 64):
        assert f"`{part}`" in text
