# SPDX-License-Identifier: Apache-2.0
"""transformers loads compressed folders: the logits are those of the source with dequantised weights in it.

The reference shares no code with the runtime: the source model is loaded by transformers alone, and every compressed
weight in it is overwritten by what `dequantize` makes of the stored tensors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import moepress
from moepress.checkpoint.reader import CheckpointReader
from moepress.errors import CheckpointError
from moepress.format.manifest import BankEntry, Manifest
from moepress.format.spec import PROJECTIONS, WeightSpec
from moepress.format.weight import dequantize
from moepress.hf import EXPERTS_GUARD
from moepress.runtime.experts import ExpertBank
from moepress.runtime.linear import CompressedLinear
from moepress.runtime.stored import StoredParts
from moepress.source import open_source
from moepress.verify import load_parts
from tiny import EXPERTS, NATIVE, edit_json, edit_tensors, read_all, tiny_checkpoint, tokens

Pressed = Callable[[str, str], tuple[Path, Path]]
CLOSE = 1e-5
RECIPES = ("hqq", "milo", "mixed")
EXPERT_SPECS = tuple(
    WeightSpec(bits=bits, group_size=32, rank=rank, factor_bits=factor_bits)
    for bits, rank, factor_bits in [(1, 16, 8), (2, 5, 3), (3, 0, 0), (4, 1, 16)]
)
"""One expert of each width side by side, with every kind of compensator and with none."""


def compress(source: Path, target: Path, family: str, recipe: str) -> None:
    # the latent families have an input dimension of 32
    group_size = 32 if family.startswith("deepseek") else 64
    if recipe == "hqq":
        moepress.compress_checkpoint(source, target, moepress.Settings(method="hqq", bits=3, group_size=group_size))
        return
    settings = moepress.Settings(
        method="milo", bits=3, group_size=group_size, ranks="dense-8+sparse-2", iterations=1, factor_bits=3
    )
    if recipe == "milo":
        moepress.compress_checkpoint(source, target, settings)
        return
    plan = mixed_plan(source, settings)
    moepress.compress_checkpoint(source, target, plan=plan)


def mixed_plan(source: Path, settings: moepress.Settings) -> moepress.Plan:
    """Every expert another spec, gate and up another than down, and the other weights in 2, 4, 5, 6 and 8 bits."""
    widths = iter([2, 4, 5, 6, 8] * 99)
    with open_source(source) as src:
        chosen = {}
        for ref in src.graph.weights:
            if ref.expert is None:
                chosen[ref.name] = WeightSpec(bits=next(widths), group_size=32, rank=3, factor_bits=4)
            else:
                shift = 1 if ref.projection == "down" else 0
                chosen[ref.name] = EXPERT_SPECS[(ref.expert + shift) % EXPERTS]
    plan = replace(moepress.plan_checkpoint(source, settings), weights=chosen)
    return moepress.Plan.from_json(plan.to_json())


@pytest.fixture(scope="session")
def folders(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Pressed:
    """folders(family, recipe) -> source and target, made once. Never write into them."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, recipe: str) -> tuple[Path, Path]:
        if (family, recipe) not in made:
            target = tmp_path_factory.mktemp(f"{family}-{recipe}") / "target"
            compress(tiny(family), target, family, recipe)
            made[family, recipe] = target
        return tiny(family), made[family, recipe]

    return get


def load(folder: Path, dtype: torch.dtype = torch.float32, cls: Any = AutoModelForCausalLM) -> Any:
    return cls.from_pretrained(folder, dtype=dtype)


def reference(source: Path, target: Path, cls: Any = AutoModelForCausalLM) -> Any:
    """The source model with every compressed weight replaced by its dequantised self."""
    model = load(source, cls=cls)
    prefix = "" if hasattr(model, "model") else "model."
    with open_source(source) as src, CheckpointReader(target) as reader, torch.no_grad():
        manifest = Manifest.from_config(reader.config["quantization_config"])
        for ref in src.graph.weights:
            if ref.bank is None and ref.module not in manifest.linears:
                continue
            if ref.bank is not None and ref.bank not in manifest.banks:
                continue
            entry = manifest.linears[ref.module] if ref.bank is None else manifest.banks[ref.bank]
            spec = entry.specs(ref.projection)[ref.expert] if isinstance(entry, BankEntry) else entry.spec
            weight = dequantize(load_parts(reader, manifest, ref), spec, *ref.shape)
            module = model.get_submodule(src.graph.family.module_name(ref.bank or ref.module).removeprefix(prefix))
            place(module, ref, weight)
    return model


def place(module: torch.nn.Module, ref: Any, weight: torch.Tensor) -> None:
    if ref.expert is None:
        module.weight.copy_(weight)
    elif ref.projection == "down":
        module.down_proj[ref.expert].copy_(weight)
    else:
        half = module.gate_up_proj.shape[1] // 2
        rows = slice(0, half) if ref.projection == "gate" else slice(half, None)
        module.gate_up_proj[ref.expert, rows].copy_(weight)


def difference(model: Any, other: Any) -> float:
    """Relative error of the logits, or of the last hidden states of a base model."""
    with torch.no_grad():
        a, b = model(tokens())[0], other(tokens())[0]
    return ((a - b).norm() / b.norm()).item()


def names_and_bytes(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in read_all(folder).items()
    }


# ---------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", NATIVE)
def test_logits_are_those_of_the_dequantised_source(folders: Pressed, family: str, recipe: str) -> None:
    source, target = folders(family, recipe)
    model = load(target)
    assert difference(model, reference(source, target)) < CLOSE
    # the reference does differ from the source, or the comparison would prove nothing
    assert difference(model, load(source)) > 0.01


@pytest.mark.parametrize("family", NATIVE)
def test_the_mixed_recipe_is_as_mixed_as_it_says(folders: Pressed, family: str) -> None:
    banks = [m for m in load(folders(family, "mixed")[1]).modules() if isinstance(m, ExpertBank)]
    assert banks
    for bank in banks:
        assert set(bank.gate) == set(bank.up) == set(bank.down) == {spec.tag for spec in EXPERT_SPECS}
        assert bank.gate.where != bank.down.where


@pytest.mark.parametrize("family", NATIVE)
def test_every_weight_of_the_graph_became_a_compressed_module(folders: Pressed, family: str) -> None:
    source, target = folders(family, "milo")
    model = load(target)
    with open_source(source) as src:
        linears = {src.graph.family.module_name(ref.module) for ref in src.graph.weights if ref.bank is None}
        banks = {src.graph.family.module_name(ref.bank) for ref in src.graph.weights if ref.bank is not None}
    assert {n for n, m in model.named_modules() if isinstance(m, CompressedLinear)} == linears
    assert {n for n, m in model.named_modules() if isinstance(m, ExpertBank)} == banks
    plain = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n.endswith("_proj")]
    assert not plain


@pytest.mark.parametrize("family", NATIVE)
def test_the_base_model_loads_without_the_head(folders: Pressed, family: str) -> None:
    source, target = folders(family, "milo")
    model = load(target, cls=AutoModel)
    assert any(isinstance(m, ExpertBank) for m in model.modules())
    assert difference(model, reference(source, target, AutoModel)) < CLOSE


@pytest.mark.parametrize("family", NATIVE)
def test_generate_gives_the_tokens_of_the_reference(folders: Pressed, family: str) -> None:
    source, target = folders(family, "mixed")
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model, other = load(target), reference(source, target)
    found = model.generate(tokens(), attention_mask=torch.ones_like(tokens()), **arguments)
    assert found.shape == (2, 17)
    assert torch.equal(found, other.generate(tokens(), attention_mask=torch.ones_like(tokens()), **arguments))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "granitemoe", tie_word_embeddings=True)
    assert "lm_head.weight" not in read_all(source)
    compress(source, tmp_path / "target", "granitemoe", "milo")
    model = load(tmp_path / "target")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(model, reference(source, tmp_path / "target")) < CLOSE
    model = load(tmp_path / "target", torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    assert names_and_bytes(tmp_path / "again") == names_and_bytes(tmp_path / "target")


@pytest.mark.parametrize("keep", [
    ("expert",), ("attn",), ("shared", "mlp"), ("*layers.1.*expert*",), ("*layers.0.*",),
    ("*.q_proj.weight", "attn.q_b"),
])  # fmt: skip
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "glm4_moe", "granitemoe"])
def test_kept_weights_load_beside_compressed_ones(
    tiny: Callable[..., Path], tmp_path: Path, family: str, keep: tuple[str, ...]
) -> None:
    with open_source(tiny(family)) as src:
        groups = {ref.group for ref in src.graph.weights} | {ref.role for ref in src.graph.weights}
        names = [ref.name for ref in src.graph.weights]
    keep = tuple(
        k for k in keep if k in groups or any(Path(name).match(k) for name in names)
    )  # a pattern that matches nothing is refused, see test_bad_input
    if not keep:
        pytest.skip(f"{family} has no weights of these roles")
    target = tmp_path / "target"
    settings = moepress.Settings(ranks="dense-8+sparse-2", group_size=32, iterations=0, keep=keep)
    moepress.compress_checkpoint(tiny(family), target, settings)
    model = load(target)
    assert difference(model, reference(tiny(family), target)) < CLOSE
    assert difference(model, load(tiny(family))) > 1e-3
    stored, original = read_all(target), read_all(tiny(family))
    with open_source(tiny(family)) as src:
        plan = moepress.plan_checkpoint(tiny(family), settings).weights
        whole = {ref.tensor for ref in src.graph.weights if plan[ref.name] is None} | {t.name for t in src.graph.kept}
    assert whole == set(original) & set(stored)
    assert all(torch.equal(stored[name], original[name]) for name in whole)
    model.save_pretrained(tmp_path / "again")
    # loaded as float32, so kept tensors come back as float32
    again = read_all(tmp_path / "again")
    assert set(again) == set(stored)
    assert all(torch.equal(again[name].to(tensor.dtype), tensor) for name, tensor in stored.items())
    assert difference(load(tmp_path / "again"), model) == 0


# ---------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("family", NATIVE)
def test_saving_gives_the_same_tensors_and_a_guarded_config(folders: Pressed, tmp_path: Path, family: str) -> None:
    _, target = folders(family, "mixed")
    model = load(target, torch.bfloat16)
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert names_and_bytes(tmp_path / "again") == names_and_bytes(target)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", target))
    assert config["experts_implementation"] == EXPERTS_GUARD == before["experts_implementation"]
    assert config["quantization_config"] == before["quantization_config"]
    again = load(tmp_path / "again", torch.bfloat16)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    again.save_pretrained(tmp_path / "third")
    assert names_and_bytes(tmp_path / "third") == names_and_bytes(target)


PLAIN = """
    import json, sys
    from transformers import AutoModel, AutoModelForCausalLM
    said = {}
    for folder in sys.argv[1:]:
        for cls in (AutoModelForCausalLM, AutoModel):
            try:
                cls.from_pretrained(folder)
                said[folder + cls.__name__] = "loaded"
            except Exception as error:
                said[folder + cls.__name__] = f"{type(error).__name__}: {error}"
    assert not any(name.startswith("moepress") for name in sys.modules)
    print(json.dumps(said))
"""


def test_without_moepress_transformers_refuses_and_says_what_to_install(folders: Pressed, tmp_path: Path) -> None:
    paths = []
    for family in ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe"):
        target = folders(family, "hqq")[1]
        load(target).save_pretrained(tmp_path / family)
        paths += [str(target), str(tmp_path / family)]
    command = [sys.executable, "-c", textwrap.dedent(PLAIN), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 2 * len(paths)
    assert {k: v for k, v in said.items() if "pip install moepress" not in v} == {}


# ---------------------------------------------------------------------------------------------- dtypes


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor.clone()
        for name, module in model.named_modules() if isinstance(module, StoredParts)
        for part, tensor in module.parts().items()
    }  # fmt: skip


def test_scales_keep_fp16_whatever_dtype_the_model_has(folders: Pressed) -> None:
    _, target = folders("qwen2_moe", "mixed")
    exact = stored_tensors(load(target))
    assert {tensor.dtype for tensor in exact.values()} == {torch.uint8, torch.float16}
    model = load(target, torch.bfloat16)
    whole = [load(target, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    variants = [*whole, load(target).bfloat16(), load(target).double()]
    # transformers forbids half() on a quantised model as a whole, not on its parts
    variants[-1].model.layers.half()
    for variant in variants:
        found = stored_tensors(variant)
        assert found.keys() == exact.keys()
        assert all(t.dtype == exact[n].dtype and torch.equal(t, exact[n]) for n, t in found.items())
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert model(tokens()).logits.dtype == torch.bfloat16
    assert load(target).bfloat16()(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_costs_no_more_than_it_costs_plain_modules(folders: Pressed, recipe: str) -> None:
    source, target = folders("granitemoe", recipe)
    truth = reference(source, target)
    honest = difference(reference(source, target).bfloat16(), truth)
    assert 1e-4 < honest < 0.1
    assert difference(load(target, torch.bfloat16), truth) <= 2 * honest


# ---------------------------------------------------------------------------------------------- damage


def damaged(target: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    return edit_tensors(target, folder, change)


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj.scale", "model.layers.1.mlp.experts.up.b3g64r2f3.v_packed",
    "model.norm.weight", "model.layers.0.self_attn.k_proj.bias", "lm_head.weight",
])  # fmt: skip
def test_a_missing_tensor_is_named(folders: Pressed, tmp_path: Path, name: str) -> None:
    folder = damaged(folders("qwen2_moe", "milo")[1], tmp_path / "damaged", {name: None})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize(("family", "name"), [
    ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ("granitemoe", "model.layers.1.block_sparse_moe.router.layer.weight"),
    ("granitemoe", "model.layers.1.block_sparse_moe.output_linear.weight"),
])  # fmt: skip
def test_a_tensor_missing_from_a_kept_block_is_named(
    tiny: Callable[..., Path], tmp_path: Path, family: str, name: str
) -> None:
    settings = moepress.Settings(method="rtn", group_size=32, keep=("expert",))
    moepress.compress_checkpoint(tiny(family), tmp_path / "target", settings)
    folder = damaged(tmp_path / "target", tmp_path / "damaged", {name: None})
    with pytest.raises(CheckpointError, match=r"layers\.1\..*"):
        load(folder)


@pytest.mark.parametrize(("name", "value"), [
    ("model.layers.0.self_attn.q_proj.scale", torch.zeros(64, 2, dtype=torch.float16)),
    ("model.layers.0.self_attn.q_proj.scale", torch.zeros(64, 1, dtype=torch.bfloat16)),
    ("model.layers.1.mlp.experts.up.b3g64r2f3.zero", torch.zeros(3, 64, 1, dtype=torch.float16)),
    ("model.layers.1.mlp.experts.down.b3g64r2f3.packed", torch.zeros(EXPERTS, 64, 23, dtype=torch.uint8)),
    ("model.norm.weight", torch.zeros(63, dtype=torch.bfloat16)),
    ("model.layers.0.self_attn.k_proj.bias", torch.zeros(2, 16, dtype=torch.bfloat16)),
    ("lm_head.weight", torch.zeros(95, 64, dtype=torch.bfloat16)),
    ("model.layers.1.mlp.gate.weight", torch.zeros(EXPERTS, 65, dtype=torch.bfloat16)),
])  # fmt: skip
def test_a_tensor_of_another_shape_or_dtype_is_named(
    folders: Pressed, tmp_path: Path, name: str, value: torch.Tensor
) -> None:
    folder = damaged(folders("qwen2_moe", "milo")[1], tmp_path / "damaged", {name: value})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.0.gate_proj.weight",
    "model.layers.1.mlp.experts.up.b4g64.packed", "model.layers.0.odd", "odd.weight",
])  # fmt: skip
def test_an_unclaimed_tensor_is_named(folders: Pressed, tmp_path: Path, name: str) -> None:
    folder = damaged(folders("qwen2_moe", "milo")[1], tmp_path / "damaged", {name: torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize(("values", "words"), [
    ({"moe_intermediate_size": 96}, r"model\.layers\.1\.mlp\.experts.*96.*64"),
    ({"num_experts": 5}, r"model\.layers\.1\.mlp\.experts.*\(5, .*\(4, "),
    ({"shared_expert_intermediate_size": 64}, r"shared_expert\..*_proj is \(64, 64\).*\((96, 64|64, 96)\)"),
    ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, r"layers\.2\."),
    ({"vocab_size": 97}, r"model\.embed_tokens\.weight|lm_head\.weight"),
])  # fmt: skip
def test_a_config_of_another_model_is_refused(
    folders: Pressed, copy_of: Callable[[Path], Path], values: dict[str, Any], words: str
) -> None:
    folder = copy_of(folders("qwen2_moe", "milo")[1])
    edit_json(folder / "config.json", **values)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_a_loaded_model_cannot_be_compressed_on_the_fly(tiny: Callable[..., Path], folders: Pressed) -> None:
    config = json.loads((folders("olmoe", "hqq")[1] / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match="moepress compress"):
        AutoModelForCausalLM.from_pretrained(tiny("olmoe"), quantization_config=moepress_config(config))


def moepress_config(config: dict[str, Any]) -> Any:
    from moepress.hf import MoepressConfig

    return MoepressConfig(**config)


# ---------------------------------------------------------------------------------------------- experts


def bank_with(folder: Path) -> tuple[ExpertBank, list[dict[str, torch.Tensor]]]:
    bank = next(m for m in load(folder).modules() if isinstance(m, ExpertBank))
    dense = [{p: getattr(bank, p).dequantize(e) for p in PROJECTIONS} for e in range(bank.num_experts)]
    return bank, dense


def by_hand(
    bank: ExpertBank,
    dense: list[dict[str, torch.Tensor]],
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    y = torch.zeros_like(x, dtype=torch.float64)
    for token, row in enumerate(ids.tolist()):
        for choice, expert in enumerate(row):
            if 0 <= expert < bank.num_experts:
                gate, up, down = (dense[expert][p].double() for p in PROJECTIONS)
                h = x[token].double()
                y[token] += weights[token, choice].double() * (down @ (bank.act_fn(gate @ h) * (up @ h)))
    return y.float()


@pytest.mark.parametrize("ids", [
    [[0, 1], [2, 3], [1, 0]],
    [[0, -1], [-1, -1], [-1, 3]],
    [[-1, -1], [-1, -1], [-1, -1]],
    [[2, 2], [2, 2], [2, 2]],
    [[0, 4], [4, 4], [3, -1]],
])  # fmt: skip
def test_experts_outside_the_bank_are_skipped(folders: Pressed, ids: list[list[int]]) -> None:
    bank, dense = bank_with(folders("olmoe", "mixed")[1])
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(3, 64, generator=generator), torch.rand(3, 2, generator=generator)
    index = torch.tensor(ids)
    found, wanted = bank(x, index, weights), by_hand(bank, dense, x, index, weights)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-4 * max(1.0, wanted.abs().max().item())


def test_no_token_at_all(folders: Pressed) -> None:
    bank, _ = bank_with(folders("olmoe", "mixed")[1])
    assert bank(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 64)


def test_a_bank_can_be_called_expert_by_expert(folders: Pressed) -> None:
    bank, dense = bank_with(folders("olmoe", "mixed")[1])
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    assert len(bank) == EXPERTS
    for expert in range(EXPERTS):
        wanted = by_hand(bank, dense, x, torch.full((2, 1), expert), torch.ones(2, 1))
        assert (bank[expert](x) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    with pytest.raises(IndexError):
        bank[EXPERTS]
