# SPDX-License-Identifier: Apache-2.0
"""The reader gives what the files hold, or an error that names the file."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import moepress
from moepress.checkpoint.fp8 import block_size, dequantize_blocks
from moepress.checkpoint.reader import CONFIG, INDEX, SINGLE, CheckpointReader
from moepress.errors import CheckpointError
from moepress.source import open_source
from tiny import edit_json, edit_tensors, read_all, tiny_checkpoint, write_shards

Tiny = Callable[..., Path]
Copy = Callable[[Path], Path]


def refuses(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words), CheckpointReader(folder):
        pass


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


# ---------------------------------------------------------------------------------------------- sound folders


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_is_read_as_it_is(tiny: Tiny, dtype: torch.dtype, shards: int) -> None:
    folder = tiny("olmoe", dtype=dtype, shards=shards)
    wanted = read_all(folder)
    with CheckpointReader(folder) as reader:
        assert len(reader.files) > 1 if shards > 1 else reader.files == [SINGLE]
        assert set(reader.tensors) == set(wanted)
        for name, tensor in wanted.items():
            info, found = reader.tensors[name], reader.load_float(name)
            assert (info.shape, found.dtype, info.num_bytes) == (tuple(tensor.shape), dtype, tensor.nbytes)
            assert torch.equal(found, tensor)


def test_one_index_of_a_stacked_tensor_can_be_read_alone(tiny: Tiny) -> None:
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    wanted = read_all(tiny("granitemoe"))[name]
    with CheckpointReader(tiny("granitemoe")) as reader:
        for expert in range(4):
            assert torch.equal(reader.load(name, expert), wanted[expert])


def test_shards_may_be_links_as_in_the_hub_cache(tiny: Tiny, tmp_path: Path) -> None:
    source, folder, blobs = tiny("olmoe", shards=3), tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        (blobs / f"{i:064}").write_bytes(path.read_bytes())
        (folder / path.name).symlink_to(Path("../../blobs") / f"{i:064}")
    with open_source(folder) as linked, open_source(source) as plain:
        assert linked.digest == plain.digest
        assert linked.file_digests() == plain.file_digests()
        assert [p.name for p in linked.copied_files()] == [p.name for p in plain.copied_files()]
        assert all(torch.equal(linked.weight(ref), plain.weight(ref)) for ref in plain.graph.weights)


def test_other_files_beside_the_weights_do_no_harm(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    (folder / "model.safetensors").write_bytes(b"left over, and not in the index")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with CheckpointReader(folder) as reader:
        assert SINGLE not in reader.files


# ---------------------------------------------------------------------------------------------- FP8


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
def test_block_scales_multiply_each_element_of_their_block(n: int, k: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // rows), -(-k // columns), generator=generator) + 0.01
    found = dequantize_blocks("w", weight, scale, (rows, columns))
    wanted = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            wanted[i, j] = weight[i, j].float() * scale[i // rows, j // columns]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


def fp8_source(tiny: Tiny, folder: Path, **section: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """deepseek_v3 with every matrix of a layer in FP8, as the hub has it; the exact product of each."""
    base = tiny("deepseek_v3", moe_intermediate_size=160, hidden_size=192, intermediate_size=320)
    change: dict[str, torch.Tensor | None] = {}
    exact, generator = {}, torch.Generator().manual_seed(8)
    for name, tensor in read_all(base).items():
        if tensor.ndim == 2 and "_proj" in name:
            n, k = tensor.shape
            change[name] = codes = (tensor.float() * 100).to(torch.float8_e4m3fn)
            scale = torch.rand(-(-n // 128), -(-k // 128), generator=generator) * 0.01 + 0.001
            change[f"{name}_scale_inv"] = scale
            blocks = torch.kron(scale, torch.ones(128, 128))[:n, :k]
            exact[name] = (codes.float() * blocks).bfloat16()
    edit_tensors(base, folder, change)
    edit_json(
        folder / CONFIG,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]} | section,
    )
    return folder, exact


def test_an_fp8_source_reads_as_the_exact_product_ragged_edges_included(tiny: Tiny, tmp_path: Path) -> None:
    folder, exact = fp8_source(tiny, tmp_path / "fp8")
    assert any(t.shape[0] > 128 and t.shape[0] % 128 for t in exact.values())
    assert any(t.shape[1] > 128 and t.shape[1] % 128 for t in exact.values())
    with open_source(folder) as src:
        assert {ref.tensor for ref in src.graph.weights} == set(exact)
        assert sorted(src.graph.folded) == sorted(f"{name}_scale_inv" for name in exact)
        for ref in src.graph.weights:
            assert torch.equal(src.weight(ref), exact[ref.tensor]), ref.name


def test_an_fp8_source_is_compressed_and_loads(tiny: Tiny, tmp_path: Path) -> None:
    folder, exact = fp8_source(tiny, tmp_path / "fp8")
    moepress.compress_checkpoint(
        folder, tmp_path / "out", moepress.Settings(method="rtn", bits=8, group_size=32, keep=("attn.o",))
    )
    assert not moepress.verify_checkpoint(tmp_path / "out").problems
    stored = read_all(tmp_path / "out")
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    kept = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(stored[kept], exact[kept]), "a kept FP8 matrix is stored as its bfloat16 product"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in exact.items():
        if name.endswith("kv_b_proj.weight"):
            found = model.get_submodule(name.removesuffix(".weight")).dequantize()
            assert (found - weight.float()).norm() < 0.01 * weight.float().norm(), name


def test_fp8_without_its_scale_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder, exact = fp8_source(tiny, tmp_path / "fp8")
    name = sorted(exact)[0]
    edit_tensors(folder, tmp_path / "damaged", {f"{name}_scale_inv": None})
    with (
        CheckpointReader(tmp_path / "damaged") as reader,
        pytest.raises(CheckpointError, match=f"{name}_scale_inv is"),
    ):
        reader.load_float(name)


def test_scales_of_another_shape_are_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder, exact = fp8_source(tiny, tmp_path / "fp8", weight_block_size=[64, 128])
    name = next(n for n, t in exact.items() if t.shape[0] > 64)
    with (
        CheckpointReader(folder) as reader,
        pytest.raises(CheckpointError, match=r"_scale_inv has shape.*\(64, 128\)"),
    ):
        reader.load_float(name)


@pytest.mark.parametrize("size", [0, [128], [128, 0], [128, -1], ["128", "128"], {"a": 1}, [1.5, 2.0], "128"])
def test_a_block_size_that_is_none_is_an_error(tiny: Tiny, copy_of: Copy, size: Any) -> None:
    folder = copy_of(tiny("olmoe"))
    edit_json(folder / CONFIG, quantization_config={"quant_method": "fp8", "weight_block_size": size})
    refuses(folder, "weight_block_size")


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {"quant_method": "fp8"}}]
)
def test_the_block_size_is_128_where_nothing_is_said(config: dict[str, Any]) -> None:
    assert block_size(config) == (128, 128)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 4)])
def test_fp8_tensors_that_are_no_matrices_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="odd is FP8 with shape"):
        dequantize_blocks("odd", torch.zeros(shape).to(torch.float8_e4m3fn), torch.ones(1, 1), (128, 128))


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "x\0y"])
def test_an_index_must_not_name_files_outside_the_folder(tiny: Tiny, copy_of: Copy, file: str) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][sorted(index["weight_map"])[0]] = file
    (folder / INDEX).write_text(json.dumps(index))
    refuses(folder, rf"{re.escape(INDEX)} names {re.escape(repr(file))}, which is outside")


def test_a_missing_shard_is_named(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    gone = first_shard(folder)
    gone.unlink()
    refuses(folder, rf"{gone.name} is missing although the index names it")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
def test_a_truncated_shard_is_named(tiny: Tiny, copy_of: Copy, keep: float) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    shard = first_shard(folder)
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refuses(folder, rf"{shard.name} is truncated or damaged")


def with_header(folder: Path, header: bytes, length: int | None = None) -> Path:
    data = (folder / SINGLE).read_bytes()
    old = struct.unpack("<Q", data[:8])[0]
    size = len(header) if length is None else length
    (folder / SINGLE).write_bytes(struct.pack("<Q", size) + header + data[8 + old :])
    return folder


@pytest.mark.parametrize("header", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}', b'{"a": {"dtype": "F16"}}',
    b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 2]}}',
    b'{"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}}',
    b'{"a": {"dtype": "F16", "shape": [9000000000000000000, 4], "data_offsets": [0, 2]}}',
    b'{"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 0]}}',
    b'{"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 99999999999]}}',
    b"[" * 100_000,
])  # fmt: skip
def test_a_damaged_header_is_an_error_that_names_the_file(tiny: Tiny, copy_of: Copy, header: bytes) -> None:
    refuses(with_header(copy_of(tiny("olmoe")), header), r"model\.safetensors is truncated or damaged")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 100_000_001, 0, 1])
def test_a_header_of_an_impossible_length_is_an_error(tiny: Tiny, copy_of: Copy, length: int) -> None:
    refuses(
        with_header(copy_of(tiny("olmoe")), b"{}      ", length),
        r"model\.safetensors is truncated or damaged",
    )


def test_a_tensor_in_two_files_is_named_with_both(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    own = {name: tensor for name, tensor in read_all(folder).items() if weight_map[name] == second}
    save_file(own | {"model.norm.weight": torch.zeros(64)}, folder / second)
    holder = weight_map["model.norm.weight"]
    files = sorted({holder, second})
    if len(files) == 1:
        save_file({"model.norm.weight": torch.zeros(64)}, folder / first)
        files = sorted({first, holder})
    refuses(folder, rf"tensor model\.norm\.weight is in two files, {files[0]} and {files[1]}")


def test_an_index_that_names_another_file_is_an_error(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    (folder / INDEX).write_text(json.dumps(index))
    refuses(folder, rf"{re.escape(INDEX)} says tensor model\.norm\.weight is in")


def test_an_index_with_a_tensor_that_no_file_holds_is_an_error(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.ghost"] = first_shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))
    refuses(folder, "says tensor model.ghost is in .* but no file holds it")


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{", "", '{"weight_map": {}}']
)
def test_an_index_that_is_none_is_an_error(tiny: Tiny, copy_of: Copy, text: str) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    (folder / INDEX).write_text(text)
    refuses(folder, "holds no tensors" if text == '{"weight_map": {}}' else re.escape(INDEX))


@pytest.mark.parametrize(("text", "words"), [
    (b"{", "not readable JSON"), (b"", "not readable JSON"), (b"\xff\xfe\x00", "not readable JSON"),
    (b"[1]", "holds a list"), (b"5", "holds a int"), (b"null", "holds a NoneType"), (b"[" * 100_000, "not readable"),
    (b'{"a": ' + b"1" * 5000 + b"}", "not readable"),
])  # fmt: skip
def test_a_config_that_is_no_json_object_is_an_error(tiny: Tiny, copy_of: Copy, text: bytes, words: str) -> None:
    folder = copy_of(tiny("olmoe"))
    (folder / CONFIG).write_bytes(text)
    refuses(folder, rf"config\.json.*{words}")


def test_folders_without_safetensors_say_what_was_found(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe"))
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refuses(folder, r"found pytorch_model\.bin\); moepress reads safetensors only")
    (folder / "pytorch_model.bin").unlink()
    refuses(folder, "found no weights at all")
    (folder / CONFIG).unlink()
    refuses(folder, r"config\.json is missing")
    refuses(folder / "nowhere", "nowhere is not a folder")
    refuses(folder / "LICENSE", "LICENSE is not a folder")


@pytest.mark.parametrize("name", [SINGLE, CONFIG])
def test_a_folder_in_a_files_place_is_an_error(tiny: Tiny, copy_of: Copy, name: str) -> None:
    folder = copy_of(tiny("olmoe"))
    (folder / name).unlink()
    (folder / name).mkdir()
    refuses(folder, re.escape(name))


def test_a_dangling_link_is_an_error(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe", shards=3))
    shard = first_shard(folder)
    shard.unlink()
    shard.symlink_to("gone")
    refuses(folder, rf"{shard.name} is missing")


def test_a_reader_that_failed_or_was_closed_holds_no_file_open(tiny: Tiny, copy_of: Copy) -> None:
    def mapped(folder: Path) -> bool:
        return str(folder) in Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc to see which files are mapped")
    good, bad = (
        copy_of(tiny("olmoe", shards=3)),
        tiny_checkpoint(tiny("olmoe").parent / "bad", "olmoe", shards=3),
    )
    sorted(bad.glob("*.safetensors"))[-1].write_bytes(b"damaged")
    with CheckpointReader(good):
        assert mapped(good)
    assert not mapped(good)
    refuses(bad, "damaged")
    assert not mapped(bad)


def test_the_helper_writes_shards_that_can_be_read(tiny: Tiny, copy_of: Copy) -> None:
    folder = copy_of(tiny("olmoe"))
    wanted = read_all(folder)
    write_shards(folder, wanted, 4)
    with CheckpointReader(folder) as reader:
        assert len(reader.files) == 4
        assert all(torch.equal(reader.load(name), tensor) for name, tensor in wanted.items())
