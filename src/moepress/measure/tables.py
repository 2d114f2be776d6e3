# SPDX-License-Identifier: Apache-2.0
"""What each choice of a menu costs a weight: quantise, and weigh the error with the inputs' moment.

    loss = sum_n F_n (E M E^T)_nn        E = D - W [N, K], M the moment [K, K], F [N] (gradients.py, probe.py)

The sites of one stage do not depend on each other, and those with equally long inputs go through GPTQ together, as many
as a fixed amount of memory allows. An expert that too few tokens reach has no moment worth the name: all its inputs
count alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from moepress.format.weight import affine
from moepress.graph.view import WeightRef
from moepress.measure.calibration import MIN_TOKENS, CalibrationSettings
from moepress.measure.site import Site
from moepress.quantize.affine import AffineWeight, group_views, row_chunks
from moepress.quantize.gptq import GptqOptions, gptq, make_metric
from moepress.quantize.hqq import hqq
from moepress.quantize.rtn import rtn
from moepress.quantize.sites import Sites, Width, row_errors

_BATCH_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_LOOKED_AT = 8
"""Well-fed experts whose inputs stand for those of a starved one; each costs a pass over its tokens."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One weight at one width."""

    job: Job
    ref: WeightRef
    width: Width
    weight: torch.Tensor
    """float32 [N, K], not to be written to."""
    base: AffineWeight


@dataclass(frozen=True, kw_only=True)
class Job:
    """A site, and whether its own moment counts; where not, the identity does."""

    site: Site
    fed: bool

    def moment(self) -> torch.Tensor:
        """float32 [K, K] for quantising."""
        return self.site.moment if self.fed else _identity(self.site)


def is_short(site: Site, min_tokens: int = MIN_TOKENS) -> bool:
    """Whether this is a routed expert that too few tokens reach."""
    return site.refs[0].expert is not None and site.tokens < max(min_tokens, 1)


def usable_moment(site: Site, stage: Sequence[Site], *, min_tokens: int = MIN_TOKENS) -> torch.Tensor:
    """The site's moment [K, K], or for an expert with few tokens the isotropic one that stands in for it.

    That is the identity times the mean square that a token's inputs have at the stage's well-fed sites (the first
    `_LOOKED_AT` of them) and the expert's share of tokens, at least one; the bare identity where no site is well fed.
    """
    if not is_short(site, min_tokens):
        return site.moment
    fed = list(islice((each for each in stage if not is_short(each, min_tokens)), _LOOKED_AT))
    scale = max(site.tokens, 1) * sum(map(_mean_square, fed)) / len(fed) if fed else 1.0
    return _identity(site).mul_(scale)


def batches_of(stage: Sequence[Site], device: str | torch.device) -> Iterator[list[Site]]:
    """A stage's sites in order, in lists of one input length whose joint work takes a bounded amount of memory."""
    limit = _BATCH_BYTES[torch.device(device).type]
    batch: list[Site] = []
    for site in stage:
        if batch and (_columns(site) != _columns(batch[0]) or _num_bytes([*batch, site]) > limit):
            yield batch
            batch = []
        batch.append(site)
    if batch:
        yield batch


def quantised(batch: Sequence[Job], settings: CalibrationSettings) -> Iterator[Entry]:
    """Every weight of a batch of `batches_of` at every width that the settings ask for."""
    if settings.method != "gptq":
        yield from _by_itself(batch, settings)
    elif len(batch) == 1 and _num_bytes([batch[0].site]) > _BATCH_BYTES[batch[0].site.device.type]:
        yield from _one_by_one(batch[0], settings)
    else:
        yield from _together(batch, settings)


def weighted_error(entry: Entry, rows: torch.Tensor | None) -> float:
    """sum_n F_n (E M E^T)_nn of F [N]; all F and M's diagonal are 1 for a job that is not fed."""
    total = torch.zeros((), dtype=torch.float64, device=entry.weight.device)
    step = max(1, (1 << 24) // entry.weight.shape[1])
    for first in range(0, len(entry.weight), step):
        part = slice(first, first + step)
        error = error_of(entry, part)
        if entry.job.fed:
            assert rows is not None, f"{entry.ref.name} has no sensitivities"
            squares = row_errors(error, entry.job.site.moment).double() * rows[part].to(total)
        else:
            squares = error.square_().sum(1, dtype=torch.float64)
        total += squares.sum()
    return max(total.item(), 0.0)  # rounding may leave a sum of nothing below 0


def error_of(entry: Entry, rows: slice = slice(None)) -> torch.Tensor:
    """D - W of some rows, float32 [n, K]."""
    base = entry.base
    values = affine(base.codes[rows], base.scale[rows], base.zero[rows], entry.width[1])
    return values.sub_(entry.weight[rows])


def reference_rtn(weight: torch.Tensor, bits: int, group_size: int = 128) -> torch.Tensor:
    """A float weight [N, K] as PMQ's authors round it for their losses: dequantised, float32 [N, K].

    Range from min(w, 0) to max(w, 0) of each group, a whole number for the zero, no fp16; one bit is sign(w) times the
    group's mean |w|, 0 counting as positive (MC-MoE's released code; arXiv 2410.06270, appendix A.2).
    """
    result = torch.empty(weight.shape, device=weight.device)
    for rows in row_chunks(weight):
        parts = [_reference_groups(groups, bits).flatten(1) for groups in group_views(weight[rows].float(), group_size)]
        result[rows] = torch.cat(parts, 1)
    return result


def _reference_groups(groups: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 1:
        size = groups.abs().mean(-1, keepdim=True)
        return torch.where(groups >= 0, size, -size)
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros
    zero = (-low / scale).round_()
    return (groups / scale).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)


# ---------------------------------------------------------------------------------------------- ways to quantise


def _by_itself(batch: Sequence[Job], settings: CalibrationSettings) -> Iterator[Entry]:
    solve = {"hqq": hqq, "rtn": rtn}[settings.method]
    for job in batch:
        for ref in job.site.refs:
            weight = job.site.weights[ref.name]
            for width in settings.widths(ref):
                base = solve(ref.name, weight, *width)
                yield Entry(job=job, ref=ref, width=width, weight=weight, base=base)


def _together(batch: Sequence[Job], settings: CalibrationSettings) -> Iterator[Entry]:
    """All weights of the batch in one run of GPTQ for each width."""
    weights = [{ref.name: job.site.weights[ref.name] for ref in job.site.refs} for job in batch]
    sites = Sites(weights, [job.moment() for job in batch], GptqOptions(sweeps=settings.sweeps))
    for width in settings.widths(batch[0].site.refs[0]):
        found = sites.gptq({name: width for own in weights for name in own})
        for job, own in zip(batch, weights, strict=True):
            for ref in job.site.refs:
                yield Entry(job=job, ref=ref, width=width, weight=own[ref.name], base=found[ref.name])


def _one_by_one(job: Job, settings: CalibrationSettings) -> Iterator[Entry]:
    """Large weights: the moment, its factor and one weight are held, and no copy of any."""
    options = GptqOptions(sweeps=settings.sweeps)
    metric = make_metric(job.moment().unsqueeze(0), options)
    for ref in job.site.refs:
        weight = job.site.weights[ref.name]
        for width in settings.widths(ref):
            (base,) = gptq([ref.name], weight.unsqueeze(0), metric, [width[0]], width[1], options)
            yield Entry(job=job, ref=ref, width=width, weight=weight, base=base)


# ---------------------------------------------------------------------------------------------- sizes


def _columns(site: Site) -> int:
    return site.refs[0].shape[1]


def _num_bytes(sites: Sequence[Site]) -> int:
    """Of moments, factors, weights and their errors, all with room to work in."""
    return sum(4 * (5 * _columns(site) ** 2 + 8 * sum(ref.numel for ref in site.refs)) for site in sites)


def _identity(site: Site) -> torch.Tensor:
    return torch.eye(_columns(site), device=site.device)


def _mean_square(site: Site) -> float:
    """Of what one token's inputs hold, over all calibration tokens: trace M / (K tokens)."""
    total = torch.zeros((), dtype=torch.float64, device=site.device)
    for x, scale in site.inputs():
        total += (x if scale is None else x * scale.unsqueeze(1)).square().sum(dtype=torch.float64)
    return total.item() / (_columns(site) * site.tokens * site.total)
