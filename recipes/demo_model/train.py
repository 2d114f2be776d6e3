# SPDX-License-Identifier: Apache-2.0
"""Step 2: token files -> a trained `qwen2_moe` checkpoint in bfloat16.

Weights and optimizer state stay in float32; the arithmetic runs under bfloat16 autocast. The
number of steps fixes the learning-rate schedule; `--minutes` is a ceiling for slow machines, where
the schedule is compressed to end in time. The weights of the best validation loss are written.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationConfig, Qwen2MoeConfig, Qwen2MoeForCausalLM

SEED = 20261122
END = 0  # the id of <|endoftext|>
ROUTER_LOSS_WEIGHT = 0.02


def model_config(context: int = 2048) -> Qwen2MoeConfig:
    """The demo's shape: small, and every linear weight a multiple of 64 both ways."""
    return Qwen2MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,  # only dense layers would use it, and there are none
        shared_expert_intermediate_size=192,
        num_experts=8,
        moe_intermediate_size=128,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        qkv_bias=False,
        tie_word_embeddings=True,
        max_position_embeddings=context,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        output_router_logits=False,
        router_aux_loss_coef=ROUTER_LOSS_WEIGHT,
    )


def all_experts_at_once(
    self: torch.nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The stock experts' result without a loop: run them all, weigh those not chosen by zero.

    With eight tiny experts two large products beat sixteen small ones; nothing waits for the GPU.
    """
    experts, double, hidden = self.gate_up_proj.shape
    width = double // 2
    gates = torch.zeros(x.shape[0], experts, dtype=weights.dtype, device=x.device)
    gates = gates.scatter(1, chosen, weights)
    both = F.linear(x, self.gate_up_proj.reshape(experts * double, hidden))
    gate, up = both.view(-1, experts, double).split(width, dim=-1)
    inner = F.silu(gate) * up * gates.unsqueeze(-1).to(both.dtype)
    down = self.down_proj.transpose(1, 2).reshape(experts * width, hidden)
    return inner.reshape(-1, experts * width) @ down.to(inner.dtype)


class RouterLog:
    """Keeps the router logits of the last forward pass, one tensor per layer."""

    def __init__(self, model: Qwen2MoeForCausalLM) -> None:
        self.logits: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, args: tuple, output: tuple) -> None:
        self.logits.append(F.linear(args[0].float(), module.weight.float()))

    def take(self) -> list[torch.Tensor]:
        logits, self.logits = self.logits, []
        return logits


def balance_loss(logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """Load balance per layer, averaged: 1 when tokens spread evenly, `experts / top_k` at worst."""
    total = torch.zeros((), device=logits[0].device)
    for layer in logits:
        probability = layer.softmax(dim=-1)
        experts = layer.shape[-1]
        picked = layer.topk(top_k, dim=-1).indices
        load = F.one_hot(picked, experts).sum(dim=(0, 1)).float() / picked.numel()
        total = total + experts * (load * probability.mean(dim=0)).sum()
    return total / len(logits)


def add_dropout(model: Qwen2MoeForCausalLM, rate: float) -> None:
    """Drop activations after the embedding and every attention and expert block, in training."""

    def drop(module: torch.nn.Module, args: tuple, output: object) -> object:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate), *output[1:])
        return F.dropout(output, rate)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def next_token_loss(model: Qwen2MoeForCausalLM, rows: torch.Tensor, device_type: str) -> torch.Tensor:
    """Mean cross entropy in nats of rows[:, 1:] given rows[:, :-1]."""
    with torch.autocast(device_type, dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def validate(
    model: Qwen2MoeForCausalLM, tokens: torch.Tensor, context: int, router: RouterLog, batch: int
) -> tuple[float, float]:
    """Validation loss in nats, and the smallest share of picks any expert gets (even: 0.125)."""
    model.eval()
    rows = tokens[: (len(tokens) - 1) // context * context + 1]
    rows = torch.stack([rows[i : i + context + 1] for i in range(0, len(rows) - 1, context)])
    total, load = 0.0, 0
    for part in rows.split(batch):
        total += next_token_loss(model, part, tokens.device.type).item() * len(part)
        logits = torch.stack(router.take())
        picked = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
        load = load + F.one_hot(picked, model.config.num_experts).sum(dim=(1, 2))
    model.train()
    share = load / load.sum(dim=-1, keepdim=True)
    return total / len(rows), share.min().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=10.0, help="never train longer than this")
    parser.add_argument("--batch", type=int, default=32, help="rows in a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    train, valid = (
        torch.from_numpy(np.fromfile(args.work / name, dtype="<u2").astype(np.int64)).to(device)
        for name in ("train.bin", "valid.bin")
    )
    config = model_config()
    model = Qwen2MoeForCausalLM(config).to(device).float()
    for layer in model.model.layers:
        layer.mlp.experts.forward = types.MethodType(all_experts_at_once, layer.mlp.experts)
    router = RouterLog(model)
    if args.dropout:
        add_dropout(model, args.dropout)
    parameters = sum(p.numel() for p in model.parameters())
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{parameters:,} parameters, {len(train):,} training tokens, {hardware}")

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    pick = torch.Generator().manual_seed(SEED)
    offsets = torch.arange(args.context + 1, device=device)
    best_loss, best_weights, history = math.inf, {}, []
    model.train()
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        # Warm up over the first 3 %, then a cosine down to a hundredth.
        warm = min(1.0, (progress + 1e-3) / 0.03)
        rate = args.lr * warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate

        first = torch.randint(len(train) - args.context - 1, (args.batch, 1), generator=pick)
        rows = train[first.to(device) + offsets]
        loss = next_token_loss(model, rows, device.type)
        balance = balance_loss(router.take(), config.num_experts_per_tok)
        (loss + ROUTER_LOSS_WEIGHT * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        step += 1
        elapsed = time.monotonic() - started
        progress = max(step / args.steps, elapsed / (60.0 * args.minutes))
        if step % args.eval_every == 0 or progress >= 1.0 or step in (1, 20):
            valid_loss, smallest = validate(model, valid, args.context, router, args.batch)
            history.append(
                {
                    "step": step,
                    "seconds": round(elapsed, 1),
                    "train_loss": round(loss.item(), 4),
                    "valid_loss": round(valid_loss, 4),
                    "valid_perplexity": round(math.exp(valid_loss), 3),
                    "balance_loss": round(balance.item(), 4),
                    "smallest_expert_share": round(smallest, 4),
                    "gradient_norm": round(norm.item(), 3),
                }
            )
            print(json.dumps(history[-1]), flush=True)
            if valid_loss < best_loss:
                best_loss = valid_loss
                best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}

    seconds = time.monotonic() - started
    model.load_state_dict(best_weights)
    model.to(device="cpu", dtype=torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=END, eos_token_id=END, pad_token_id=END, do_sample=False)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    record = {
        "parameters": parameters,
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": step,
        "tokens_per_step": args.batch * args.context,
        "epochs": round(step * args.batch * args.context / len(train), 1),
        "training_seconds": round(seconds, 1),
        "best_valid_loss": round(best_loss, 4),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("work", "out", "device")},
        "history": history,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{step} steps in {seconds:.0f} s, best validation loss {best_loss:.4f}")


if __name__ == "__main__":
    main()
