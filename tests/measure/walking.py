# SPDX-License-Identifier: Apache-2.0
"""What a calibration walk is compared with: the whole transformers model in float32, watched by plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moepress.graph.view import WeightRef
from tiny import VOCABULARY

WINDOWS, LENGTH = 4, 32
TOKENS = WINDOWS * LENGTH


def window_ids(windows: int = WINDOWS, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(8))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    assert a.shape == b.shape, (a.shape, b.shape)
    return bool((a - b).norm() <= tolerance * b.norm())


@torch.no_grad()
def hidden_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The input of every layer and the output of the last one."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@contextmanager
def watching(modules: dict[str, Any]) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """name -> the positional inputs of that module in the last run."""
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args))
        for name, module in modules.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def plain_inputs(model: Any, source: Any, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight name -> (vectors [n, K] that it reads, factors [n]), from one run of the whole model."""
    rename = source.graph.family.module_name
    depth = model.config.num_hidden_layers
    refs = [ref for ref in source.graph.weights if ref.layer < depth]
    modules = {rename(ref.bank or ref.module): None for ref in refs}
    with watching({name: model.get_submodule(name) for name in modules}) as seen:
        model(ids, use_cache=False)
    found = {}
    for ref in refs:
        args = seen[rename(ref.bank or ref.module)]
        if ref.expert is None:
            x = args[0].reshape(-1, args[0].shape[-1])
            found[ref.name] = x, torch.ones(len(x))
        else:
            found[ref.name] = _expert_input(model.get_submodule(rename(ref.bank)), ref, *args)
    return found


def _expert_input(
    experts: Any, ref: WeightRef, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = hidden.reshape(-1, hidden.shape[-1])
    tokens = [(t, s) for t in range(len(index)) for s in range(index.shape[1]) if index[t, s] == ref.expert]
    x = x[[t for t, _ in tokens]]
    if ref.projection != "down":
        return x, torch.ones(len(x))
    gate, up = (x @ experts.gate_up_proj[ref.expert].T).chunk(2, dim=-1)
    return experts.act_fn(gate) * up, torch.tensor([float(weight[t, s]) for t, s in tokens])


def moment(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scaled = (x * scale.unsqueeze(1)).double()
    return (scaled.T @ scaled / TOKENS).float()


@torch.no_grad()
def change(model: Any, source: Any, ref: WeightRef, tensor: torch.Tensor) -> None:
    """Writes a weight into the whole model."""
    module = model.get_submodule(source.graph.family.module_name(ref.bank or ref.module))
    if ref.expert is None:
        module.weight.copy_(tensor)
    elif ref.projection == "down":
        module.down_proj[ref.expert].copy_(tensor)
    else:
        half = module.gate_up_proj.shape[1] // 2
        rows = slice(0, half) if ref.projection == "gate" else slice(half, None)
        module.gate_up_proj[ref.expert, rows].copy_(tensor)


def disturbed(weight: torch.Tensor, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight + 0.1 * noise * weight.std()


def all_stages(walk: Any, each: Callable[[Any, Any], None]) -> None:
    """Calls each(layer, site) for every site of the model, in order."""
    for layer in walk.layers():
        for sites in layer.stages():
            for site in sites:
                each(layer, site)
