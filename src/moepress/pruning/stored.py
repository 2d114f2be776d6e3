# SPDX-License-Identifier: Apache-2.0
"""Rules on disk: `pruning.safetensors` beside a checkpoint, and the entry `pruning` in its config.json.

A folder without compressed weights is given a quantization_config in which nothing is compressed, so that transformers
hands its loading to moepress too, and refuses it without. FORMAT.md says all of it without code.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from moepress.checkpoint.reader import CONFIG, read_json
from moepress.checkpoint.side import SIDE_MANIFEST, file_entry, json_bytes, seal, sha256
from moepress.checkpoint.writer import publish_folder, refuse_existing
from moepress.errors import CheckpointError, MoepressError, PruningError, WriteError
from moepress.format.manifest import EXPERTS_GUARD, QUANT_METHOD, Manifest
from moepress.graph.families import family_of
from moepress.pruning.attach import attach, pruners_of
from moepress.pruning.baselines import Chance, Odp, Threshold
from moepress.pruning.rule import Rule
from moepress.pruning.selector import Selector
from moepress.pruning.sites import moe_sites

PRUNING = "pruning"
"""The key in config.json, and the keyword of `from_pretrained` that switches it off."""
FILE = "pruning.safetensors"
VERSION = 1
KINDS: dict[str, type[Rule]] = {each.kind: each for each in (Selector, Threshold, Odp, Chance)}
"""What a stored rule can be."""


@dataclass(frozen=True)
class Stored:
    """Rules as a folder has them: the config's entry and the file."""

    entry: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, rules: Mapping[str, Rule]) -> Stored:
        """Site name -> rule. Raises PruningError for a rule that cannot be stored."""
        groups: dict[tuple[str, str, bool | None], list[str]] = {}
        tensors = {}
        for name, rule in rules.items():
            if KINDS.get(rule.kind) is not type(rule):
                raise PruningError(f"{name}: a {type(rule).__name__} cannot be stored; known: {', '.join(KINDS)}")
            groups.setdefault((rule.kind, json.dumps(rule.settings()), rule.renormalises), []).append(name)
            # cloned, because safetensors refuses a tensor that two rules share
            tensors |= {f"{name}.{key}": tensor.cpu().contiguous().clone() for key, tensor in rule.state_dict().items()}
        data = save(tensors, metadata={"format": "pt"})
        listed = [
            {"kind": kind, "settings": json.loads(text), "renormalises": renormalises, "layers": names}
            for (kind, text, renormalises), names in groups.items()
        ]
        return cls({"pruning_version": VERSION, "sha256": sha256(data), "rules": listed}, data)


def read_rules(folder: str | Path, entry: Any) -> dict[str, Rule]:
    """Site name -> rule, from a folder's file and its config's entry. Raises CheckpointError for unsound ones."""
    path = Path(folder) / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read, although {CONFIG} names its rules: {error}") from error
    kinds = _kinds(entry)
    if sha256(data) != entry.get("sha256"):
        raise CheckpointError(f"{path} is damaged, or is not the one that {CONFIG} was written with; fetch both again")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error
    with torch.device("cpu"):  # while transformers builds a model, the default is the meta device
        rules = {name: _make(name, *kind, tensors) for name, kind in kinds.items()}
    if tensors:
        raise CheckpointError(f"{path} holds {next(iter(tensors))}, which no rule of {CONFIG} claims")
    return rules


def attach_stored(model: nn.Module, rules: Mapping[str, Rule]) -> None:
    """Attaches what `read_rules` gave, and makes `model.save_pretrained` store the rules it has by then.

    Raises CheckpointError unless the rules are for just the sites of this model, PruningError where one does not fit.
    """
    sites = [site.name for site in moe_sites(model)]
    if set(rules) != set(sites):
        odd = sorted(set(rules) ^ set(sites))[0]
        raise CheckpointError(
            f"the rules are for {len(rules)} layers of experts and this model has {len(sites)} ({odd} is in one of "
            "them only); they belong to another model"
        )
    attach(model, [rules[name] for name in sites])
    # nothing that save_pretrained calls knows the folder; a method, so that a copy of the model has one of its own
    model.save_pretrained = MethodType(_save_pretrained, model)


def publish_pruned(source: str | Path, target: str | Path, rules: Mapping[str, Rule]) -> None:
    """Writes `target`: all files of `source`, weights as hard links where the disk has them, and the rules.

    The folder appears under its name in one step, complete, or not at all. Rules that `source` has are replaced. Raises
    CheckpointError for a target that exists and for a source that cannot have rules, WriteError for a full disk.
    """
    source, target = Path(source), Path(target)
    stored = Stored.of(rules)
    config = pruned_config(read_json(source / CONFIG), stored.entry)
    refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.moepress-", dir=target.parent))
    except OSError as error:
        raise WriteError(f"{target} cannot be written: {error}") from error
    try:
        work.chmod(source.stat().st_mode & 0o777)
        _fill(work, source, {CONFIG: json_bytes(config), FILE: stored.data})
        publish_folder(work, target)
    except OSError as error:
        raise WriteError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def pruned_config(config: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's config.json with rules. Raises CheckpointError for another method's quantised folder."""
    family_of(config.get("model_type"))
    given = config.get("quantization_config")
    if given is not None and (not isinstance(given, dict) or given.get("quant_method") != QUANT_METHOD):
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise CheckpointError(f"the folder is quantised with {method!r}; compress it with moepress before pruning it")
    ours = {} if given else {"quantization_config": Manifest().to_config(), "experts_implementation": EXPERTS_GUARD}
    return {**config, **ours, PRUNING: dict(entry)}


def _fill(work: Path, source: Path, new: Mapping[str, bytes]) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in (*new, SIDE_MANIFEST):
            _link(path.resolve(), work / path.name)
    for name, data in new.items():
        (work / name).write_bytes(data)
    if (source / SIDE_MANIFEST).exists():
        side = {key: value for key, value in read_json(source / SIDE_MANIFEST).items() if key != "sha256"}
        files = side.get("files") or {}
        side["files"] = files | {name: file_entry(data) for name, data in new.items()}
        (work / SIDE_MANIFEST).write_bytes(seal(side))


def _link(source: Path, target: Path) -> None:
    """A hard link for weights, which nobody edits in place; a copy of other files and where links are not possible."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES):
                raise
    shutil.copyfile(source, target)


def _save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of the model's class, with the rules that are attached now; without, it saves none."""
    if kwargs.get("push_to_hub"):
        raise PruningError("save_pretrained(push_to_hub=True) would leave the rules behind; use model.push_to_hub(...)")
    rules = {name: pruner.rule for name, pruner in pruners_of(self).items()}
    self.config.pruning = False
    if rules:
        stored = Stored.of(rules)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / FILE).write_bytes(stored.data)
        self.config.pruning = stored.entry
    type(self).save_pretrained(self, save_directory, *args, **kwargs)


def _kinds(entry: Any) -> dict[str, tuple[str, dict[str, Any], bool | None]]:
    """Site name -> kind, settings and whether it renormalises, from the config's entry."""
    version = entry.get("pruning_version") if isinstance(entry, dict) else None
    if version != VERSION:
        raise CheckpointError(f"pruning_version is {version!r} and this moepress reads {VERSION}; upgrade moepress")
    kinds: dict[str, tuple[str, dict[str, Any], bool | None]] = {}
    try:
        for group in entry["rules"]:
            if not isinstance(renormalises := group["renormalises"], bool | None):
                raise TypeError(f"renormalises is {renormalises!r}")
            for name in group["layers"]:
                if name in kinds:
                    raise ValueError(f"{name} has two rules")
                kinds[str(name)] = (str(group["kind"]), dict(group["settings"]), renormalises)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the entry {PRUNING!r} of {CONFIG} is damaged: {error!r}") from error
    return kinds


def _make(
    name: str, kind: str, settings: dict[str, Any], renormalises: bool | None, tensors: dict[str, torch.Tensor]
) -> Rule:
    """One rule; takes its tensors out of `tensors`."""
    if kind not in KINDS:
        raise CheckpointError(f"{name} has a rule of kind {kind!r}, which this moepress does not know; upgrade it")
    try:
        rule = KINDS[kind](**settings)
    except MoepressError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name}: a {kind} cannot be made from {settings}: {error}") from error
    state = {}
    for key, wanted in rule.state_dict().items():
        found = tensors.pop(f"{name}.{key}", None)
        if found is None:
            raise CheckpointError(f"{FILE} lacks {name}.{key}; fetch it again")
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise CheckpointError(
                f"{name}.{key} is {found.dtype} {tuple(found.shape)} in {FILE}, and {wanted.dtype} "
                f"{tuple(wanted.shape)} by {CONFIG}"
            )
        state[key] = found
    rule.load_state_dict(state)
    rule.renormalises = renormalises
    return rule.requires_grad_(False)
