# SPDX-License-Identifier: Apache-2.0
"""The command line on the embedded model: what it writes, prints and returns; a few runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moepress
from command import Cli, Run
from moepress.plan.plan import Plan
from tiny import edit_json, fingerprint, left_behind

MODEL = Path(moepress.__file__).parent / "demo" / "model"
RTN = ("--method", "rtn", "--bits", "3")
GROUPS = ("attn", "shared", "expert")


Copy = Callable[..., Path]


def process(*words: object) -> Run:
    """`python -m moepress ...` in a process of its own."""
    command = [sys.executable, "-m", "moepress", *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )  # fmt: skip
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """The embedded model under RTN at 3 bits, by a process of its own, and what that printed."""
    target = tmp_path_factory.mktemp("cli") / "target"
    return target, process("compress", MODEL, target, *RTN, "--device", "cpu", "--json")


def assert_told(run: Run, *words: str) -> None:
    """A user's mistake: one line on stderr, status 2, no traceback, nothing on stdout."""
    assert run.code == 2, run
    assert run.err.startswith("error: ") and run.err.count("\n") == 1 and run.err.endswith("\n"), run.err
    assert run.out == ""
    for each in words:
        assert each in run.err, run.err


# compress


def test_compress_writes_a_folder_and_its_numbers(compressed: tuple[Path, Run]) -> None:
    target, run = compressed
    assert run.code == 0, run.err
    body = run.json
    files = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    side = json.loads((target / "moepress.json").read_text())
    assert body["file_bytes"] == files == sum(shard["bytes"] for shard in side["shards"].values())
    assert (body["bpw"], body["resumed"], body["target"]) == (3.5, 0, str(target))
    assert body["groups"].keys() == set(GROUPS)
    assert body["compressed_bytes"] == sum(group["bytes"] for group in body["groups"].values())
    assert f"wrote {target}" in run.out and "3.500 bits per compressed weight" in run.out
    assert left_behind(target) == [target.name]


def test_progress_is_plain_lines_where_nobody_watches(compressed: tuple[Path, Run]) -> None:
    _, run = compressed
    lines = run.err.splitlines()
    assert any(line.startswith("compressing: done in ") for line in lines)
    assert "\r" not in run.err and "\x1b" not in run.err and "\x1b" not in run.out
    # tables keep whole lines in pipes, and are no wider than they must be
    assert max(map(len, run.out.splitlines()[:-1])) <= 200


def test_a_plan_leads_to_the_same_bytes(compressed: tuple[Path, Run], cli: Cli, tmp_path: Path) -> None:
    target, run = compressed
    made = cli("plan", MODEL, "-o", tmp_path / "plan.json", *RTN, "--json")
    assert made.code == 0
    # what was predicted is what was written
    for key in ("bpw", "bpw_model", "file_bytes", "tensor_bytes", "compressed_bytes"):
        assert made.json[key] == run.json[key], key
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert {spec.tag for spec in plan.weights.values() if spec} == {"b3g64"}
    again = cli("compress", MODEL, tmp_path / "again", "--plan", tmp_path / "plan.json", "--device", "cpu")
    assert again.code == 0
    one, other = fingerprint(target), fingerprint(tmp_path / "again")
    differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert differ <= {"moepress.json"}  # which also holds the plan's notes


def test_an_edited_plan_is_obeyed(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert cli("plan", MODEL, "-o", path, *RTN).code == 0
    body = json.loads(path.read_text())
    body["weights"] = dict.fromkeys(body["weights"], "keep") | {"model.layers.2.self_attn.q_proj.weight": "b2g32"}
    path.write_text(json.dumps(body))
    done = cli("compress", MODEL, tmp_path / "out", "--plan", path, "--device", "cpu", "--json")
    assert done.code == 0
    assert done.json["compressed_weights"] == 256 * 256 and done.json["groups"].keys() == {"attn"}
    assert "kept as asked: 123 weights (" in done.out


def test_options_reach_the_plan(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = cli(
        "plan", MODEL, "-o", path, "--bits", 2, "--group-size", 32, "--dense-rank", 5, "--sparse-rank", 3,
        "--factor-bits", 8, "--iterations", 4, "--no-refit", "--keep", "attn.q", "--keep", "*layers.1.*", "--json",
    )  # fmt: skip
    assert done.code == 0
    plan = Plan.from_json(path.read_text())
    assert (plan.method, plan.iterations, plan.refit) == ("milo", 4, False)
    tags = {name: spec.tag if spec else "keep" for name, spec in plan.weights.items()}
    assert tags["model.layers.0.self_attn.q_proj.weight"] == tags["model.layers.1.self_attn.k_proj.weight"] == "keep"
    assert tags["model.layers.0.self_attn.k_proj.weight"] == "b2g32r5f8"
    assert tags["model.layers.3.mlp.experts.7.down_proj.weight"] == "b2g32r3f8"
    assert done.json["settings"]["keep"] == ["attn.q", "*layers.1.*"]


@pytest.mark.parametrize(
    ("options", "ranks", "iterations"),
    [
        ((), "dense-32+kurtosis-1", 20),  # milo-s1, scaled to a hidden size of 256
        (("--preset", "milo-s2"), "dense-64+kurtosis-2", 20),
        (("--preset", "milo-s2", "--iterations", "3"), "dense-64+kurtosis-2", 3),
        (("--rank-policy", "uniform-4"), "uniform-4", 20),
        (("--sparse-rank", "4"), "dense-0+sparse-4", 20),
        (("--method", "hqq"), "uniform-0", 10),
    ],
)
def test_presets_and_what_overrides_them(
    options: tuple[str, ...], ranks: str, iterations: int, cli: Cli, tmp_path: Path
) -> None:
    done = cli("plan", MODEL, "-o", tmp_path / "plan.json", *options, "--json")
    assert done.code == 0, done.err
    assert (done.json["settings"]["ranks"], done.json["settings"]["iterations"]) == (ranks, iterations)


@pytest.mark.parametrize(
    "option",
    [
        ("--preset", "milo-s1"), ("--budget", "3bpw"), ("--bits", "3"), ("--group-size", "64"), ("--dense-rank", "0"),
        ("--sparse-rank", "1"), ("--rank-policy", "dense-1"), ("--factor-bits", "3"), ("--iterations", "0"),
        ("--no-refit",), ("--refit",), ("--keep", "attn"), ("--frequencies", "f.json"),
    ],
)  # fmt: skip
def test_a_plan_bears_no_option_beside_it(option: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    run = cli("compress", MODEL, tmp_path / "out", "--plan", tmp_path / "plan.json", *option)
    assert_told(run, "--plan already decides everything")
    assert left_behind(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dense-rank", "4", "--rank-policy", "uniform-4"), "--rank-policy and --dense-rank/--sparse-rank"),
        (("--sparse-rank", "4", "--rank-policy", "uniform-4"), "give one of them"),
        (("--device", "quantum", *RTN), "device 'quantum' cannot be used here"),
        (("--device", "cuda:99", *RTN), "device 'cuda:99' cannot be used here"),
        (("--method", "awq"), "method 'awq' is unknown; choose one of rtn, hqq, milo"),
        (("--preset", "milo-s9"), "preset 'milo-s9' is unknown"),
        (("--bits", "7", "--method", "rtn"), "bits 7 is not supported"),
        (("--method", "rtn", "--dense-rank", "4"), "method rtn has no compensators"),
        (("--rank-policy", "frequency-4"), "no expert frequencies; measure them with `moepress profile"),
        (("--frequencies", "nowhere.json", *RTN), "nowhere.json is not readable JSON"),
        (("--keep", "nothing", *RTN), "--keep 'nothing' matches no weight"),
    ],
)
def test_contradictions_are_told_in_one_line(options: tuple[str, ...], words: str, cli: Cli, tmp_path: Path) -> None:
    for command in (("compress", MODEL, tmp_path / "out"), ("plan", MODEL, "-o", tmp_path / "out")):
        assert_told(cli(*command, *options), words)
        assert left_behind(tmp_path / "out") == []


def test_mistakes_with_folders_are_told_in_one_line(cli: Cli, compressed: tuple[Path, Run], tmp_path: Path) -> None:
    target, _ = compressed
    assert_told(cli("inspect", tmp_path / "nowhere"), "nowhere")
    assert_told(cli("compress", target, tmp_path / "out", *RTN), "already compressed by moepress")
    assert_told(cli("compress", MODEL, target, *RTN), str(target), "exists")
    assert_told(cli("verify", MODEL), "has no moepress.json")
    (tmp_path / "plan.json").write_text("{}")
    assert_told(cli("compress", MODEL, tmp_path / "out", "--plan", tmp_path / "plan.json"), "not a moepress plan")
    assert_told(cli("compress", MODEL, tmp_path / "out", "--plan", tmp_path / "gone.json"), "gone.json cannot be read")
    assert_told(cli("plan", MODEL, "-o", tmp_path / "no" / "such" / "plan.json", *RTN), "cannot be written")


def test_a_mistake_in_a_process_is_one_line_too(tmp_path: Path) -> None:
    assert_told(process("compress", MODEL, tmp_path / "out", "--method", "awq"), "method 'awq' is unknown")


def test_unknown_options_and_missing_arguments_are_usage_errors(cli: Cli, tmp_path: Path) -> None:
    for words in (("compress", MODEL), ("compress", MODEL, tmp_path / "out", "--bitz", "3"), ("squeeze",)):
        run = cli(*words)
        assert run.code == 2 and "Usage" in run.err and "Traceback" not in run.err
    run = cli("compress", MODEL, tmp_path / "out", "--bits", "three")
    assert run.code == 2 and "--bits" in run.err and "Traceback" not in run.err


def test_help_and_version(cli: Cli) -> None:
    assert cli("--version").out == f"moepress {moepress.__version__}\n"
    shown = cli("--help").out
    for command in ("inspect", "plan", "compress", "verify", "eval", "generate", "profile", "demo"):
        assert command in shown
        assert cli(command, "--help").code == 0


def test_a_defect_is_not_dressed_up_as_a_mistake(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr("moepress.cli.compress.verify_checkpoint", broken)
    with pytest.raises(KeyError):
        cli("verify", MODEL)


def test_interrupting_says_how_to_continue(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moepress.cli.compress.compress_checkpoint", interrupted)
    run = cli("compress", MODEL, tmp_path / "out", *RTN)
    assert run.code == 130 and "--resume" in run.err and "Traceback" not in run.err


def test_resume_of_a_finished_run_does_nothing(compressed: tuple[Path, Run], cli: Cli) -> None:
    target, _ = compressed
    before = fingerprint(target)
    run = cli("compress", MODEL, target, *RTN, "--device", "cpu", "--resume", "--json")
    assert run.code == 0, run.err
    assert run.json["resumed"] > 0 and "were already done" in run.out
    assert fingerprint(target) == before


# inspect


def test_inspect_shows_every_role_with_its_fate(cli: Cli) -> None:
    run = cli("inspect", MODEL, "--json")
    assert run.code == 0
    body = run.json
    assert body["model_type"] == "qwen2_moe"
    assert body["roles"]["expert.down"]["matrices"] == 32 and body["roles"]["attn.q"]["matrices"] == 4
    assert body["roles"]["expert.down"]["shapes"] == "256x128"
    assert body["kept"]["router"]["tensors"] == 8
    kept = sum(entry["bytes"] for entry in body["kept"].values())
    assert body["compressible_bytes"] + kept == body["bytes"] == 2 * 5_582_080
    for entry in body["roles"].values():
        assert entry["kurtosis"]["min"] <= entry["kurtosis"]["median"] <= entry["kurtosis"]["max"]
        assert entry["bytes"] == 2 * entry["weights"]
    assert "coverage: " in run.out and "64 routed expert" not in run.out and "96 routed expert" in run.out
    assert "\x1b" not in run.out


def test_inspect_can_leave_the_weights_unread(cli: Cli) -> None:
    run = cli("inspect", MODEL, "--no-kurtosis", "--json")
    assert run.code == 0 and "kurtosis" not in run.json["roles"]["attn.q"]
    assert "measuring" not in run.err


# verify


def test_a_sound_folder_is_sound(compressed: tuple[Path, Run], cli: Cli) -> None:
    target, _ = compressed
    run = cli("verify", target, "--json")
    assert run.code == 0 and ": sound (" in run.out
    assert run.json["ok"] and run.json["problems"] == [] and run.json["errors"] == {}


def test_against_the_source_every_weight_has_its_error(compressed: tuple[Path, Run], cli: Cli) -> None:
    target, _ = compressed
    run = cli("verify", target, "--against", MODEL, "--json")
    assert run.code == 0
    recorded = json.loads((target / "moepress.json").read_text())["errors"]
    assert run.json["errors"].keys() == recorded.keys() and len(recorded) == 4 * (4 + 3 + 24)
    for name, error in run.json["errors"].items():
        assert error == pytest.approx(recorded[name], abs=1e-5)
        assert 0.1 < error < 0.3  # RTN at 3 bits
    assert "relative error" in run.out and "largest: " in run.out


@pytest.mark.parametrize("where", [-1, -1000, 4000])
def test_a_flipped_byte_is_found(where: int, compressed: tuple[Path, Run], cli: Cli, copy_of: Copy) -> None:
    folder = copy_of(compressed[0])
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[where] ^= 4
    shard.write_bytes(data)
    run = cli("verify", folder, "--json")
    if where > 0:  # the header: the file may not even open
        assert run.code in (1, 2) and "Traceback" not in run.err
        return
    assert run.code == 1
    assert len(run.json["problems"]) == 1 and not run.json["ok"]
    assert "problem: tensor " in run.out and "has changed since it was written" in run.out and "1 problems" in run.out


def test_a_changed_side_file_is_found(compressed: tuple[Path, Run], cli: Cli, copy_of: Copy) -> None:
    folder = copy_of(compressed[0])
    edit_json(folder / "tokenizer_config.json", added=True)
    run = cli("verify", folder)
    assert run.code == 1 and "problem: tokenizer_config.json has changed" in run.out


# eval, generate, profile


def test_eval_reports_perplexity_and_tasks(compressed: tuple[Path, Run], cli: Cli, tmp_path: Path) -> None:
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("It was a very good thing to be there, and he was so glad to see her again. " * 8)
    rows.write_text('{"text": "He went to the door and opened the door"}\n{"text": "She said that she was glad"}\n')
    options = ("--ppl", text, "--window", 64, "--max-tokens", 150, "--task", f"lambada={rows}", "--dtype", "float32")
    run, original = (cli("eval", folder, *options, "--device", "cpu", "--json") for folder in (compressed[0], MODEL))
    assert run.code == original.code == 0, run.err + original.err
    body = run.json
    assert body["tokens"] == original.json["tokens"] and 100 < body["tokens"] <= 150
    assert 1 < original.json["ppl"] < body["ppl"] < 100  # compression costs something, but not all
    assert body["protocol"] == original.json["protocol"] and "64" in body["protocol"]
    assert body["tasks"]["lambada"]["n"] == 2 and set(body["tasks"]["lambada"]["metrics"]) >= {"acc"}
    assert (body["dtype"], body["folder"]) == ("float32", str(compressed[0]))
    assert body["sizes"]["compressed_bpw"] == 3.5
    assert body["sizes"]["stored_bytes"] == compressed[1].json["tensor_bytes"]
    assert body["sizes"]["parameters"] == original.json["sizes"]["parameters"] == 5_582_080
    assert f"perplexity {body['ppl']:.4f} over" in run.out


def test_eval_says_what_is_missing(cli: Cli, tmp_path: Path) -> None:
    assert_told(cli("eval", MODEL), "nothing to evaluate; give --ppl FILE or --task NAME=FILE")
    assert_told(cli("eval", MODEL, "--task", "lambada"), "not of the form NAME=FILE")
    assert_told(cli("eval", MODEL, "--ppl", tmp_path / "nowhere.txt"), "nowhere.txt")
    (tmp_path / "t.txt").write_text("text")
    assert_told(cli("eval", MODEL, "--ppl", tmp_path / "t.txt", "--dtype", "int3"), "int3")
    assert_told(cli("eval", MODEL, "--ppl", tmp_path / "t.txt", "--device", "quantum"), "quantum")


def test_generate_streams_the_text_it_reports(compressed: tuple[Path, Run]) -> None:
    run = process("generate", compressed[0], "-p", "It was", "-n", 8, "--device", "cpu", "--json")
    assert run.code == 0, run.err
    body = run.json
    assert body["tokens"] == 8 and body["tokens_per_second"] > 0 and body["prompt"] == "It was"
    assert run.out.startswith("It was" + body["text"])
    assert "[8 tokens, " in run.out


def test_sampling_is_repeatable(cli: Cli) -> None:
    words = ("generate", MODEL, "-p", "It was", "-n", 12, "--temperature", "1.5", "--device", "cpu", "--json")
    texts = [cli(*words, "--seed", seed).json["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_is_told(cli: Cli) -> None:
    assert_told(cli("generate", MODEL, "-p", ""), "the prompt is empty")


def test_a_profile_serves_the_frequency_policy(cli: Cli, tmp_path: Path) -> None:
    text, counts = tmp_path / "text.txt", tmp_path / "freq.json"
    text.write_text("It was a very good thing to be there, and he was so glad to see her again. " * 10)
    run = cli("profile", MODEL, "--text", text, "-o", counts, "--max-tokens", 100, "--device", "cpu", "--json")
    assert run.code == 0, run.err
    assert run.json == {"frequencies": str(counts), "tokens": 100, "banks": 4}
    banks = json.loads(counts.read_text())["banks"]
    assert all(sum(each) == 200 and len(each) == 8 for each in banks.values())
    path = tmp_path / "plan.json"
    made = cli("plan", MODEL, "-o", path, "--rank-policy", "frequency-4", "--frequencies", counts)
    assert made.code == 0, made.err
    weights = Plan.from_json(path.read_text()).weights
    for bank, each in banks.items():
        ranks = [weights[f"{bank}.{expert}.up_proj.weight"].rank for expert in range(8)]
        assert ranks == [round(count / 200 * 32) for count in each]
