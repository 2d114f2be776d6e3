# SPDX-License-Identifier: Apache-2.0
"""Step 3: measure the checkpoint on the CPU and write its model card.

Perplexity on the held-out excerpt, one greedy sample and the share of routed work each expert
gets, all with the stock transformers model in bfloat16 as saved.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from prepare import EXCERPT
from transformers import AutoTokenizer, Qwen2MoeForCausalLM

PROMPT = "It was"
WINDOW = 512


@torch.no_grad()
def perplexity(model: Qwen2MoeForCausalLM, ids: torch.Tensor) -> tuple[float, int, list]:
    """Perplexity over windows that do not overlap, tokens predicted, and each expert's picks.

    Every window predicts the tokens after its first one; a last short window counts too.
    """
    picks = [torch.zeros(model.config.num_experts) for _ in model.model.layers]

    def count(layer: int):
        def hook(module, args, output):
            picks[layer] += torch.bincount(output[-1].flatten(), minlength=len(picks[layer]))

        return hook

    hooks = [layer.mlp.gate.register_forward_hook(count(index)) for index, layer in enumerate(model.model.layers)]
    total, tokens = 0.0, 0
    for window in ids.split(WINDOW):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        tokens += len(window) - 1
    for hook in hooks:
        hook.remove()
    shares = [[round(x, 3) for x in (p / p.sum()).tolist()] for p in picks]
    return math.exp(total / tokens), tokens, shares


def sample(model: Qwen2MoeForCausalLM, tokenizer, new_tokens: int = 40) -> str:
    """What greedy decoding makes of the prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder with the checkpoint and the tokenizer")
    parser.add_argument("work", type=Path, help="folder that prepare.py wrote (excerpt, data.json)")
    parser.add_argument("training", type=Path, help="training.json that train.py wrote")
    parser.add_argument("--date", required=True, help="date of the measurement, YYYY-MM-DD")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = Qwen2MoeForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    text = (args.work / "excerpt.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    value, tokens, shares = perplexity(model, ids)
    greedy = sample(model, tokenizer)

    data = json.loads((args.work / "data.json").read_text())
    training = json.loads(args.training.read_text())
    rows = "\n".join(
        f"| {layer} | " + " | ".join(f"{100 * share:.1f} %" for share in row) + " |" for layer, row in enumerate(shares)
    )
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    fields = {
        "date": args.date,
        "parameters": f"{training['parameters']:,}",
        "megabytes": f"{(args.model / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "train_megabytes": f"{data['train_bytes'] / 1e6:.1f}",
        "train_tokens": f"{data['train_tokens']:,}",
        "train_documents": f"{data['train_documents']:,}",
        "valid_documents": f"{data['valid_documents']:,}",
        "epochs": training["epochs"],
        "steps": f"{training['steps']:,}",
        "tokens_per_step": f"{training['tokens_per_step']:,}",
        "minutes": f"{training['training_seconds'] / 60:.1f}",
        "hardware": training["hardware"],
        "torch": training["torch"],
        "transformers": training["transformers"],
        "valid_perplexity": f"{math.exp(training['best_valid_loss']):.1f}",
        "perplexity": f"{value:.2f}",
        "excerpt_tokens": f"{tokens:,}",
        "excerpt_bytes": f"{data['excerpt_bytes']:,}",
        "chapters": "\n".join(f"- {name}" for name in EXCERPT),
        "window": WINDOW,
        "prompt": PROMPT,
        "sample": "\n".join("> " + line for line in greedy.splitlines()),
        "shares": rows,
    }
    for name, field in fields.items():
        template = template.replace("{{" + name + "}}", str(field))
    (args.model / "README.md").write_text(template, encoding="utf-8")
    print(json.dumps({"perplexity": value, "tokens": tokens, "sample": greedy, "experts": shares}))


if __name__ == "__main__":
    main()
