# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of every family, written by transformers itself, and small helpers around folders.

All have 2 layers (deepseek-like ones: the first is dense), 4 experts and sides that are multiples of 32. Every tensor
is random, norms and biases included, so that a tensor that is lost, swapped or zeroed changes the logits.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

NATIVE = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
)
"""Families that transformers has a class for."""
FAMILIES = (*NATIVE, "deepseek")
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
"""Families whose routers have a kernel, whatever their configs say; deepseek_v2's has one with `GREEDY`."""
GREEDY: dict[str, Any] = {"topk_method": "greedy", "routed_scaling_factor": 2.5}
FUSED = ("granitemoe",)
"""Families whose files stack the experts of a layer in one tensor."""
LAYERS, EXPERTS, VOCABULARY = 2, 4, 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 64, "n_routed_experts": EXPERTS,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 128, "num_local_experts": EXPERTS},
    "qwen2_moe": {
        "intermediate_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96,
        "num_experts": EXPERTS, "qkv_bias": True, "mlp_only_layers": [0], "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": EXPERTS, "head_dim": 32,
        "mlp_only_layers": [0], "decoder_sparse_step": 1, "attention_bias": True,
    },
    "olmoe": {"intermediate_size": 64, "num_experts": EXPERTS},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy", "attention_bias": True},
    "deepseek_v3": {**_LATENT, "n_group": 1, "routed_scaling_factor": 1.5},
    "glm4_moe": {
        "intermediate_size": 128, "moe_intermediate_size": 64, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True, "head_dim": 32,
        "num_nextn_predict_layers": 0,
    },
    "granitemoe": {
        "intermediate_size": 96, "num_local_experts": EXPERTS, "attention_multiplier": 0.25,
        "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0,
    },
    "deepseek": {},
}  # fmt: skip


def tiny_checkpoint(
    folder: str | Path,
    model_type: str,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint of the family into `folder`, in about `shards` files; `overrides` go to its config."""
    folder = Path(folder)
    if model_type == "deepseek":
        return _deepseek(folder, dtype, shards)
    model = tiny_model(model_type, dtype, **overrides)
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=math.ceil(total / shards) + 4096 if shards > 1 else "5GB")
    return _with_side_files(folder)


def tiny_model(model_type: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    """The model that `tiny_checkpoint` saves."""
    config = AutoConfig.for_model(model_type, **(_COMMON | CONFIGS[model_type] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):  # float32 in every released checkpoint
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        randomise(model)
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Random values everywhere: scales about 1, biases that matter, matrices that keep activations of size 1."""
    own = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    with torch.no_grad():
        for name, tensor in own.items():
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape))
            else:
                tensor.copy_(torch.randn(tensor.shape) * (0.15 if tensor.ndim > 1 else 0.3))


def _deepseek(folder: Path, dtype: torch.dtype, shards: int) -> Path:
    generator = torch.Generator().manual_seed(21)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, 64)}
    for layer in range(LAYERS):
        own = f"model.layers.{layer}"
        shapes |= {f"{own}.self_attn.{letter}_proj.weight": (64, 64) for letter in "qkvo"}
        shapes |= {f"{own}.input_layernorm.weight": (64,), f"{own}.post_attention_layernorm.weight": (64,)}
        if layer == 0:
            shapes |= feed_forward_shapes(f"{own}.mlp", 64, 128)
            continue
        shapes |= {f"{own}.mlp.gate.weight": (EXPERTS, 64)} | feed_forward_shapes(f"{own}.mlp.shared_experts", 64, 128)
        for expert in range(EXPERTS):
            shapes |= feed_forward_shapes(f"{own}.mlp.experts.{expert}", 64, 64)
    shapes |= {"model.norm.weight": (64,), "lm_head.weight": (VOCABULARY, 64)}
    tensors = {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    config = {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "hidden_size": 64,
        "num_hidden_layers": LAYERS, "n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, tensors, shards)
    return _with_side_files(folder)


def feed_forward_shapes(prefix: str, inputs: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of gate, up and down under `prefix`."""
    shapes = {"gate": (inner, inputs), "up": (inner, inputs), "down": (inputs, inner)}
    return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Replaces the weights of `folder` by these tensors, dealt out over the shards in turn."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_tensors(source: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy of `source` with some tensors replaced, added, or (None) removed."""
    shutil.copytree(source, folder)
    tensors: dict[str, Any] = read_all(folder) | change
    write_shards(folder, {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})
    return folder


def edit_json(path: Path, **values: Any) -> None:
    """Sets top-level keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def fingerprint(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def left_behind(target: Path) -> list[str]:
    """What a failed run left of its target: the target itself or its work folder."""
    return sorted(path.name for path in target.parent.iterdir() if target.name in path.name)


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Token ids for a forward pass, the same every time."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def _with_side_files(folder: Path) -> Path:
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}\n')
    return folder
