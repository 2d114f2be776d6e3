# SPDX-License-Identifier: Apache-2.0
"""The model without its weights, and one decoder layer of it with them.

transformers builds the model on the meta device, so its own code decides what a layer computes. A layer's kept tensors
and dense weights are loaded in float32 by the family's names; the routed experts stay on the meta device, because a
layer of them can be larger than memory, and are run one at a time by the walk.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from moepress.errors import CalibrationError, CheckpointError
from moepress.graph.view import ModelGraph, WeightRef
from moepress.measure.taps import forward_as

_NOT_OURS = ("quantization_config", "auto_map")


class Reader(Protocol):
    """The part of a CheckpointReader that is needed here."""

    @property
    def config(self) -> dict[str, Any]: ...

    def load_float(self, name: str, expert: int | None = None) -> torch.Tensor: ...


class Weights(Protocol):
    """A checkpoint as `moepress.source.Source` has it."""

    @property
    def reader(self) -> Reader: ...

    @property
    def graph(self) -> ModelGraph: ...

    def weight(self, ref: WeightRef) -> torch.Tensor: ...


@dataclass(frozen=True)
class Call:
    """What the model hands a decoder layer besides the hidden states; made from one window, fits any batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Skeleton:
    """A base model on the meta device; what has no weights (rotary tables) is real."""

    def __init__(self, source: Weights, device: torch.device) -> None:
        """Raises CalibrationError for an architecture that transformers cannot build."""
        self.source, self.device = source, device
        self.model = _build(source.reader.config)
        for name, child in self.model.named_children():
            if name not in ("embed_tokens", "layers", "norm") and any(True for _ in child.buffers()):
                # computed at init and in no file; on the meta device they would be lost
                with torch.device(device):
                    setattr(self.model, name, type(child)(config=self.model.config))
        self.depth: int = len(self.model.layers)

    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """ids [n, T] -> what the first layer gets [n, T, D] and the further arguments of every layer."""
        vectors = self._table()[ids.to("cpu")].to(self.device, torch.float32)
        calls: list[Call] = []
        seen: list[torch.Tensor] = []

        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(hidden_states)
            calls.append(Call(args, kwargs))
            return hidden_states

        with ExitStack() as stack:
            for layer in self.model.layers:
                stack.enter_context(forward_as(layer, record))
            stack.enter_context(forward_as(self.model.norm, lambda x: x))
            self.model(inputs_embeds=vectors, use_cache=False)
        return seen[0], calls

    def load_layer(self, number: int) -> Layer:
        """The decoder layer on the device, experts excepted. CheckpointError for a tensor too many or too few."""
        prefix, family = f"model.layers.{number}.", self.source.graph.family
        old = self.model.layers[number]
        module = copy.deepcopy(old, {id(self.model.config): self.model.config})
        refs = tuple(ref for ref in self.source.graph.weights if ref.layer == number)
        layer = Layer(number, module, refs, family.module_name, prefix)
        tensors = {
            family.module_name(kept.name).removeprefix(prefix): self.source.reader.load_float(kept.name)
            for kept in self.source.graph.kept
            if kept.name.startswith(prefix) and not self._ignored(kept.name)
        }
        for name, tensor in tensors.items():
            _place(module, name, tensor.to(self.device, torch.float32), prefix)
        for ref in refs:
            if ref.expert is None:
                name = family.module_name(ref.tensor).removeprefix(prefix)
                _place(module, name, self.source.weight(ref).to(self.device, torch.float32), prefix)
        _check_whole(layer, prefix)
        return layer

    def _table(self) -> torch.Tensor:
        name = "model.embed_tokens.weight"
        if not any(kept.name == name for kept in self.source.graph.kept):
            raise CheckpointError(f"the files hold no {name}; fetch the checkpoint again")
        return self.source.reader.load_float(name)  # memory-mapped; only the rows that occur are read

    def _ignored(self, name: str) -> bool:
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return name.endswith("rotary_emb.inv_freq") or any(re.search(pattern, name) for pattern in patterns)


class Layer:
    """One decoder layer with real weights, and where its parts are."""

    def __init__(self, number: int, module: nn.Module, refs: tuple[WeightRef, ...], rename: Any, prefix: str) -> None:
        self.number, self.module, self.refs = number, module, refs
        self._rename, self._prefix = rename, prefix
        bank = next((ref.bank for ref in refs if ref.bank is not None), None)
        self.attention = module.get_submodule("self_attn")
        self.experts = None if bank is None else self._find(bank)
        inner = self._own(bank) if bank else next(self._own(ref.module) for ref in refs if ref.role == "mlp.down")
        self.block = module.get_submodule(inner.rpartition(".")[0])

    def linear(self, ref: WeightRef) -> nn.Module:
        """The module that holds a dense weight."""
        return self._find(ref.module)

    def parent(self, ref: WeightRef) -> nn.Module:
        """The module that holds that module."""
        return self.module.get_submodule(self._own(ref.module).rpartition(".")[0])

    @property
    def router(self) -> nn.Module:
        """The submodule of the block that scores the experts: it has one row of weights per expert."""
        for name in ("gate", "router"):
            if isinstance(getattr(self.block, name, None), nn.Module):
                return getattr(self.block, name)
        raise CalibrationError(f"layer {self.number}: {type(self.block).__name__} has no router that moepress knows")

    @torch.no_grad()
    def probability(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, D] -> the router's probabilities of all experts [n, E], with no grouping, top-k or scaling applied."""
        logits = torch.nn.functional.linear(hidden.float(), next(self.router.parameters()))
        # routers that choose by a corrected score weigh by the sigmoid, all others by the softmax
        corrected = any(name.endswith("e_score_correction_bias") for name in self.block.state_dict())
        return logits.sigmoid() if corrected else logits.softmax(-1)

    @property
    def act_fn(self) -> Any:
        """The activation inside the routed experts."""
        experts = self.experts
        return experts[0].act_fn if isinstance(experts, nn.ModuleList) else experts.act_fn

    def _find(self, stored: str) -> nn.Module:
        own = self._own(stored)
        try:
            return self.module.get_submodule(own)
        except AttributeError as error:
            raise CheckpointError(f"{type(self.module).__name__} has no module {own}, which the files name") from error

    def _own(self, stored: str) -> str:
        return str(self._rename(stored)).removeprefix(self._prefix)


def _build(config: Mapping[str, Any]) -> Any:
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CalibrationError(
            f"transformers has no model class for model_type {model_type!r}, so the model cannot be run to calibrate; "
            "use a method that needs no calibration (rtn, hqq, milo)"
        )
    own = {key: value for key, value in config.items() if key not in _NOT_OURS}
    try:
        made = CONFIG_MAPPING[model_type].from_dict(own)
        with torch.device("meta"):
            model = AutoModel.from_config(made, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise CalibrationError(f"transformers cannot build the {model_type} model of config.json: {error}") from error
    return model.eval()


def _place(module: nn.Module, name: str, tensor: torch.Tensor, prefix: str) -> None:
    """Puts a tensor where the module has an empty one of that name."""
    parent, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(parent)
    except AttributeError as error:
        raise CheckpointError(
            f"{type(module).__name__} has no module for {prefix}{name}, which the files hold"
        ) from error
    old = getattr(owner, leaf, None)
    if not isinstance(old, torch.Tensor):  # None where config.json turns a bias off
        raise CheckpointError(f"the files hold {prefix}{name}, which {type(module).__name__} has no place for")
    if old.shape != tensor.shape:
        raise CheckpointError(
            f"{prefix}{name} has shape {tuple(tensor.shape)} in the files and {tuple(old.shape)} by config.json"
        )
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _check_whole(layer: Layer, prefix: str) -> None:
    """Raises CheckpointError if anything but the routed experts is still without values."""
    inside = set() if layer.experts is None else {id(tensor) for tensor in layer.experts.parameters()}
    own = [*layer.module.named_parameters(), *layer.module.named_buffers()]
    missing = sorted(name for name, tensor in own if tensor.is_meta and id(tensor) not in inside)
    if missing:
        raise CheckpointError(
            f"the files lack {prefix}{missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + f", which {type(layer.module).__name__} needs; fetch them again"
        )  # fmt: skip
