# SPDX-License-Identifier: Apache-2.0
"""The job of weights that wait for the same inputs, compressed with these inputs' second moments: tensors in, tensors
out, like `quantize.job`, which does those that need no calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from moepress.format.spec import WeightSpec
from moepress.quantize.affine import AffineWeight
from moepress.quantize.gptq import MC_MOE, GptqOptions
from moepress.quantize.hqq import hqq
from moepress.quantize.job import CompressedWeight, assemble, check_finite, compress_weight
from moepress.quantize.sites import Sites, Width
from moepress.quantize.whitened import whitened

VARIANTS = {"gptq": GptqOptions(), "gptq-mcmoe": MC_MOE}
"""Methods that round with the inputs' moments."""


def compress_together(
    weights: Sequence[Mapping[str, torch.Tensor]],
    moments: Sequence[torch.Tensor],
    specs: Mapping[str, WeightSpec],
    methods: Mapping[str, str],
    iterations: int = 10,
    refit: bool = True,
) -> dict[str, CompressedWeight]:
    """Per input, name -> weight [N, K] and the float32 second moment [K, K]; a spec and a method for each name.

    A compensator of `hqq` and `gptq` is fitted to the moment, one of `milo` is not. Raises CheckpointError for NaN or
    Inf.
    """
    own = [{name: weight.float() for name, weight in each.items()} for each in weights]
    for each in own:
        for name, weight in each.items():
            check_finite(name, weight)
    sites = {method: Sites(own, moments, options) for method, options in VARIANTS.items()}
    done: dict[str, CompressedWeight] = {}
    for method, batch in sites.items():
        widths = {name: _width(specs[name]) for name in specs if methods[name] == method and not specs[name].rank}
        bases = batch.gptq(widths) if widths else {}
        done |= {
            name: assemble(each[name], specs[name], bases[name], {}) for each in own for name in each if name in bases
        }
    for index, each in enumerate(own):
        for name, weight in each.items():
            spec, method = specs[name], methods[name]
            if spec.rank and method != "milo":
                base = partial(_base, sites.get(method), index, name, _width(spec))
                fitted = whitened(name, weight, moments[index], spec, base)
                done[name] = assemble(weight, spec, fitted.base, fitted.factors, len(fitted.errors))
            elif name not in done:
                done[name] = compress_weight(name, weight, spec, method, iterations, refit)
    return done


def _base(batch: Sites | None, index: int, name: str, width: Width, target: torch.Tensor) -> AffineWeight:
    """What a compensated weight's codes are fitted with: GPTQ on its input, or HQQ."""
    return hqq(name, target, *width) if batch is None else batch.round(index, name, target, width)


def _width(spec: WeightSpec) -> Width:
    return spec.bits, spec.group_size
