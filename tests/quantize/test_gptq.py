# SPDX-License-Identifier: Apache-2.0
"""GPTQ against a textbook in float64, one row at a time; what mixing, chunking and poor moments must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moepress.quantize.gptq as module
from moepress.errors import CheckpointError
from moepress.format.weight import affine
from moepress.quantize import gptq_triton
from moepress.quantize.affine import AffineWeight
from moepress.quantize.gptq import MC_MOE, VARIANTS, GptqOptions, gptq, make_metric, round_block
from moepress.quantize.grid import codes_of
from moepress.quantize.hqq import hqq
from moepress.quantize.rtn import rtn

Gaussian = Callable[..., torch.Tensor]
PLAIN, ORDERED = VARIANTS["plain"], GptqOptions(sweeps=0)
SHAPES = [(32, 100), (64, 160), (128, 200)]
"""Group size and columns; the last group is short."""


def moment_of(k: int, tokens: int | None = None, seed: int = 1) -> torch.Tensor:
    """The second moment of inputs that go together, some of them much larger than others; float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * k, k, generator=generator)
    x = x + x @ torch.randn(k, k, generator=generator) / k**0.5 + x[:, :1]
    x = x * torch.exp(0.7 * torch.randn(k, generator=generator))
    return x.T @ x / len(x)


def one(weight: torch.Tensor, moment: torch.Tensor, bits: int, group: int, options: GptqOptions) -> AffineWeight:
    return gptq(["w"], weight[None], make_metric(moment[None], options), [bits], group, options)[0]


def values(found: AffineWeight, group: int) -> torch.Tensor:
    return affine(found.codes, found.scale, found.zero, group)


def damped(moment: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    exact = moment.double()
    mean = exact.diagonal().mean()
    return exact + torch.diag(torch.where(exact.diagonal() > 0, damping * mean, mean))


def lost(found: AffineWeight, weight: torch.Tensor, moment: torch.Tensor, group: int) -> float:
    """tr(E H E^T), float64."""
    error = (values(found, group) - weight).double()
    return (error @ moment.double() * error).sum().item()


def same(a: AffineWeight, b: AffineWeight) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)


def textbook(weight: torch.Tensor, moment: torch.Tensor, grid: AffineWeight, bits: int, group: int, order: list[int]):
    """Optimal Brain Quantizer in a given order, float64: after each column its input is struck from the inverse of H,
    and all columns that are left make up for its error. Codes on the scales and zeros of `grid`."""
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for n, row in enumerate(weight.double()):
        w, inverse = row.clone(), torch.linalg.inv(damped(moment))
        for j in order:
            s, z = grid.scale[n, j // group].double(), grid.zero[n, j // group].double()
            code = (w[j] / s + z).round().clamp(0, 2**bits - 1)
            w -= (w[j] - (code - z) * s) / inverse[j, j] * inverse[j]
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1.0  # struck out
            codes[n, j] = int(code)
    return codes


# ---------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("group", "k"), SHAPES)
def test_codes_are_those_of_the_textbook(group: int, k: int, bits: int, act_order: bool, gaussian: Gaussian) -> None:
    weight, moment = gaussian(4, k), moment_of(k)
    found = one(weight, moment, bits, group, GptqOptions(act_order=act_order, sweeps=0, block=48))
    order = damped(moment).diagonal().argsort(descending=True).tolist() if act_order else list(range(k))
    assert torch.equal(found.codes, textbook(weight, moment, found, bits, group, order))
    # feedback does matter here, or any rounding would pass
    assert (found.codes != plainly_rounded(weight, found, bits, group)).float().mean() > 0.1 / 2**bits


def plainly_rounded(weight: torch.Tensor, grid: AffineWeight, bits: int, group: int) -> torch.Tensor:
    s, z = (each.float().repeat_interleave(group, 1)[:, : weight.shape[1]] for each in (grid.scale, grid.zero))
    return codes_of(weight, s, z, torch.tensor(2.0**bits - 1)).to(torch.uint8)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_block_is_a_matter_of_speed(block: int, gaussian: Gaussian) -> None:
    weight, moment = gaussian(8, 160), moment_of(160)
    assert same(one(weight, moment, 3, 64, replace(ORDERED, block=block)), one(weight, moment, 3, 64, ORDERED))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("group", "k"), SHAPES)
def test_the_output_is_nearer_than_with_methods_that_see_no_inputs(
    group: int, k: int, bits: int, variant: str, gaussian: Gaussian
) -> None:
    weight, moment = gaussian(48, k), moment_of(k)
    found = lost(one(weight, moment, bits, group, VARIANTS[variant]), weight, moment, group)
    others = min(lost(solve("w", weight, bits, group), weight, moment, group) for solve in (rtn, hqq))
    assert found < (0.95 if variant == "mc-moe" else 0.75) * others


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_bit_is_the_mean_of_the_group(variant: str, gaussian: Gaussian) -> None:
    weight = gaussian(16, 160) * torch.logspace(-1, 1, 16)[:, None]
    found = one(weight, moment_of(160), 1, 64, VARIANTS[variant])
    means = torch.stack([part.abs().mean(1) for part in weight.split(64, 1)], 1)
    assert torch.equal(found.scale, (2 * means).half())
    assert torch.equal(found.zero, torch.full_like(found.zero, 0.5))
    assert set(found.codes.unique().tolist()) == {0, 1}


def test_what_is_stored(gaussian: Gaussian) -> None:
    for bits in (1, 2, 3, 4, 5, 6, 8):
        found = one(gaussian(5, 100), moment_of(100), bits, 64, GptqOptions())
        assert (found.codes.dtype, found.scale.dtype, found.zero.dtype) == (torch.uint8, torch.float16, torch.float16)
        assert (tuple(found.codes.shape), tuple(found.scale.shape), tuple(found.zero.shape)) == (
            (5, 100),
            (5, 2),
            (5, 2),
        )
        assert int(found.codes.max()) == 2**bits - 1
        assert int(found.codes.min()) == 0


# ---------------------------------------------------------------------------------------------- MC-MoE's variant


def test_mc_moe_feeds_nothing_back_within_a_block_below_four_bits(gaussian: Gaussian) -> None:
    weight, moment = gaussian(8, 200), moment_of(200)
    for bits in (1, 2, 3):
        found = one(weight, moment, bits, 128, MC_MOE)
        rounded = plainly_rounded(weight, found, bits, 128)
        assert torch.equal(found.codes[:, :128], rounded[:, :128])
        # the next block does make up for the first one's errors
        assert not torch.equal(found.codes[:, 128:], rounded[:, 128:])
    found = one(weight, moment, 4, 128, MC_MOE)
    assert not torch.equal(found.codes[:, :128], plainly_rounded(weight, found, 4, 128)[:, :128])
    assert same(found, one(weight, moment, 4, 128, PLAIN))


def test_a_block_that_feeds_nothing_back_still_tells_its_errors(gaussian: Gaussian) -> None:
    weight, upper = gaussian(6, 40)[None], torch.linalg.cholesky(moment_of(40)).mT[None]
    scale, zero, top = torch.full_like(weight, 0.01), torch.full_like(weight, 3.5), torch.tensor([7.0])
    codes, errors = round_block(weight, upper, scale, zero, top, torch.tensor([False]))
    assert torch.equal(codes, codes_of(weight, scale, zero, top))
    torch.testing.assert_close(errors, (weight - (codes - zero) * scale) / upper[0].diagonal())


# ---------------------------------------------------------------------------------------------- the metric


@pytest.mark.parametrize("damping", [0.001, 0.01, 0.1])
def test_damping_is_a_share_of_the_mean_and_a_dead_input_counts_like_it(damping: float) -> None:
    moment = torch.stack([moment_of(48), 3 * moment_of(48, seed=2), torch.zeros(48, 48)])
    moment[1, 5], moment[1, :, 5] = 0, 0
    before = moment.clone()
    metric = make_metric(moment, GptqOptions(damping=damping))
    means = moment.diagonal(dim1=1, dim2=2).mean(1)
    expected = (damping * means)[:, None].expand(3, 48).clone()
    expected[1, 5], expected[2] = means[1], 1.0
    torch.testing.assert_close(metric.extra, expected)
    assert metric.moments is moment and torch.equal(moment, before)
    assert torch.equal(make_metric(moment, PLAIN).order, torch.arange(48).expand(3, 48))
    for i in range(2):
        diagonal = (moment[i].diagonal() + metric.extra[i])[metric.order[i]]
        assert (diagonal.diff() <= 0).all()


@pytest.mark.parametrize(("k", "tokens"), [(1, 64), (40, 64), (1300, 64), (1300, 1)])
def test_the_factor_is_that_of_the_inverse(k: int, tokens: int) -> None:
    moment = moment_of(k, tokens)
    metric = make_metric(moment[None], GptqOptions())
    order = metric.order[0]
    inverse = torch.linalg.inv(damped(moment)[order][:, order])
    wanted = torch.linalg.cholesky(inverse, upper=True)
    assert (metric.upper[0] - wanted).norm() < 1e-3 * wanted.norm()
    assert torch.equal(metric.upper[0], metric.upper[0].triu())


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**20])
def test_the_unit_of_the_inputs_does_not_matter(unit: float, gaussian: Gaussian) -> None:
    weight, moment = gaussian(16, 160), moment_of(160)
    for options in VARIANTS.values():
        assert same(one(weight, moment * unit, 3, 64, options), one(weight, moment, 3, 64, options))


# ---------------------------------------------------------------------------------------------- batches and rows


@settings(max_examples=15)
@given(
    bits=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4),
    rows=st.sampled_from([8, 16, 24]),
    shape=st.sampled_from([(32, 70), *SHAPES]),
    variant=st.sampled_from(sorted(VARIANTS)),
    chunk=st.sampled_from([8, 16]),
)
def test_neither_batches_nor_chunks_change_a_bit(
    bits: list[int], rows: int, shape: tuple[int, int], variant: str, chunk: int
) -> None:
    # of one to three rows BLAS takes sums in another order
    group, k = shape
    options = VARIANTS[variant]
    generator = torch.Generator().manual_seed(rows)
    weights = 0.02 * torch.randn(len(bits), rows, k, generator=generator)
    moments = torch.stack([moment_of(k, seed=i) for i in range(len(bits))])
    names = [f"w{i}" for i in range(len(bits))]
    before = weights.clone()
    together = gptq(names, weights, make_metric(moments, options), bits, group, options)
    assert torch.equal(weights, before)
    alone = [one(weights[i], moments[i], b, group, options) for i, b in enumerate(bits)]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        starts = range(0, rows, chunk)
        patch.setattr(module, "_row_chunks", lambda _: [slice(start, start + chunk) for start in starts])
        chunked = gptq(names, weights, make_metric(moments, options), bits, group, options)
    assert all(same(a, b) for a, b in zip(together, chunked, strict=True))


@given(st.integers(1, 5), st.integers(1, 100), st.integers(1, 1 << 22))
def test_chunks_cover_every_row_once(count: int, rows: int, columns: int) -> None:
    chunks = module._row_chunks(torch.empty(count, rows, columns, device="meta"))
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))


# ---------------------------------------------------------------------------------------------- poor moments


@pytest.mark.parametrize("options", [PLAIN, ORDERED, MC_MOE], ids=["plain", "ordered", "mc-moe"])
def test_an_input_that_never_occurs_is_rounded_as_it_is(options: GptqOptions, gaussian: Gaussian) -> None:
    weight, moment, dead = gaussian(16, 160), moment_of(160), [0, 17, 63, 64, 159]
    moment[dead], moment[:, dead] = 0, 0
    found = one(weight, moment, 3, 64, options)
    assert torch.equal(found.codes[:, dead], plainly_rounded(weight, found, 3, 64)[:, dead])
    # descent moves scales to suit the other inputs, and must not give these up
    after, plain = one(weight, moment, 3, 64, replace(options, sweeps=3)), rtn("w", weight, 3, 64)
    kept, usual = ((values(each, 64) - weight)[:, dead].norm() for each in (after, plain))
    assert kept < 1.2 * usual


@pytest.mark.parametrize("bits", [1, 3])
def test_without_any_token_all_inputs_count_alike(bits: int, gaussian: Gaussian) -> None:
    weight = gaussian(16, 160)
    for options in VARIANTS.values():
        found = one(weight, torch.zeros(160, 160), bits, 64, options)
        if not options.sweeps:  # scales are solved for after the codes
            assert torch.equal(found.codes, plainly_rounded(weight, found, bits, 64))
        plain = rtn("w", weight, bits, 64)
        assert lost(found, weight, torch.eye(160), 64) < lost(plain, weight, torch.eye(160), 64)


@pytest.mark.parametrize("tokens", [1, 5, 60])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_tokens_than_inputs(variant: str, tokens: int, gaussian: Gaussian) -> None:
    weight, moment = gaussian(32, 160), moment_of(160, tokens)
    found, plain = one(weight, moment, 3, 64, VARIANTS[variant]), rtn("w", weight, 3, 64)
    assert lost(found, weight, moment, 64) < lost(plain, weight, moment, 64)
    # what these tokens do not show is not given up for them
    assert lost(found, weight, torch.eye(160), 64) < 4 * lost(plain, weight, torch.eye(160), 64)


def test_one_input_a_million_times_larger(gaussian: Gaussian) -> None:
    weight, moment = gaussian(16, 160), moment_of(160)
    moment[3] *= 1e3
    moment[:, 3] *= 1e3
    found = one(weight, moment, 3, 64, GptqOptions())
    assert lost(found, weight, moment, 64) < 0.2 * lost(rtn("w", weight, 3, 64), weight, moment, 64)


# ---------------------------------------------------------------------------------------------- odd weights


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.3, -5.0, 200.0])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_constant_weights_are_kept(value: float, bits: int) -> None:
    found = one(torch.full((4, 100), value), moment_of(100), bits, 64, GptqOptions())
    assert (values(found, 64) - value).abs().max() <= 5e-4 * abs(value)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_group_of_zeros_beside_others_stays_zero(bits: int, gaussian: Gaussian) -> None:
    weight = gaussian(16, 160)
    weight[3:5, 64:128] = 0
    assert not values(one(weight, moment_of(160), bits, 64, GptqOptions()), 64)[3:5, 64:128].any()


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("value", [1e9, -1e38])
def test_weights_too_large_for_the_format_are_named(bits: int, value: float, gaussian: Gaussian) -> None:
    weights = gaussian(8, 100).repeat(2, 1, 1)
    weights[1, 3, 70] = value
    metric = make_metric(torch.stack([moment_of(100)] * 2))
    with pytest.raises(CheckpointError, match=r"^the bad one: a (scale|zero) of .* does not fit fp16"):
        gptq(["a good one", "the bad one"], weights, metric, [bits, bits], 64)


# ---------------------------------------------------------------------------------------------- on a GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("rows", "width"), [(16, 128), (33, 40), (7, 1), (100, 72)])
def test_the_fused_loop_is_the_torch_one(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    rest = torch.randn(5, rows, width, generator=generator, device="cuda") * 0.02
    moments = torch.stack([moment_of(width, seed=i) for i in range(5)])
    upper = make_metric(moments, PLAIN).upper.cuda()
    scale = 0.005 + 0.01 * torch.rand(5, rows, width, generator=generator, device="cuda")
    top = torch.tensor([1.0, 3, 7, 15, 255], device="cuda")
    zero = top[:, None, None] / 2 + torch.rand(5, rows, width, generator=generator, device="cuda")
    feed = torch.tensor([True, False, True, True, True], device="cuda")
    fused = round_block(rest, upper, scale, zero, top, feed)
    monkeypatch.setattr(gptq_triton, "why_not", lambda _: "asked not to")
    plain = round_block(rest, upper, scale, zero, top, feed)
    assert torch.equal(fused[0], plain[0])
    torch.testing.assert_close(fused[1], plain[1])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("group", "k"), SHAPES)
def test_on_a_gpu_the_error_is_the_same(variant: str, group: int, k: int, gaussian: Gaussian) -> None:
    weight, moment, options = gaussian(50, k), moment_of(k), VARIANTS[variant]
    for bits in (1, 2, 3, 4, 8):
        on_gpu = one(weight.cuda(), moment.cuda(), bits, group, options)
        moved = AffineWeight(on_gpu.codes.cpu(), on_gpu.scale.cpu(), on_gpu.zero.cpu())
        wanted = lost(one(weight, moment, bits, group, options), weight, moment, group)
        assert lost(moved, weight, moment, group) == pytest.approx(wanted, rel=0.02)
