# SPDX-License-Identifier: Apache-2.0
"""Methods and ranks side by side in one call: each weight gets what it would get alone, fitted to its own input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moepress.errors import CheckpointError
from moepress.format.spec import WeightSpec
from moepress.format.weight import dequantize
from moepress.quantize.calibrated import VARIANTS, compress_together
from moepress.quantize.gptq import gptq, make_metric
from moepress.quantize.hqq import hqq
from moepress.quantize.job import CompressedWeight, assemble, compress_weight
from moepress.quantize.whitened import whitened

K = 96
CHOICES = {
    "gptq plain": ("gptq", WeightSpec(bits=2, group_size=32)),
    "gptq wider": ("gptq", WeightSpec(bits=3, group_size=32)),
    "gptq ranked": ("gptq", WeightSpec(bits=2, group_size=32, rank=6, factor_bits=4)),
    "mc-moe plain": ("gptq-mcmoe", WeightSpec(bits=2, group_size=64)),
    "mc-moe ranked": ("gptq-mcmoe", WeightSpec(bits=3, group_size=64, rank=3, factor_bits=8)),
    "hqq plain": ("hqq", WeightSpec(bits=2, group_size=32)),
    "hqq ranked": ("hqq", WeightSpec(bits=2, group_size=32, rank=6, factor_bits=3)),
    "milo plain": ("milo", WeightSpec(bits=4, group_size=64)),
    "milo ranked": ("milo", WeightSpec(bits=2, group_size=32, rank=6, factor_bits=3)),
    "rtn": ("rtn", WeightSpec(bits=3, group_size=32)),
}


def moment_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, K, generator=generator) * torch.exp(torch.randn(K, generator=generator))
    x = x + x @ torch.randn(K, K, generator=generator) / K**0.5
    return x.T @ x / len(x)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Three inputs; on each a weight of every choice, named `<input> <choice>`."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        {f"{i} {choice}": (0.02 * torch.randn(24, K, generator=generator)).to(dtype) for choice in CHOICES}
        for i in range(3)
    ]
    return weights, [moment_of(i) for i in range(3)]


def together(
    weights: list[dict[str, torch.Tensor]], moments: list[torch.Tensor], **options: Any
) -> dict[str, CompressedWeight]:
    names = [name for own in weights for name in own]
    methods, specs = zip(*(CHOICES[name[2:]] for name in names), strict=True)
    given = dict(zip(names, specs, strict=True)), dict(zip(names, methods, strict=True))
    return compress_together(weights, moments, *given, **options)


def lost(weight: torch.Tensor, done: CompressedWeight, spec: WeightSpec, moment: torch.Tensor) -> float:
    error = (dequantize(done.parts, spec, *weight.shape) - weight).double()
    return (error @ moment.double() * error).sum().item()


def alone(name: str, weight: torch.Tensor, moment: torch.Tensor, **options: Any) -> CompressedWeight:
    """The same from the solvers themselves."""
    method, spec = CHOICES[name[2:]]
    width = spec.bits, spec.group_size

    def base(target: torch.Tensor) -> Any:
        if method not in VARIANTS:
            return hqq(name, target, *width)
        options = VARIANTS[method]
        return gptq([name], target[None], make_metric(moment[None], options), [width[0]], width[1], options)[0]

    if spec.rank and method != "milo":
        found = whitened(name, weight, moment, spec, base)
        return assemble(weight, spec, found.base, found.factors, 2)
    if method in VARIANTS:
        return assemble(weight, spec, base(weight), {})
    return compress_weight(name, weight, spec, method, **options)


def test_every_weight_comes_out_as_if_alone() -> None:
    weights, moments = inputs()
    done = together(weights, moments, iterations=2, refit=False)
    assert done.keys() == {name for own in weights for name in own}
    for own, moment in zip(weights, moments, strict=True):
        for name, weight in own.items():
            found, wanted = done[name], alone(name, weight, moment, iterations=2, refit=False)
            assert found.parts.keys() == wanted.parts.keys(), name
            assert all(torch.equal(found.parts[part], wanted.parts[part]) for part in found.parts), name
            assert (found.error, found.alternations) == (wanted.error, wanted.alternations), name


def test_errors_are_relative_and_the_parts_as_the_format_has_them() -> None:
    weights, moments = inputs(torch.bfloat16)
    done = together(weights, moments, iterations=1)
    for own in weights:
        for name, weight in own.items():
            spec = CHOICES[name[2:]][1]
            exact, found = weight.double(), dequantize(done[name].parts, spec, 24, K).double()
            assert done[name].error == pytest.approx(((found - exact).norm() / exact.norm()).item(), rel=1e-4)
            shapes = {part: tuple(tensor.shape) for part, tensor in done[name].parts.items()}
            assert shapes == {part: shape for part, (_, shape) in spec.parts(24, K).items()}


def test_what_is_fitted_to_the_inputs_serves_them_better() -> None:
    weights, moments = inputs()
    done = together(weights, moments)
    for i, moment in enumerate(moments):
        own = {c: lost(weights[i][f"{i} {c}"], done[f"{i} {c}"], CHOICES[c][1], moment) for c in CHOICES}
        assert own["gptq plain"] < 0.7 * own["hqq plain"]
        assert own["gptq ranked"] < 0.9 * own["gptq plain"]
        assert own["hqq ranked"] < 0.9 * own["milo ranked"]
        # another input's moment would not do
        stranger = together([weights[i]], [moments[i - 1]])
        for c in ("gptq plain", "hqq ranked"):
            assert own[c] < lost(weights[i][f"{i} {c}"], stranger[f"{i} {c}"], CHOICES[c][1], moment)


@pytest.mark.parametrize("choice", CHOICES)
def test_damaged_weights_are_counted_and_named(choice: str) -> None:
    weights, moments = inputs()
    name = f"1 {choice}"
    weights[1][name][3, :2], weights[1][name][5, 5] = float("nan"), float("-inf")
    with pytest.raises(CheckpointError, match=f"^{name} holds 2 NaN and 1 Inf of 2304 values"):
        together(weights, moments)
