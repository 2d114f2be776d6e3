# SPDX-License-Identifier: Apache-2.0
"""Descent: the error falls with every sweep and every group, and the slope it goes by is the true one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moepress.quantize.descent as module
from moepress.quantize import gptq_triton
from moepress.quantize.descent import descend, descend_block, values_of
from moepress.quantize.gptq import GptqOptions, _round_columns, make_metric
from moepress.quantize.grid import codes_of, fit_groups

BITS = (1, 2, 3, 4, 8)
SHAPES = [(32, 70), (64, 160), (128, 100)]
"""Group size and columns; the last group is short."""


def start(bits: tuple[int, ...], rows: int, group: int, k: int, seed: int, rounded: bool = False) -> dict[str, Any]:
    """Arguments of `descend` for weights of these widths: after GPTQ, or after plain rounding; one input is dead."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.02 * torch.randn(len(bits), rows, k, generator=generator)
    x = torch.randn(len(bits), 3 * k, k, generator=generator)
    x = (x + x @ torch.randn(k, k, generator=generator) / k**0.5) * torch.exp(torch.randn(k, generator=generator))
    x[:, :, 3] = 0
    metric = make_metric(x.mT @ x / (3 * k), GptqOptions())
    top = torch.tensor([2.0**b - 1 for b in bits])
    importance = metric.moments.diagonal(dim1=1, dim2=2) + metric.extra
    scale, zero = fit_groups([str(b) for b in bits], weights, importance, top, group)
    if rounded:
        spread = [each.repeat_interleave(group, 2)[:, :, :k] for each in (scale, zero)]
        codes = codes_of(weights, *spread, top[:, None, None])
    else:
        codes = _round_columns(weights, metric, scale, zero, top, torch.ones(len(bits), dtype=torch.bool), group, 128)
    return {"weights": weights, "moments": metric.moments, "extra": metric.extra, "codes": codes, "scale": scale,
            "zero": zero, "top": top, "group_size": group}  # fmt: skip


def lost(given: dict[str, Any], codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """E H E^T of every row [B, N] in float64, H damped."""
    group, k = given["group_size"], codes.shape[2]
    s, z = (each.double().repeat_interleave(group, 2)[:, :, :k] for each in (scale, zero))
    error = (codes.double() - z) * s - given["weights"].double()
    h = given["moments"].double() + torch.diag_embed(given["extra"].double())
    return (error @ h * error).sum(2)


@settings(max_examples=12)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.booleans())
def test_no_row_gets_worse_with_any_sweep(shape: tuple[int, int], seed: int, rounded: bool) -> None:
    given = start(BITS, 6, *shape, seed, rounded)
    before = lost(given, given["codes"], given["scale"], given["zero"])
    for sweeps in (1, 2, 3):
        now = lost(given, *descend(**given, sweeps=sweeps))
        assert (now <= before * (1 + 1e-4)).all()
        before = now


@pytest.mark.parametrize(("group", "k"), SHAPES)
def test_three_sweeps_are_worth_it(group: int, k: int) -> None:
    given = start((1, 2, 3), 24, group, k, 5)
    before = lost(given, given["codes"], given["scale"], given["zero"]).sum(1)
    after = lost(given, *descend(**given, sweeps=3)).sum(1)
    assert (after < 0.96 * before).all()


def test_one_bit_keeps_its_scales_and_the_input_is_left_alone() -> None:
    given = start(BITS, 6, 64, 160, 1)
    before = {key: value.clone() if torch.is_tensor(value) else value for key, value in given.items()}
    codes, scale, zero = descend(**given, sweeps=3)
    assert all(torch.equal(given[key], value) for key, value in before.items() if torch.is_tensor(value))
    assert torch.equal(scale[0], given["scale"][0]) and torch.equal(zero[0], given["zero"][0])
    assert not torch.equal(codes[0], given["codes"][0])
    assert all(not torch.equal(scale[i], given["scale"][i]) for i in range(1, 5))
    for value in (scale, zero):
        assert torch.equal(value, value.half().float())
    assert torch.equal(codes, codes.round()) and (codes >= 0).all() and (codes <= given["top"][:, None, None]).all()


@pytest.mark.parametrize(("group", "k"), SHAPES)
def test_the_slope_is_that_of_the_codes(group: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is handed E H of everything done so far, in whatever order; no error may pile up."""
    given, seen = start(BITS, 6, group, k, 2), []
    block = module.descend_block

    def watched(value: torch.Tensor, slope: torch.Tensor, *rest: torch.Tensor) -> Any:
        seen.append((value.clone(), slope.clone()))
        return block(value, slope, *rest)

    monkeypatch.setattr(module, "descend_block", watched)
    codes, scale, zero = descend(**given, sweeps=4)
    count = len(range(0, k, group))
    assert len(seen) == 4 * count
    # the values of the last sweep's blocks, before they move; blocks behind them are as they end
    parts = codes.split(group, 2)
    ends = [values_of(part, scale[:, :, g], zero[:, :, g]) for g, part in enumerate(parts)]
    h = given["moments"].double() + torch.diag_embed(given["extra"].double())
    for g in range(count):
        now = torch.cat([*ends[:g], *(value for value, _ in seen[3 * count + g :])], 2)
        wanted = ((now - given["weights"]).double() @ h)[:, :, g * group : (g + 1) * group]
        found = seen[3 * count + g][1]
        assert (found - wanted).norm() < 1e-4 * (given["weights"].double() @ h).norm()


def test_a_block_is_one_exact_coordinate_step_after_another() -> None:
    given = start((2, 3), 4, 64, 64, 3)
    h = (given["moments"] + torch.diag_embed(given["extra"])).double()
    s, z = given["scale"][:, :, 0], given["zero"][:, :, 0]
    value = values_of(given["codes"], s, z)
    slope = ((value - given["weights"]).double() @ h).float()
    codes, after = descend_block(value, slope, h.float(), s, z, given["top"])
    now = value.double()
    for j in range(64):
        # of all codes the one with the least error, by trying each
        tried = []
        for code in range(8):
            trial = now.clone()
            trial[:, :, j] = torch.where(code <= given["top"][:, None], (code - z) * s, torch.nan)
            error = trial - given["weights"]
            tried.append((error @ h * error).sum(2).nan_to_num(torch.inf))
        best = torch.stack(tried).argmin(0)
        assert torch.equal(codes[:, :, j].long(), best)
        now[:, :, j] = (best - z) * s
    wanted = (now - given["weights"]) @ h
    assert (after - wanted).norm() < 1e-4 * (given["weights"].double() @ h).norm()


def test_scale_and_zero_are_the_best_for_their_codes() -> None:
    given = start((3,), 5, 64, 64, 4)
    h = (given["moments"] + torch.diag_embed(given["extra"])).double()[0]
    codes, scale, zero = descend(**given, sweeps=1)
    found = lost(given, codes, scale, zero)[0]
    square = torch.linalg.cholesky(h).mT
    for n in range(5):
        basis = torch.stack([codes[0, n].double(), torch.ones(64, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(square @ basis, (square @ given["weights"][0, n].double())[:, None]).solution
        left = square @ (basis @ best)[:, 0] - square @ given["weights"][0, n].double()
        assert found[n].item() == pytest.approx(left.square().sum().item(), rel=1e-3)
        assert scale[0, n].item() == pytest.approx(best[0].item(), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@pytest.mark.parametrize(("rows", "width"), [(16, 128), (33, 40), (7, 1), (100, 72)])
def test_the_fused_loop_is_the_torch_one(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = start(BITS, rows, 128, max(width, 4), 6, rounded=True)
    own = (given["moments"] + torch.diag_embed(given["extra"])).cuda()[:, :width, :width]
    s, z, top = given["scale"][:, :, 0].cuda(), given["zero"][:, :, 0].cuda(), given["top"].cuda()
    value = values_of(given["codes"][:, :, :width].cuda(), s, z)
    slope = (value - given["weights"][:, :, :width].cuda()) @ own
    fused = descend_block(value, slope, own, s, z, top)
    monkeypatch.setattr(gptq_triton, "why_not", lambda _: "asked not to")
    plain = descend_block(value, slope, own, s, z, top)
    assert torch.equal(fused[0], plain[0])
    torch.testing.assert_close(fused[1], plain[1])
