# SPDX-License-Identifier: Apache-2.0
"""Puts compressed modules into a model skeleton and checks that every stored tensor has an owner and the right shape.

Works on the meta device before weights are loaded, so a mistake costs nothing and names what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from moepress.errors import CheckpointError
from moepress.format.manifest import BankEntry, LinearEntry, Manifest, Stored
from moepress.graph.view import Family
from moepress.runtime.experts import ExpertBank
from moepress.runtime.linear import CompressedLinear
from moepress.runtime.router import adopt


def install(model: nn.Module, manifest: Manifest, family: Family, name_of: Callable[[str], str | None]) -> None:
    """Replaces each compressed module, and has the routers of compressed experts run on kernels where there are some.

    `name_of` gives a stored name's module name, or None where the model lacks it.
    Raises CheckpointError where the model's module is of another kind or shape than the checkpoint's.
    """
    for stored, linear in manifest.linears.items():
        if name := name_of(stored):
            _replace(model, name, lambda old, linear=linear, name=name: _linear(name, linear, old))
    for stored, bank in manifest.banks.items():
        if name := name_of(stored):
            _replace(model, name, lambda old, bank=bank, name=name: _bank(name, bank, old))
            adopt(model, family, name)


def check_files(stored: Stored, found: Stored) -> None:
    """Raises CheckpointError unless the files hold each compressed tensor as the manifest says."""
    for name, (dtype, shape) in stored.items():
        if name not in found:
            raise CheckpointError(f"{name} is missing from the files; run `moepress verify` and fetch them again")
        if found[name] != (dtype, shape):
            raise CheckpointError(f"{name} is {found[name]} in the files and {(dtype, shape)} by config.json")


def check_claims(model: nn.Module, found: Mapping[str, str], ignored: Iterable[str], merged: Iterable[str]) -> None:
    """`found` maps module tensor names (transformers' spelling) to stored names. Raises for missing or unclaimed ones.

    `ignored` are patterns that the model class drops on purpose, `merged` the prefixes under which transformers
    itself joins or splits tensors (experts kept at full precision).
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    own = set(model.state_dict())
    missing = [n for n in own - set(found) - tied if not n.startswith(tuple(merged))]
    if missing:
        raise CheckpointError(f"the files lack {_some(missing)}, which {type(model).__name__} needs; fetch them again")
    patterns = [re.compile(p) for p in ignored]
    unclaimed = [
        stored for name, stored in found.items()
        if name not in own and not name.startswith(tuple(merged)) and not any(p.search(name) for p in patterns)
    ]  # fmt: skip
    if unclaimed:
        raise CheckpointError(f"the files hold {_some(unclaimed)}, which {type(model).__name__} has no place for")


def check_shapes(model: nn.Module, found: Mapping[str, str], stored: Stored) -> None:
    """Raises CheckpointError where a tensor that is loaded as it is has another shape in the files."""
    own = model.state_dict()
    for name, file_name in found.items():
        if name in own and tuple(own[name].shape) != stored[file_name][1]:
            raise CheckpointError(
                f"{file_name} has shape {stored[file_name][1]} in the files and {tuple(own[name].shape)} by config.json"
            )


def _replace(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        old = owner.get_submodule(child)
    except AttributeError as error:
        raise CheckpointError(
            f"{type(model).__name__} has no module {name}, which the checkpoint compresses"
        ) from error
    owner.register_module(child, make(old))


def _linear(name: str, entry: LinearEntry, old: nn.Module) -> CompressedLinear:
    weight = getattr(old, "weight", None)
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != entry.shape:
        shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(old).__name__
        raise CheckpointError(f"{name} is {shape} in the model and {entry.shape} in the checkpoint")
    return CompressedLinear(entry, getattr(old, "bias", None))


def _bank(name: str, entry: BankEntry, old: nn.Module) -> ExpertBank:
    expected = (entry.num_experts, *entry.gate_up_shape, *entry.down_shape)
    actual, act_fn = _describe(old)
    if actual != expected:
        raise CheckpointError(
            f"{name}: (experts, gate rows, inputs, down rows, inputs) is {actual} in the model and {expected} in the "
            "checkpoint"
        )
    return ExpertBank(entry, act_fn)


def _describe(old: Any) -> tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]:
    if isinstance(old, nn.ModuleList):
        first = old[0]
        return (len(old), *first.gate_proj.weight.shape, *first.down_proj.weight.shape), first.act_fn
    fused, down = getattr(old, "gate_up_proj", None), getattr(old, "down_proj", None)
    if fused is None or down is None or fused.ndim != 3:
        raise CheckpointError(f"{type(old).__name__} is no experts module that moepress can stand in for")
    return (fused.shape[0], fused.shape[1] // 2, fused.shape[2], *down.shape[1:]), old.act_fn


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
