# SPDX-License-Identifier: Apache-2.0
"""A layer's local sensitivities against what they are by definition: exact Jacobians of the transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from walking import WINDOWS, close, hidden_states, load, watching, window_ids

from moepress.errors import CalibrationError
from moepress.measure.probe import end_factors
from moepress.measure.taps import forward_as
from moepress.measure.walk import Walk
from moepress.source import Source, open_source
from tiny import EXPERTS, LAYERS, NATIVE, edit_tensors, tiny_checkpoint

Tiny = Callable[..., Path]
Rows = dict[str, torch.Tensor]
D = 64


@contextmanager
def walking(folder: Path, work: Path, **settings: Any) -> Iterator[tuple[Walk, Source]]:
    ids = settings.pop("ids", window_ids())
    with open_source(folder) as source:
        yield Walk(source, ids, folder=work, **settings), source


def sensitivities(walk: Walk, start: int = 0, **settings: Any) -> Rows:
    """Those of all layers from `start` on."""
    return {name: rows for layer in walk.layers(start) for name, rows in layer.sensitivities(**settings).items()}


# ---------------------------------------------------------------------------------------------- the reference


def streams(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By layer, the residual stream after attention and after the block [windows, T, D]."""
    norms = {str(i): layer.post_attention_layernorm for i, layer in enumerate(model.model.layers)}
    with watching(norms) as seen:
        after = hidden_states(model, ids)[1:]
    return [(seen[str(i)][0], stream) for i, stream in enumerate(after)]


@torch.no_grad()
def closed_form(model: Any, source: Source, ids: torch.Tensor) -> dict[str, float]:
    """What each row of every attn.o and down must have."""
    rename = source.graph.family.module_name
    factor = getattr(model.config, "residual_multiplier", 1.0) ** 2
    noise = [[factor / x.square().sum(-1).flatten() for x in pair] for pair in streams(model, ids)]
    banks = {rename(ref.bank): None for ref in source.graph.weights if ref.bank}
    blocks = {str(i): layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer, "mlp")}
    with watching({name: model.get_submodule(name) for name in banks} | blocks) as seen:
        model(ids, use_cache=False)
    found = {}
    for ref in source.graph.weights:
        attention, block = noise[ref.layer]
        if ref.role == "attn.o":
            found[ref.name] = attention.mean().item()
        elif ref.role == "expert.down":
            _, index, weight = seen[rename(ref.bank)]
            s = (weight * (index == ref.expert)).sum(-1).flatten().square()
            found[ref.name] = ((s @ block) / s.sum()).item() if s.any() else 0.0
        elif ref.projection == "down":
            gate = getattr(model.model.layers[ref.layer].mlp, "shared_expert_gate", None)
            open_by = 1.0 if gate is None else gate(seen[str(ref.layer)][0]).sigmoid().flatten()
            found[ref.name] = (open_by**2 * block).mean().item()
    return found


def jacobian_rows(model: Any, source: Source, ids: torch.Tensor, layer: int) -> Rows:
    """F of every weight of a layer from one window, by its definition: all entries of the exact Jacobians, squared."""
    rename = source.graph.family.module_name
    hidden, (between, after) = hidden_states(model, ids)[layer], streams(model, ids)[layer]
    refs = [ref for ref in source.graph.weights if ref.layer == layer]
    routing: Any = None
    if bank := next((ref.bank for ref in refs if ref.bank), None):
        with watching({"bank": model.get_submodule(rename(bank))}) as seen:
            model(ids, use_cache=False)
        routing = seen["bank"]
    found = {}
    for ref in refs:
        stream = between if ref.group == "attn" else after
        shift, expert = torch.zeros(ids.shape[1], ref.shape[0]), ref.expert

        def moved(shift: torch.Tensor, ref: Any = ref) -> torch.Tensor:
            return shifted(model, rename(ref.bank or ref.module), ref, layer, hidden, shift)

        exact = torch.autograd.functional.jacobian(moved, shift)  # [T, D] by [T, N]
        squares = (exact.square() / stream.square().sum(-1).reshape(-1, 1, 1, 1)).sum((0, 1))
        if expert is None:
            found[ref.name] = squares.mean(0)
            continue
        weight = (routing[2] * (routing[1] == expert)).sum(-1).flatten()
        share = weight.square().sum() if ref.projection == "down" else (weight > 0).sum()
        found[ref.name] = squares.sum(0) / share if share else torch.zeros(ref.shape[0])
    return found


def shifted(model: Any, name: str, ref: Any, layer: int, hidden: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The stream [T, D] after the weight's sub-block if `shift` [T, N] is added to what the weight puts out."""
    with watching({"norm": model.model.layers[layer].post_attention_layernorm}) as seen:
        module = model.get_submodule(name)
        old = module.forward
        change = (
            (lambda x, *a, **k: old(x, *a, **k) + shift.reshape(*x.shape[:-1], -1))
            if ref.expert is None
            else lambda x, index, weight: experts(module, ref, shift, x, index, weight)
        )
        with forward_as(module, change):
            out = run_layer(model, layer, hidden)
    return (seen["norm"][0] if ref.group == "attn" else out)[0]


def run_layer(model: Any, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    places = torch.arange(hidden.shape[1]).unsqueeze(0)
    return model.model.layers[layer](
        hidden, attention_mask=None, position_embeddings=model.model.rotary_emb(hidden, places), position_ids=places
    )


def experts(
    module: Any, ref: Any, shift: torch.Tensor, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The sum over experts in its plainest form: each runs on all tokens."""
    flat, total = x.reshape(-1, x.shape[-1]), torch.zeros(())
    for expert in range(EXPERTS):
        move = {p: shift if (expert, p) == (ref.expert, ref.projection) else 0 for p in ("gate", "up", "down")}
        gate, up = linear(flat, module.gate_up_proj[expert]).chunk(2, dim=-1)
        y = linear(module.act_fn(gate + move["gate"]) * (up + move["up"]), module.down_proj[expert]) + move["down"]
        total = total + y * (weight * (index == expert)).sum(-1).reshape(-1, 1)
    return total.reshape(x.shape)


# ---------------------------------------------------------------------------------------------- by definition


@pytest.mark.parametrize("family", NATIVE)
def test_noise_that_goes_straight_into_the_stream_has_a_closed_form(family: str, tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny(family), tmp_path) as (walk, source):
        found = sensitivities(walk, windows=WINDOWS)
        expected = closed_form(load(tiny(family)), source, window_ids())
        assert {ref.name for ref in source.graph.weights} == set(found)
        for ref in source.graph.weights:
            rows = found[ref.name]
            assert rows.dtype == torch.float32
            assert tuple(rows.shape) == (ref.shape[0],)
            assert (rows > 0).any() or ref.expert is not None
        assert len(expected) >= 2 * LAYERS
        for name, value in expected.items():
            assert close(found[name], torch.full_like(found[name], value), 1e-4), name


@pytest.mark.parametrize(
    ("family", "changes"), [("qwen2_moe", {}), ("deepseek_v3", {}), ("granitemoe", {}), ("olmoe", {"clip_qkv": 0.5})]
)
def test_the_average_over_probes_is_the_exact_jacobian(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Attention with biases, grouped and latent; a gated shared expert; a scaled residual; values clamped in place.

    Every window is the same text with other probes. A row to which one token counts is off by sqrt(2 / draws).
    """
    ids, draws = window_ids(1, 8), 600
    folder = tiny_checkpoint(tmp_path / "source", family, **changes)
    model = load(folder).requires_grad_(False)
    with walking(folder, tmp_path / "work", ids=ids.repeat(draws, 1)) as (walk, source):
        for layer in walk.layers():
            expected, found = jacobian_rows(model, source, ids, layer.number), layer.sensitivities(draws)
            for ref in layer.refs:
                assert close(found[ref.name], expected[ref.name], 0.1), ref.name
                assert found[ref.name].sum().item() == pytest.approx(expected[ref.name].sum().item(), rel=0.04), (
                    ref.name
                )


# ---------------------------------------------------------------------------------------------- few windows


def unused(tiny: Tiny, folder: Path) -> Path:
    """Experts 0 and 2 of layer 1 get no token."""
    bias = torch.tensor([-9.0, 9.0, -9.0, 9.0])
    return edit_tensors(tiny("deepseek_v3"), folder, {"model.layers.1.mlp.gate.e_score_correction_bias": bias})


@pytest.mark.parametrize("windows", [1, WINDOWS])
def test_an_expert_without_tokens(windows: int, tiny: Tiny, tmp_path: Path) -> None:
    """Zeros where that is a fact; the other experts' mean where other windows may use it."""
    with walking(unused(tiny, tmp_path / "source"), tmp_path / "work") as (walk, source):
        found = sensitivities(walk, windows=windows)
        for projection in ("gate", "up", "down"):
            refs = [ref for ref in source.graph.weights if ref.role == f"expert.{projection}"]
            mean = torch.stack([found[ref.name].mean() for ref in refs if ref.expert % 2]).mean()
            assert mean > 0
            for ref in refs[::2]:
                assert ref.expert % 2 == 0
                expected = mean if windows < WINDOWS else torch.tensor(0.0)
                assert torch.allclose(found[ref.name], expected.expand(ref.shape[0]))


def test_windows_are_spread_evenly(tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny("qwen2_moe"), tmp_path / "all") as (walk, _):
        half = sensitivities(walk, windows=2)
    with walking(tiny("qwen2_moe"), tmp_path / "two", ids=window_ids()[::2]) as (walk, _):
        own = sensitivities(walk, windows=9)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.1.down_proj.weight"):
        assert close(half[name], own[name])


# ---------------------------------------------------------------------------------------------- same bytes


def same(a: Rows, b: Rows) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_whatever_the_memory(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for memory, seed in [(0, 0), (1 << 30, 0), (1 << 30, 1)]:
        with walking(tiny("qwen2_moe"), tmp_path / f"{memory} {seed}", memory=memory) as (walk, _):
            found[memory, seed] = sensitivities(walk, seed=seed)
    assert same(found[0, 0], found[1 << 30, 0])
    for name, rows in found[1 << 30, 1].items():
        exact = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(rows, found[0, 0][name]) == exact or not rows.any()


def test_a_continued_walk_measures_the_same(tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny("glm4_moe"), tmp_path) as (walk, _):
        whole = sensitivities(walk)
    with walking(tiny("glm4_moe"), tmp_path) as (walk, _):
        again = sensitivities(walk, start=1)
    assert again
    assert same(again, {name: whole[name] for name in again})


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_measuring_changes_nothing(family: str, tiny: Tiny, tmp_path: Path) -> None:
    outcomes = {}
    for times in (0, 1):
        with walking(tiny(family), tmp_path / str(times), memory=200_000) as (walk, _):
            moments = {}
            for layer in walk.layers():
                found = [layer.sensitivities() for _ in range(times)]
                for sites in layer.stages():
                    for site in sites:
                        moments[site.refs[0].name] = site.moment.numpy().tobytes()
                    found += [layer.sensitivities() for _ in range(times)]
                assert all(same(found[0], each) for each in found)
                assert not [path for path in walk.folder.iterdir() if path.name.startswith("probe")]
            outcomes[times] = moments, (walk.folder / f"boundary-{LAYERS:05}.f32").read_bytes()
    assert outcomes[0] == outcomes[1]


# ---------------------------------------------------------------------------------------------- the whole model


def test_late_layers_count_more_by_what_stays_in_the_stream() -> None:
    assert end_factors([0.5, 0.25, 0.125]) == [1.25, 1.5, 2.0]
    for unfit in ([], [1.0, 0.0], [float("nan")]):
        with pytest.raises(CalibrationError, match=r"must be above 0, one per layer"):
            end_factors(unfit)


# ---------------------------------------------------------------------------------------------- misuse


def test_sensitivities_are_refused_when_they_cannot_be_had(tiny: Tiny, tmp_path: Path) -> None:
    with walking(tiny("mixtral"), tmp_path) as (walk, _):
        layers = walk.layers()
        layer = next(layers)
        with pytest.raises(CalibrationError, match="sensitivities of 0 windows"):
            layer.sensitivities(windows=0)
        layer.finish()
        with pytest.raises(CalibrationError, match=r"layer 0 is freed; .* before finish"):
            layer.sensitivities()


def test_weights_that_are_not_finite_are_told(tiny: Tiny, tmp_path: Path) -> None:
    broken = torch.full((64, 64), float("nan"), dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.o_proj.weight"
    folder = edit_tensors(tiny("mixtral"), tmp_path / "source", {name: broken})
    with (
        walking(folder, tmp_path / "work") as (walk, _),
        pytest.raises(CalibrationError, match=r"layers\.0.* of \d+ sensitivities are not finite"),
    ):
        sensitivities(walk)
