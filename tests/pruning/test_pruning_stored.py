# SPDX-License-Identifier: Apache-2.0
"""Rules on disk: published beside a checkpoint, loaded with it, saved again, switched off, refused where unsound."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import moepress
from moepress.checkpoint.side import sha256
from moepress.errors import CheckpointError, PruningError, WriteError
from moepress.evaluate.load import load_model
from moepress.evaluate.sizes import folder_sizes
from moepress.format.manifest import EXPERTS_GUARD
from moepress.pruning import stored
from moepress.pruning.attach import attach, detach, disabled, is_pruned, rules_of
from moepress.pruning.baselines import Chance, Odp, Threshold
from moepress.pruning.rule import Rule
from moepress.pruning.selector import Selector
from moepress.pruning.sites import moe_sites
from moepress.pruning.stored import FILE, KINDS, PRUNING, Stored, publish_pruned
from tiny import EXPERTS, NATIVE, edit_json, fingerprint, left_behind, read_all, tokens

MU = 0.6


def load(folder: Path, cls: Any = AutoModelForCausalLM, **arguments: Any) -> Any:
    return cls.from_pretrained(folder, dtype=torch.float32, **arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens())[0]


def thresholds(model: Any) -> dict[str, Rule]:
    """A threshold of its own for each layer."""
    return {site.name: Threshold(MU + 0.1 * number) for number, site in enumerate(moe_sites(model))}


@pytest.fixture(scope="module")
def sources(tiny: Callable[..., Path], pressed: Callable[..., Path]) -> Callable[[str, bool], Path]:
    """sources(family, compressed) -> a folder without rules. Never write into it."""
    return lambda family, compressed: pressed(family, method="rtn", group_size=32) if compressed else tiny(family)


@pytest.fixture(scope="module")
def pruned(
    sources: Callable[[str, bool], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], Path]:
    """pruned(family, compressed) -> that folder with thresholds. Never write into it."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str, compressed: bool) -> Path:
        if (family, compressed) not in made:
            source = sources(family, compressed)
            made[family, compressed] = target = tmp_path_factory.mktemp(family) / "pruned"
            publish_pruned(source, target, thresholds(load(source)))
        return made[family, compressed]

    return get


Folders = Callable[[str, bool], Path]
BOTH = pytest.mark.parametrize("compressed", [False, True])


# ---------------------------------------------------------------------------------------------- loading


@BOTH
@pytest.mark.parametrize("family", NATIVE)
def test_a_pruned_folder_loads(sources: Folders, pruned: Folders, family: str, compressed: bool) -> None:
    plain = load(sources(family, compressed), **({} if compressed else {"experts_implementation": "eager"}))
    whole, rules = logits(plain), thresholds(plain)
    model = load(pruned(family, compressed))
    assert is_pruned(model) and not torch.equal(logits(model), whole)
    attach(plain, list(rules.values()))
    assert torch.equal(logits(model), logits(plain))
    with disabled(model):
        assert torch.equal(logits(model), whole)
    off = load(pruned(family, compressed), pruning=False)
    assert not is_pruned(off) and torch.equal(logits(off), whole)
    assert is_pruned(load(pruned(family, compressed), pruning=True))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_base_model_is_pruned_too(pruned: Folders, family: str) -> None:
    model, whole = load(pruned(family, True), AutoModel), load(pruned(family, True), AutoModel, pruning=False)
    assert len(rules_of(model)) == len(moe_sites(model)) and not torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rules_keep_float32_in_a_model_of_another_dtype(sources: Folders, tmp_path: Path, dtype: torch.dtype) -> None:
    plain = load(sources("mixtral", True))
    makers = (selector, lambda: Odp(MU, 0.5), lambda: Threshold(MU), lambda: Chance(64, 2, 0.3, seed=1))
    for number, make in enumerate(makers):
        rules = {site.name: make() for site in moe_sites(plain)}
        publish_pruned(sources("mixtral", True), tmp_path / str(number), rules)
        folder = tmp_path / str(number)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        for found, wanted in zip(rules_of(model), rules.values(), strict=True):
            own, others = ({**dict(rule.named_parameters()), **dict(rule.named_buffers())} for rule in (found, wanted))
            assert own.keys() == others.keys() and {tensor.dtype for tensor in own.values()} == {torch.float32}
            assert all(torch.equal(tensor, others[name]) for name, tensor in own.items())
        assert torch.isfinite(logits(model)).all()


def test_the_loader_of_the_command_line(pruned: Folders, sources: Folders) -> None:
    folder = shutil.copytree(pruned("mixtral", True), pruned("mixtral", True).parent / "with-tokenizer")
    demo = Path(moepress.__file__).parent / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, folder / name)
    assert is_pruned(load_model(folder, torch.device("cpu"))[0])
    assert not is_pruned(load_model(folder, torch.device("cpu"), pruning=False)[0])
    assert not is_pruned(load_model(demo, torch.device("cpu"), pruning=False)[0])


def selector() -> Selector:
    made, generator = Selector(64, EXPERTS, projections=3), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize(
    "rule", [selector(), Threshold(0.25), Odp(0.5, 0.125), Chance(64, 2, 0.25, True, 7)], ids=lambda rule: rule.kind
)
def test_every_kind_comes_back_as_it_was(sources: Folders, tmp_path: Path, rule: Rule) -> None:
    source = sources("mixtral", True)
    rule.dial.fill_(0.125)
    rule.renormalises = {"selector": False, "threshold": True}.get(rule.kind)
    publish_pruned(source, tmp_path / "target", {site.name: rule for site in moe_sites(load(source))})
    for found in rules_of(load(tmp_path / "target")):
        assert type(found) is type(rule) and found.settings() == rule.settings()
        assert found.renormalises is rule.renormalises
        assert found.state_dict().keys() == rule.state_dict().keys() >= {"dial"}
        assert all(torch.equal(value, rule.state_dict()[key]) for key, value in found.state_dict().items())
        routed = torch.randn(50, 64), torch.randint(EXPERTS, (50, 2)), torch.rand(50, 2)
        if not isinstance(rule, Odp):  # which needs attention maps
            assert torch.equal(found(*routed), rule(*routed))
    assert KINDS[rule.kind] is type(rule) and len(KINDS) == 4


def test_loading_draws_no_random_number(pruned: Folders) -> None:
    before = torch.get_rng_state()
    load(pruned("mixtral", True))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------- publishing


@BOTH
def test_what_is_published(sources: Folders, pruned: Folders, compressed: bool) -> None:
    source, target = sources("qwen2_moe", compressed), pruned("qwen2_moe", compressed)
    before, after = fingerprint(source), fingerprint(target)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"config.json", FILE} | ({"moepress.json"} if compressed else set())
    assert os.path.samefile(source / "model.safetensors", target / "model.safetensors")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert new.keys() - old.keys() == {PRUNING} | (
        set() if compressed else {"quantization_config", "experts_implementation"}
    )
    assert {key: new[key] for key in old} == old and new["experts_implementation"] == EXPERTS_GUARD
    entry = new[PRUNING]
    assert entry["pruning_version"] == 1 and entry["sha256"] == sha256((target / FILE).read_bytes())
    layers = ["model.layers.1.mlp.experts"]
    assert entry["rules"] == [{"kind": "threshold", "settings": {}, "renormalises": None, "layers": layers}]
    assert set(load_file(target / FILE)) == {f"model.layers.1.mlp.experts.{name}" for name in ("mu", "dial")}
    assert (target.stat().st_mode, left_behind(target)) == (source.stat().st_mode, [target.name])
    if compressed:
        assert moepress.verify_checkpoint(target, None).problems == ()


def test_verify_sees_damaged_rules(pruned: Folders, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(pruned("mixtral", True))
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1] + b"\x01")
    assert moepress.verify_checkpoint(folder).problems[0].startswith(f"{FILE} has changed")


def test_rules_count_in_the_sizes(sources: Folders, pruned: Folders) -> None:
    small, large = (
        folder_sizes(folder, load(folder)) for folder in (sources("mixtral", True), pruned("mixtral", True))
    )
    assert large["stored_bytes"] - small["stored_bytes"] == (pruned("mixtral", True) / FILE).stat().st_size
    assert large["resident_bytes"] - small["resident_bytes"] == 2 * 2 * 4  # mu and dial of two layers
    assert large["compressed_bpw"] == small["compressed_bpw"]


@BOTH
def test_rules_are_replaced(pruned: Folders, tmp_path: Path, compressed: bool) -> None:
    source = pruned("olmoe", compressed)
    rules: dict[str, Rule] = {site.name: Chance(64, 2, 0.25) for site in moe_sites(load(source))}
    publish_pruned(source, tmp_path / "target", rules)
    assert {type(rule) for rule in rules_of(load(tmp_path / "target"))} == {Chance}
    assert {type(rule) for rule in rules_of(load(source))} == {Threshold}
    assert not compressed or not moepress.verify_checkpoint(tmp_path / "target").problems


def test_a_disk_without_hard_links_gets_copies(
    sources: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(stored.errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(stored.os, "link", refuse)
    source = sources("mixtral", True)
    publish_pruned(source, tmp_path / "target", thresholds(load(source)))
    assert not os.path.samefile(source / "model.safetensors", tmp_path / "target" / "model.safetensors")
    assert not moepress.verify_checkpoint(tmp_path / "target").problems


def test_nothing_half_written_is_left(sources: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources("mixtral", True)
    rules = thresholds(load(source))

    def fail(*_: Any) -> None:
        raise OSError(stored.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored.shutil, "copyfile", fail)
    with pytest.raises(WriteError, match="No space left"):
        publish_pruned(source, tmp_path / "target", rules)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_published(sources: Folders, tmp_path: Path, copy_of: Callable[[Path], Path]) -> None:
    source = sources("mixtral", True)
    rules = thresholds(load(source))
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists"):
        publish_pruned(source, tmp_path / "there", rules)

    class Own(Threshold):
        pass

    with pytest.raises(PruningError, match="a Own cannot be stored; known: selector, threshold,"):
        publish_pruned(source, tmp_path / "target", dict.fromkeys(rules, Own()))
    folder = copy_of(source)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="quantised with 'fp8'; compress it with moepress before"):
        publish_pruned(folder, tmp_path / "target", rules)
    edit_json(folder / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        publish_pruned(folder, tmp_path / "target", rules)
    assert not (tmp_path / "target").exists()


# ---------------------------------------------------------------------------------------------- saving


@BOTH
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe"])
def test_save_pretrained_keeps_the_rules(pruned: Folders, tmp_path: Path, family: str, compressed: bool) -> None:
    folder = pruned(family, compressed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again, before = read_all(tmp_path / "again"), read_all(folder)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)
    assert (tmp_path / "again" / FILE).read_bytes() == (folder / FILE).read_bytes()
    entries = [json.loads((each / "config.json").read_text())[PRUNING] for each in (tmp_path / "again", folder)]
    assert entries[0] == entries[1]
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(folder)))


def test_save_pretrained_stores_the_dial(pruned: Folders, tmp_path: Path) -> None:
    model = load(pruned("mixtral", True))
    moepress.set_pruning_dial(model, 0.25)
    model.save_pretrained(tmp_path / "again")
    assert [rule.dial.item() for rule in rules_of(load(tmp_path / "again"))] == [0.25, 0.25]


def test_save_pretrained_without_rules_keeps_none(pruned: Folders, tmp_path: Path) -> None:
    model, off = load(pruned("mixtral", True)), load(pruned("mixtral", True), pruning=False)
    detach(model)
    for number, each in enumerate((model, off)):
        folder = tmp_path / str(number)
        each.save_pretrained(folder)
        assert not (folder / FILE).exists() and not is_pruned(load(folder))
        assert torch.equal(logits(load(folder)), logits(off))
        with pytest.raises(CheckpointError, match="has no rules, so pruning cannot be switched on"):
            load(folder, pruning=True)


def test_saving_to_the_hub_goes_through_push_to_hub(pruned: Folders, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"use model\.push_to_hub"):
        load(pruned("mixtral", True)).save_pretrained(tmp_path / "again", push_to_hub=True)


# ---------------------------------------------------------------------------------------------- refusals


def damaged(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """`change` gets the config's entry and the file's tensors; the digest is made to fit."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / FILE)
    change(config[PRUNING], tensors)
    save_file(tensors, folder / FILE)
    config[PRUNING]["sha256"] = sha256((folder / FILE).read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BANK = "model.layers.1.block_sparse_moe.experts"


def drop(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    entry["rules"][0]["layers"].remove(BANK)
    for name in ("mu", "dial"):
        del tensors[f"{BANK}.{name}"]


@pytest.mark.parametrize(("change", "words"), [
    (lambda e, t: e.update(pruning_version=2), r"pruning_version is 2 and this moepress reads 1"),
    (lambda e, t: e.update(rules=[{"kind": "threshold"}]), "the entry 'pruning' of config.json is damaged"),
    (lambda e, t: e.update(rules=e["rules"] * 2), "has two rules"),
    (lambda e, t: e["rules"][0].update(kind="oracle"), "has a rule of kind 'oracle', which this moepress does not"),
    (lambda e, t: e["rules"][0].update(renormalises=1), "renormalises is 1"),
    (lambda e, t: e["rules"][0].update(settings={"nu": 1}), "a threshold cannot be made from {'nu': 1}"),
    (lambda e, t: t.pop(f"{BANK}.mu"), f"lacks {BANK}.mu"),
    (lambda e, t: t.update({f"{BANK}.mu": torch.zeros(2)}), rf"{BANK}.mu is torch.float32 \(2,\)"),
    (lambda e, t: t.update({f"{BANK}.mu": torch.zeros((), dtype=torch.float64)}), f"{BANK}.mu is torch.float64"),
    (lambda e, t: t.update(odd=torch.zeros(1)), "holds odd, which no rule"),
    (drop, "the rules are for 1 layers of experts and this model has 2"),
])  # fmt: skip
def test_unsound_rules_are_refused(
    pruned: Folders, copy_of: Callable[[Path], Path], change: Callable[..., None], words: str
) -> None:
    folder = damaged(copy_of(pruned("mixtral", True)), change)
    with pytest.raises(CheckpointError, match=words):
        load(folder)
    assert not is_pruned(load(folder, pruning=False))


@pytest.mark.parametrize(("change", "words"), [
    (lambda path: path.unlink(), "cannot be read, although config.json names its rules"),
    (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is damaged, or is not the one"),
    (lambda path: path.write_bytes(b"{}"), "is damaged, or is not the one"),
])  # fmt: skip
def test_a_damaged_file_is_refused(
    pruned: Folders, copy_of: Callable[[Path], Path], change: Callable[[Path], None], words: str
) -> None:
    folder = copy_of(pruned("mixtral", True))
    change(folder / FILE)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"rubbish")
    entry = Stored.of({BANK: Threshold()}).entry | {"sha256": sha256(b"rubbish")}
    with pytest.raises(CheckpointError, match="is damaged: "):
        stored.read_rules(tmp_path, entry)


def test_rules_of_another_model_are_refused(sources: Folders, tmp_path: Path) -> None:
    rules: dict[str, Rule] = {
        site.name: Chance(site.hidden_size, 3, 0.25) for site in moe_sites(load(sources("mixtral", True)))
    }
    publish_pruned(sources("mixtral", True), tmp_path / "target", rules)
    with pytest.raises(PruningError, match="top-2, its rule is made for 64 and top-3"):
        load(tmp_path / "target")


def test_without_moepress_transformers_refuses(pruned: Folders) -> None:
    program = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(pruned("mixtral", False))], capture_output=True, text=True, timeout=300
    )
    assert "pip install moepress" in done.stdout, done


# ---------------------------------------------------------------------------------------------- the document

DOC = Path(__file__).parents[2] / "docs" / "FORMAT.md"


def test_the_example_of_the_document_is_what_is_written() -> None:
    example = next(
        json.loads(block)["pruning"]
        for block in re.findall(r"^```json\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.S | re.M)
        if "pruning" in json.loads(block)
    )
    found = Stored.of({f"model.layers.{layer}.mlp.experts": Threshold(0.5) for layer in range(2)}).entry
    assert example | {"sha256": found["sha256"]} == found and len(example["sha256"]) == len(found["sha256"])


@pytest.mark.parametrize("dial", [-0.5, 0.0, 0.5])
def test_the_documents_selector_is_ours(tmp_path: Path, dial: float) -> None:
    rule = selector()
    rule.dial.fill_(dial)
    (tmp_path / FILE).write_bytes(Stored.of({BANK: rule}).data)
    p = {name.removeprefix(f"{BANK}."): tensor.numpy() for name, tensor in load_file(tmp_path / FILE).items()}
    generator = torch.Generator().manual_seed(4)
    hidden, weights = torch.randn(200, 64, generator=generator), torch.rand(200, 2, generator=generator)
    ids, found = torch.randint(EXPERTS, (200, 2), generator=generator), []
    for x, e, w in zip(hidden.numpy(), ids.numpy(), weights.numpy(), strict=True):
        f = p["projection"] @ (x / np.sqrt(np.mean(x**2) + 1e-6))
        cost = np.exp(p["offset"][e] + p["sensitivity"][e] @ f + p["power"] * np.log(np.maximum(w, 1e-6)))
        found.append([bool(c >= 1 + p["dial"] or c == cost.max()) for c in cost])
    assert {sum(kept) for kept in found} == {1, 2} and rule(hidden, ids, weights).tolist() == found
    for name in p:
        assert f"`{name}`" in DOC.read_text(encoding="utf-8")


def test_the_document_lists_every_kind() -> None:
    text = DOC.read_text(encoding="utf-8")
    for kind, rule in KINDS.items():
        made = {"selector": selector, "chance": lambda: Chance(64, 2, 0.25)}.get(kind, rule)()
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind}` |"))
        assert all(f"`{name}`" in row for name in made.settings())
        assert all(f"`{name}`" in row for name in made.state_dict() if name != "dial")
