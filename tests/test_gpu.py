# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: the fused HQQ iterations, and the whole path on the device. `make gpu` runs these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moepress import Settings, compress_checkpoint, verify_checkpoint
from moepress.format.weight import affine
from moepress.quantize import hqq as hqq_module
from moepress.quantize.hqq import hqq

MODEL = Path(__file__).resolve().parents[1] / "src/moepress/demo/model"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def _weight(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator)
    return {"small": weight * 0.02, "large": weight, "tailed": weight**5 * 0.01, "flat": weight * 0 + 0.3}[kind]


@pytest.mark.parametrize("kind", ["small", "large", "tailed", "flat"])
@pytest.mark.parametrize(("bits", "group_size", "shape"), [(3, 64, (96, 256)), (1, 32, (64, 100)), (4, 128, (40, 300))])
def test_fused_iterations_match_torch(kind: str, bits: int, group_size: int, shape: tuple[int, int]) -> None:
    weight = _weight(kind, shape)
    fused = hqq("w", weight.cuda(), bits, group_size)
    plain = hqq("w", weight, bits, group_size)
    a = affine(fused.codes.cpu(), fused.scale.cpu(), fused.zero.cpu(), group_size)
    b = affine(plain.codes, plain.scale, plain.zero, group_size)
    assert (a - b).norm() <= 1e-3 * b.norm(), f"relative difference {((a - b).norm() / b.norm()).item():.2e}"


def test_fused_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = hqq_module.iterate_fused
    monkeypatch.setattr(hqq_module, "iterate_fused", lambda *args: calls.append(1) or inner(*args))
    hqq("w", torch.randn(64, 128, device="cuda"), 3, 64)
    assert calls, "the Triton kernel was not used on a CUDA device"


@pytest.mark.parametrize("settings", [Settings(method="hqq"), Settings(ranks="dense-16+sparse-4", iterations=4)])
def test_whole_path_on_the_gpu(tmp_path: Path, settings: Settings) -> None:
    compress_checkpoint(MODEL, tmp_path / "out", settings, device="cuda")
    assert not verify_checkpoint(tmp_path / "out").problems
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("It was the best of times", return_tensors="pt").input_ids
    with torch.inference_mode():
        on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cuda")
        on_gpu = model(ids.cuda()).logits.cpu()
        new = model.generate(ids.cuda(), max_new_tokens=8, do_sample=False)
    assert (on_gpu - on_cpu).norm() <= 1e-4 * on_cpu.norm()
    assert new.shape[1] == ids.shape[1] + 8


def test_two_gpu_runs_give_equal_bytes(tmp_path: Path) -> None:
    settings = Settings(ranks="dense-16+sparse-4", iterations=4)
    for name in ("a", "b"):
        compress_checkpoint(MODEL, tmp_path / name, settings, device="cuda")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
