# SPDX-License-Identifier: Apache-2.0
"""GPTQ of all weights that wait for the same inputs, in as few loops over columns as their shapes allow.

Weights that read one input share its second moment, and rows do not know of each other: those of one width and group
size become one taller matrix. Inputs of one length (a layer's experts) become a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from moepress.errors import CheckpointError
from moepress.quantize.affine import AffineWeight
from moepress.quantize.gptq import GptqOptions, Metric, gptq, make_metric

Width = tuple[int, int]
"""Bits and group size."""


class Sites:
    """Inputs of one length K with the weights that read them; the work on their moments is done once for any width."""

    def __init__(
        self,
        weights: Sequence[Mapping[str, torch.Tensor]],
        moments: Sequence[torch.Tensor],
        options: GptqOptions | None = None,
    ) -> None:
        """Per input: name -> float32 weight [N, K], and the float32 second moment [K, K] (not copied if it is one)."""
        self.weights, self._moments, self._options = list(weights), list(moments), options or GptqOptions()

    @cached_property
    def metric(self) -> Metric:
        """Of all inputs, in order."""
        single = len(self._moments) == 1
        stacked = self._moments[0].unsqueeze(0) if single else torch.stack(self._moments)
        return make_metric(stacked, self._options)

    def gptq(self, widths: Mapping[str, Width]) -> dict[str, AffineWeight]:
        """Codes, scales and zeros of the weights that `widths` names."""
        done: dict[str, AffineWeight] = {}
        for (group_size, _), units in self._units(widths).items():
            indices = [index for index, _, _ in units]
            rows = torch.stack([torch.cat([self.weights[i][name] for name in names]) for i, names, _ in units])
            labels = [" + ".join(names) for _, names, _ in units]
            bits = [each for _, _, each in units]
            try:
                found = gptq(labels, rows, _take(self.metric, indices), bits, group_size, self._options)
            except CheckpointError:
                for index, names, width in units:  # each alone, for the error to name the weight to blame
                    for name in names:
                        self.round(index, name, self.weights[index][name], (width, group_size))
                raise
            for (index, names, _), base in zip(units, found, strict=True):
                done |= _split(base, {name: len(self.weights[index][name]) for name in names})
        return done

    def round(self, index: int, name: str, target: torch.Tensor, width: Width) -> AffineWeight:
        """`target` [N, K] in the place of a weight that reads input `index`."""
        metric = _take(self.metric, [index])
        return gptq([name], target.unsqueeze(0), metric, [width[0]], width[1], self._options)[0]

    def _units(self, widths: Mapping[str, Width]) -> dict[tuple[int, int], list[tuple[int, list[str], int]]]:
        """(group size, rows) -> matrices as (input, names of the weights they are made of, bits)."""
        units: dict[tuple[int, int], list[tuple[int, list[str], int]]] = {}
        for index, own in enumerate(self.weights):
            alike: dict[Width, list[str]] = {}
            for name in own:
                if name in widths:
                    alike.setdefault(widths[name], []).append(name)
            for (bits, group_size), names in alike.items():
                rows = sum(len(own[name]) for name in names)
                units.setdefault((group_size, rows), []).append((index, names, bits))
        return units


def row_errors(error: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The diagonal of E H E^T [N] for E [N, K]: each output row's mean squared error over all calibration tokens."""
    step = max(1, (1 << 24) // error.shape[1])
    return torch.cat([((rows @ moment) * rows).sum(1) for rows in error.split(step)])


def _take(metric: Metric, indices: Sequence[int]) -> Metric:
    if list(indices) == list(range(len(metric.moments))):
        return metric
    if len(indices) == 1:  # a view: a large moment must not be copied
        here = slice(indices[0], indices[0] + 1)
        return Metric(metric.moments[here], metric.extra[here], metric.order[here], metric.upper[here])
    chosen = torch.tensor(list(indices), device=metric.moments.device)
    return Metric(
        *(each.index_select(0, chosen) for each in (metric.moments, metric.extra, metric.order, metric.upper))
    )


def _split(base: AffineWeight, rows: Mapping[str, int]) -> dict[str, AffineWeight]:
    parts, start = {}, 0
    for name, count in rows.items():
        here = slice(start, start + count)
        parts[name] = AffineWeight(base.codes[here], base.scale[here], base.zero[here])
        start += count
    return parts
