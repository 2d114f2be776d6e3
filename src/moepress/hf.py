# SPDX-License-Identifier: Apache-2.0
"""Registers `quant_method: moepress` with transformers, so that `from_pretrained` loads compressed folders.

Only hooks that are the same in transformers 5.15 to 5.23 are overridden. Importing this module (which `import moepress`
does) registers; a second import does nothing.

The guard: transformers ignores a quant_method it does not know, and would run with random experts. Compressed folders
therefore ask in config.json for an experts implementation whose *name* is an instruction (EXPERTS_GUARD); without
moepress every transformers 5 refuses to build the model and prints that name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as _CONFIGS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moepress.checkpoint.reader import CheckpointReader
from moepress.errors import CheckpointError
from moepress.format.manifest import EXPERTS_GUARD, QUANT_METHOD, Manifest
from moepress.graph.families import family_of
from moepress.graph.view import Family
from moepress.pruning.attach import rules_of
from moepress.pruning.rule import Rule
from moepress.pruning.selector import compile_selectors, settle_selectors
from moepress.pruning.stored import PRUNING, attach_stored, read_rules
from moepress.runtime.build import check_claims, check_files, check_shapes, install
from moepress.runtime.warmup import compile_kernels, prepare


class MoepressConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers passes it around; `manifest` is its meaning."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.manifest = Manifest.from_config({"quant_method": QUANT_METHOD} | config)

    def to_dict(self) -> dict[str, Any]:
        return self.manifest.to_config()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class MoepressQuantizer(HfQuantizer):
    """Builds the compressed modules before the weights are loaded, and checks names and shapes."""

    compileable = False
    """Whether `generate` may compile the model: no layer of experts runs in a loop over those that tokens chose."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "moepress compresses folders, not loaded models: run `moepress compress SRC DST` first"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        manifest: Manifest = self.quantization_config.manifest
        family = family_of(model.config.model_type)
        name_of = _namer(model, family)
        install(model, manifest, family, name_of)
        self._rules: dict[str, Rule] = {}
        if checkpoint_files:
            with CheckpointReader(_folder_of(checkpoint_files)) as reader:
                _check_against_files(model, manifest, reader, name_of)
                self._rules = _stored_rules(model.config, reader)
        model.config.quantization_config = self.quantization_config
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        _restore_dtypes(model, self._dtypes)
        # serialised with the config, so that a saved copy is guarded too
        model.config.experts_implementation = EXPERTS_GUARD
        if self._rules:
            attach_stored(model, self._rules)
        self.compileable = _settle(model, model.dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return self.compileable


def warmup(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Makes a model that is on a GPU ready for inputs of `dtype` (its own by default): packs weights, compiles kernels.

    Loading a model onto a GPU packs already, and the first forward pass does what is missing; but it compiles kernels
    one by one, here it is all of them side by side. Without a forward pass before it, `torch.compile(fullgraph=True)`
    needs this; capturing a CUDA graph needs the forward pass. Raises KernelError where a kernel does not compile, and
    where MOEPRESS_KERNELS asks for one that cannot run.
    """
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    compileable = _settle(model, dtype)
    compile_kernels(model, dtype, _top_k(model))
    compile_selectors(rules_of(model), dtype, _top_k(model))
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), MoepressQuantizer):
        quantizer.compileable = compileable


def _settle(model: nn.Module, dtype: torch.dtype) -> bool:
    """Chooses kernels for all layers and packs; whether neither compressed nor kept experts (3-D) need a loop."""
    settle_selectors(rules_of(model), dtype, _top_k(model))
    return prepare(model, dtype, _top_k(model)) and not any(parameter.ndim == 3 for parameter in model.parameters())


def _top_k(model: nn.Module) -> int | None:
    """Experts that a token has, where the configuration says it in the usual way."""
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "num_experts_per_tok", None)


def _namer(model: Any, family: Family) -> Callable[[str], str | None]:
    """Stored name -> this model's name; None for layers beyond the model's (a next-token head it does not build)."""
    prefix = "" if hasattr(model, "model") else "model."
    depth = model.config.num_hidden_layers

    def name_of(stored: str) -> str | None:
        layer = re.match(r"model\.layers\.(\d+)\.", stored)
        if layer and int(layer.group(1)) >= depth:
            return None
        name = family.module_name(stored)
        return name.removeprefix(prefix) if not prefix or name.startswith(prefix) else None

    return name_of


def _folder_of(files: Any) -> str:
    folders = {str(file).rpartition("/")[0] for file in files}
    if len(folders) != 1:
        raise CheckpointError(f"the weights lie in several folders ({', '.join(sorted(folders))}); moepress reads one")
    return folders.pop()


def _stored_rules(config: Any, reader: CheckpointReader) -> dict[str, Rule]:
    """Which experts tokens run, unless `pruning=False` was given; none for a folder without rules."""
    if not getattr(config, PRUNING, None):
        return {}
    entry = reader.config.get(PRUNING)
    if not entry:
        raise CheckpointError(f"{reader.folder} has no rules, so pruning cannot be switched on; see `train-pruning`")
    return read_rules(reader.folder, entry)


def _check_against_files(
    model: Any, manifest: Manifest, reader: CheckpointReader, name_of: Callable[[str], str | None]
) -> None:
    found = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
    check_files(manifest.stored(), found)
    names = {name_of(stored): stored for stored in found}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    claims = {name: stored for name, stored in names.items() if name}
    check_claims(model, claims, ignored, _merged_experts(model, claims))
    check_shapes(model, claims, found)


def _merged_experts(model: Any, claims: Mapping[str, str]) -> list[str]:
    """Prefixes of the experts that were kept and that transformers joins from one tensor per expert while loading.

    Raises CheckpointError unless all of them are there: transformers would draw what it lacks at random.
    """
    family, merged = family_of(model.config.model_type), []
    templates = [template for template in family.weights if "{expert}" in template]
    stored = set(claims.values())
    for name, tensor in model.state_dict().items():
        if not templates or not name.endswith(".experts.gate_up_proj") or name in claims:
            continue
        merged.append(name.removesuffix("gate_up_proj"))
        layer = re.search(r"layers\.(\d+)\.", name)
        for template in templates:
            for expert in range(tensor.shape[0]):
                wanted = template.format(layer=layer.group(1) if layer else "", expert=expert)
                if wanted not in stored:
                    raise CheckpointError(f"the files lack {wanted}, one of {tensor.shape[0]} experts; fetch it again")
    return merged


def _restore_dtypes(model: Any, wanted: Mapping[str, torch.dtype]) -> None:
    """Up to 5.17 transformers leaves a tensor whose name it changes in the files' dtype, whatever `dtype` says.

    That is all of a base model, Mixtral's and GraniteMoE's routers, and experts that were kept.
    """
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, tensor in model.state_dict(keep_vars=True).items():
        on_purpose = tensor.dtype == torch.float32 and any(part in name for part in kept)
        if name in wanted and tensor.dtype != wanted[name] and not on_purpose:
            tensor.data = tensor.data.to(wanted[name])


def _full_precision_experts(experts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """For layers whose experts were kept: transformers' own loop over experts."""
    return type(experts).forward.__wrapped__(experts, *args, **kwargs)


if QUANT_METHOD not in _CONFIGS:
    register_quantization_config(QUANT_METHOD)(MoepressConfig)
    register_quantizer(QUANT_METHOD)(MoepressQuantizer)
ExpertsInterface.register(EXPERTS_GUARD, _full_precision_experts)
