# SPDX-License-Identifier: Apache-2.0
"""The harness's arguments and refusal without lm-eval; with it, a local task whose figures are
known by hand.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import moepress
from moepress.errors import EvaluationError
from moepress.evaluate.harness import main
from moepress.evaluate.load import load_model
from moepress.evaluate.tasks import load_task, run_task


@pytest.fixture
def without_lm_eval(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))


@pytest.fixture
def recorded(monkeypatch):
    """A stand-in for lm-eval that records the arguments it would have parsed and changes them as
    the real one does.
    """
    seen: list[list[str]] = []

    def cli_evaluate() -> None:
        seen.append(list(sys.argv))
        sys.argv.insert(1, "run")
        if "fail" in sys.argv:
            raise SystemExit(2)

    package, entry = ModuleType("lm_eval"), ModuleType("lm_eval.__main__")
    package.__spec__ = ModuleSpec("lm_eval", None)
    entry.cli_evaluate = cli_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", entry)
    return seen


def test_missing_lm_eval_says_what_to_install(without_lm_eval):
    with pytest.raises(EvaluationError, match=r"pip install 'moepress\[eval\]'"):
        main(["--model", "hf"])


def test_run_as_a_module_prints_one_line_and_exits_with_2(without_lm_eval, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "moepress.evaluate.harness")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("moepress.evaluate.harness", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: lm-eval is not installed; use: pip install 'moepress[eval]'\n"


def test_arguments_pass_through_and_the_process_keeps_its_own(recorded, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--tasks", "piqa"])
    main(["--model", "hf"])
    main()
    with pytest.raises(SystemExit):
        main(["fail"])
    assert recorded == [
        ["lm-eval", "--model", "hf"],
        ["lm-eval", "--tasks", "piqa"],
        ["lm-eval", "fail"],
    ]
    assert sys.argv == ["prog", "--tasks", "piqa"]


ROWS = [("ab", "abcd", 0), ("abc", "a", 1), ("abc", "ab", 1), ("ab", "abc", 1)]
"""PIQA rows (sol1, sol2, label). Uniform logits prefer the shorter choice by sum and the longer one
per character, so acc is 3/4 and acc_norm 1/4.
"""


def local_task(folder, data) -> None:
    task = {
        "task": "local_piqa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    folder.mkdir()
    (folder / "local_piqa.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A stray download would hang a machine without a network; transformers and datasets read these
    when imported.
    """
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_lm_eval_scores_a_local_task_as_we_do(offline, llama, tokenizer, write_rows, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra moepress[eval])")
    rows = [{"goal": "g", "sol1": a, "sol2": b, "label": label} for a, b, label in ROWS]
    data = write_rows(*rows)
    local_task(tmp_path / "tasks", data)
    model = type(llama)(llama.config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    arguments = f"""--model hf --model_args pretrained={tmp_path}/model,dtype=float32 --device cpu
        --tasks local_piqa --include_path {tmp_path}/tasks --batch_size 2
        --output_path {tmp_path}/out"""
    main(arguments.split())

    (written,) = (tmp_path / "out").rglob("results_*.json")
    figures = json.loads(written.read_text(encoding="utf-8"))["results"]["local_piqa"]
    assert figures["acc,none"] == 0.75
    assert figures["acc_norm,none"] == 0.25
    ours = run_task(model, tokenizer, load_task("piqa", data))
    assert ours.metrics == {"acc": figures["acc,none"], "acc_norm": figures["acc_norm,none"]}
    assert ours.stderr["acc"] == pytest.approx(figures["acc_stderr,none"])


def test_lm_eval_loads_a_compressed_directory(offline, write_rows, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra moepress[eval])")
    demo = Path(moepress.__file__).parent / "demo" / "model"
    moepress.compress_checkpoint(demo, tmp_path / "model", moepress.Settings(method="rtn"))
    goals = ["He opened the door and", "She was very", "The sea was", "It was a dark"]
    data = write_rows(*({"goal": g, "sol1": "the old man.", "sol2": "a good deal.", "label": 0} for g in goals))
    local_task(tmp_path / "tasks", data)

    arguments = f"""--model hf --model_args pretrained={tmp_path}/model,dtype=float32 --device cpu
        --tasks local_piqa --include_path {tmp_path}/tasks --batch_size 2 --output_path {tmp_path}/out"""
    main(arguments.split())

    (written,) = (tmp_path / "out").rglob("results_*.json")
    figures = json.loads(written.read_text(encoding="utf-8"))["results"]["local_piqa"]
    ours = run_task(*load_model(tmp_path / "model", torch.device("cpu")), load_task("piqa", data))
    assert ours.metrics == {"acc": figures["acc,none"], "acc_norm": figures["acc_norm,none"]}
