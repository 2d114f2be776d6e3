# SPDX-License-Identifier: Apache-2.0
"""What is timed: one layer of a shape at a token count, what it must read and compute, and its random inputs.

Counts are those of a perfect kernel: the weights of the experts hit once, the input read, the intermediate written and
read, the output written, activations of two bytes; 2 FLOP a multiplication. A routing is chosen once for a problem, so
every contender and every copy of the weights does the same work. Shared experts are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepress.errors import EvaluationError

DENSE, MOE = "dense", "moe"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYERS = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "deepseek-moe-16b": (64, 6, 2048, 1408),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "deepseek-v3": (256, 8, 7168, 2048),
}
"""Routed experts of one layer: experts E, chosen for a token k, hidden size H, inner size I."""

_ACTIVATION_BYTES = 2
_ROUTINGS = 16
"""Drawn for a problem, of which one is taken."""


@dataclass(frozen=True)
class Draw:
    """Inputs of a problem: x [T, K or H]; for experts also ids [T, k] int64 and weights [T, k] float32."""

    x: torch.Tensor
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def hit(self) -> int:
        """How many experts get a token; 1 for a dense layer."""
        return 1 if self.ids is None else len(self.ids.unique())


@dataclass(frozen=True)
class Problem:
    """A dense layer y = x W^T, W [N, K], or experts down(silu(gate(x)) * up(x)), at T tokens.

    `shape` is (N, K) or (E, k, H, I). The weights are `bits` wide with a scale (and a zero) for each `group_size`
    inputs and a compensator of `rank`; a contender that stores 16 bits ignores these three.
    """

    kind: str
    shape: tuple[int, ...]
    tokens: int
    bits: int = 3
    group_size: int = 64
    rank: int = 0
    dtype: str = "bf16"
    name: str = ""

    @property
    def moe(self) -> bool:
        return self.kind == MOE

    @property
    def experts(self) -> int:
        """Experts of the layer; 1 for a dense layer."""
        return self.shape[0] if self.moe else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of each matrix of one expert: gate, up, down; or the one dense matrix."""
        if not self.moe:
            return ((self.shape[0], self.shape[1]),)
        _, _, hidden, inner = self.shape
        return (inner, hidden), (inner, hidden), (hidden, inner)

    @property
    def weights(self) -> int:
        """Weights of one expert, or of the dense matrix."""
        return sum(n * k for n, k in self.matrices)

    @property
    def flops(self) -> int:
        """Of the layer itself; a compensator's own are not counted."""
        chosen = self.shape[1] if self.moe else 1
        return 2 * self.tokens * chosen * self.weights

    @property
    def activation_bytes(self) -> int:
        """Input, intermediate (written and read) and output."""
        if not self.moe:
            return _ACTIVATION_BYTES * self.tokens * sum(self.shape)
        _, chosen, hidden, inner = self.shape
        return _ACTIVATION_BYTES * self.tokens * 2 * (hidden + chosen * inner)

    def weight_bytes(self, bits_per_weight: float, experts: int | None = None) -> int:
        """Of so many experts (all of them by default), at so many bits a weight with everything stored counted."""
        return round((self.experts if experts is None else experts) * self.weights * bits_per_weight / 8)

    def factor_bits_per_weight(self, factor_bits: float) -> float:
        """What the compensator adds to the bits of a weight: rank * (N + K) numbers a matrix."""
        return factor_bits * self.rank * sum(n + k for n, k in self.matrices) / self.weights

    def draw(self, seed: int, device: torch.device | str) -> Draw:
        """Standard normal x and uniform, independent routing, the same on every machine.

        With few tokens a routing may hit many experts or few, which decides how long it takes: of some, the first that
        hits as many as are hit on average, or nearly.
        """
        generator = torch.Generator().manual_seed(seed)
        width = self.shape[2] if self.moe else self.shape[1]
        x = torch.randn(self.tokens, width, generator=generator).to(device, self.torch_dtype)
        if not self.moe:
            return Draw(x)
        experts, chosen = self.shape[:2]
        average = experts * (1 - (1 - chosen / experts) ** self.tokens)
        draws = (torch.rand(self.tokens, experts, generator=generator).topk(chosen, dim=1) for _ in range(_ROUTINGS))
        top = min(draws, key=lambda drawn: abs(len(drawn.indices.unique()) - round(average)))
        return Draw(x, top.indices.to(device), torch.softmax(top.values, dim=1).to(device))

    def title(self) -> str:
        """For people: the layer, its format and T."""
        dense = f"{self.shape[0]}x{self.shape[-1]}"
        layer = self.name or ("experts " + ",".join(map(str, self.shape)) if self.moe else dense)
        rank = f", rank {self.rank}" if self.rank else ""
        return f"{layer}, {self.bits} bits, groups of {self.group_size}{rank}, {self.dtype}, T = {self.tokens}"


def parse_shape(layer: str | None, dense: str | None, moe: str | None) -> tuple[str, tuple[int, ...], str]:
    """What --layer, --dense or --moe said: kind, shape and name. Raises EvaluationError for anything unusable."""
    if sum(given is not None for given in (layer, dense, moe)) > 1:
        raise EvaluationError("--layer, --dense and --moe each say what to time; give one of them")
    if dense is not None:
        return DENSE, _sizes("--dense", dense, "x", 2, "8192x8192 (N outputs x K inputs)"), ""
    if moe is not None:
        shape = _sizes("--moe", moe, ",", 4, "8,2,4096,14336 (experts, chosen, hidden, inner)")
        if shape[1] > shape[0]:
            raise EvaluationError(f"--moe {moe!r} chooses {shape[1]} of {shape[0]} experts")
        return MOE, shape, ""
    name = layer or "mixtral-8x7b"
    if name not in LAYERS:
        raise EvaluationError(f"--layer {name!r} is unknown; choose one of {', '.join(LAYERS)}, or give --moe E,k,H,I")
    return MOE, LAYERS[name], name


def parse_tokens(text: str) -> tuple[int, ...]:
    """`1,8,64` to token counts. Raises EvaluationError."""
    return _sizes("--tokens", text, ",", None, "1,8,64")


def _sizes(option: str, text: str, between: str, count: int | None, example: str) -> tuple[int, ...]:
    parts = text.lower().split(between)
    sizes = tuple(int(part) for part in parts if part.strip().isdecimal())
    if len(sizes) != len(parts) or count not in (None, len(sizes)) or min(sizes) < 1:
        raise EvaluationError(f"{option} {text!r} is not of the form {example}")
    return sizes
