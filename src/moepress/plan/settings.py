# SPDX-License-Identifier: Apache-2.0
"""Settings: what a user asks for, checked; and the presets that reproduce the papers. Pure, no torch.

Presets and how they scale. MiLo (arXiv 2504.02658) publishes two strategies for each of two models, all 3 bits, groups
of 64, INT3 factors:

              Mixtral-8x7B (hidden 4096)    DeepSeek-MoE-16B (hidden 2048)
    milo-s1   dense-512 + kurtosis-16       dense-800
    milo-s2   dense-1024 + kurtosis-32      dense-1024 + frequency-32

with 20 alternations for Mixtral and 10 for DeepSeek. On these two families they are used as published. For others,
which of the two to follow is decided by the experts of a layer: up to 16 is Mixtral's kind (few, balanced), more is
DeepSeek's (many, unevenly used). Ranks are multiplied by hidden_size over that model's hidden size, dense ranks
rounded to whole numbers, and the published kurtosis rule, which knows averages 16 and 32 alone, gives way to the
general one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moepress.errors import PlanError
from moepress.format.spec import FACTOR_BITS, WeightSpec
from moepress.plan.ranks import parse_policy

METHODS = ("rtn", "hqq", "milo", "mse", "gptq", "gptq-mcmoe")
CALIBRATED = ("gptq", "gptq-mcmoe")
"""Methods that round with calibration statistics; the second is the variant that MC-MoE released."""
PRESETS = ("milo-s1", "milo-s2")
FEW_EXPERTS = 16
MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One recipe for a whole model. Unknown or contradictory values raise PlanError."""

    method: str = "milo"
    """rtn; hqq; milo (HQQ alternating with compensators); mse (each group's least squared error); gptq, which needs
    statistics, as hqq with ranks does."""
    bits: int = 3
    group_size: int = 64
    ranks: str = "uniform-0"
    """A sum of rank policies, such as `dense-512+kurtosis-16`; see moepress.plan.ranks."""
    factor_bits: int = 0
    """Width of the compensators' factors: 3 (MiLo's rule), 4, 8 or 16 (fp16); 0 is 3 for milo and 4 for others."""
    iterations: int = 10
    """Alternations after the first pass; the paper's stopping rule may end them sooner."""
    refit: bool = True
    """Whether factors are refitted to each other while they are quantised (ours); False is MiLo's own way."""
    keep: tuple[str, ...] = ()
    """Weights to leave as they are: glob patterns on names, roles (attn.q) or role groups (expert)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PlanError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        WeightSpec(bits=self.bits, group_size=self.group_size)
        if not self.factor_bits:
            # fitted to calibration data, 3-bit factors lose half of what 4-bit ones win back (docs/LOG.md)
            object.__setattr__(self, "factor_bits", 3 if self.method == "milo" else 4)
        if self.factor_bits not in FACTOR_BITS:
            raise PlanError(f"factor_bits {self.factor_bits} is not supported; choose one of {FACTOR_BITS}")
        if not 0 <= self.iterations <= MAX_ITERATIONS:
            raise PlanError(f"iterations {self.iterations} is not between 0 and {MAX_ITERATIONS}")
        ranked = any(term.amount for term in parse_policy(self.ranks))
        if ranked and self.method in ("rtn", "mse"):
            raise PlanError(f"method {self.method} has no compensators, but ranks are {self.ranks}; use --method milo")
        if self.method == "milo" and not ranked:
            raise PlanError(f"method milo without ranks ({self.ranks}) is method hqq; use --method hqq or give a rank")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"keep": list(self.keep)}


def preset(name: str, model_type: str, hidden_size: int, num_experts: int) -> Settings:
    """The settings of a preset for a model, by the rule in this module's docstring."""
    if name not in PRESETS:
        raise PlanError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    first = name == "milo-s1"
    if num_experts <= FEW_EXPERTS:
        scale = hidden_size / 4096
        published = model_type == "mixtral" and hidden_size == 4096
        rule = "milo-kurtosis" if published else "kurtosis"
        dense, average = (512, 16) if first else (1024, 32)
        return Settings(ranks=f"dense-{round(dense * scale)}+{rule}-{average * scale:g}", iterations=20)
    scale = hidden_size / 2048
    ranks = f"dense-{round((800 if first else 1024) * scale)}"
    return Settings(ranks=ranks if first else f"{ranks}+frequency-{32 * scale:g}", iterations=10)
