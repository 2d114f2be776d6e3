# SPDX-License-Identifier: Apache-2.0
"""`moepress train-pruning` on the embedded model: what it makes and tells, and how a cut-off run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moepress.cli.train_pruning as command
from command import Cli
from moepress.demo.run import EXCERPT, MODEL
from moepress.errors import ResumeError
from moepress.evaluate.load import load_model
from moepress.pruning.attach import pruners_of
from moepress.pruning.selector import Selector
from moepress.pruning.train import State
from moepress.pruning.unfinished import Unfinished
from tiny import fingerprint, left_behind

BRIEF = ("--text", EXCERPT, "--length", 48, "--measure-steps", 4, "--distil-steps", 2, "--held", 8, "--device", "cpu")


def test_it_makes_a_folder_that_loads_pruned(cli: Cli, tmp_path: Path) -> None:
    before = fingerprint(MODEL)
    done = cli("train-pruning", MODEL, *BRIEF, "--target", 0.25, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["dropped"] == pytest.approx(0.25, abs=0.005)
    assert 0 < done.json["share"] < 0.01
    assert left_behind(tmp_path / "out") == ["out"]
    assert fingerprint(MODEL) == before
    model, _ = load_model(tmp_path / "out", torch.device("cpu"))
    rules = [pruner.rule for pruner in pruners_of(model).values()]
    assert len(rules) == 4 and all(isinstance(rule, Selector) for rule in rules)
    assert done.json["parameters"] == sum(p.numel() for rule in rules for p in rule.parameters())


@pytest.mark.parametrize("dense", ["keep", "remake"])
def test_a_compressed_folder_is_trained_on_itself(cli: Cli, pressed_demo: Path, tmp_path: Path, dense: str) -> None:
    done = cli("train-pruning", pressed_demo, *BRIEF, "--dense", dense, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["dropped"] == pytest.approx(0.2, abs=0.005)
    assert 0 < done.json["share"] < 0.01
    load_model(tmp_path / "out", torch.device("cpu"))


@pytest.fixture(scope="module")
def pressed_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moepress import Settings, compress_checkpoint

    folder = tmp_path_factory.mktemp("demo") / "pressed"
    compress_checkpoint(MODEL, folder, Settings(method="rtn"))
    return folder


class Killed(BaseException):
    """What ends a run in the middle; no part of the program expects it."""


def test_a_killed_run_goes_on_to_the_same_bytes(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (MODEL, *BRIEF, "--save-every", 2)
    assert cli("train-pruning", *arguments, "-o", tmp_path / "whole").code == 0
    save = Unfinished.save

    def kill(self: Unfinished, state: State) -> None:
        save(self, state)
        if state["step"] == 4:
            raise Killed

    monkeypatch.setattr(Unfinished, "save", kill)
    with pytest.raises(Killed):
        cli("train-pruning", *arguments, "-o", tmp_path / "cut")
    monkeypatch.undo()
    assert left_behind(tmp_path / "cut") == [".cut.training"]

    refused = cli("train-pruning", *arguments, "-o", tmp_path / "cut")
    assert refused.code == 2 and "continue it with --resume" in refused.err
    changed = cli("train-pruning", *arguments, "--target", 0.3, "--resume", "-o", tmp_path / "cut")
    assert changed.code == 2 and "target was 0.2 and is now 0.3" in changed.err
    assert left_behind(tmp_path / "cut") == [".cut.training"]

    resumed = cli("train-pruning", *arguments, "--resume", "-o", tmp_path / "cut")
    assert resumed.code == 0, resumed.err
    assert "measuring costs" not in resumed.err
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    assert left_behind(tmp_path / "cut") == ["cut"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "0.5"), "a target of 0.5 cannot be met"),
        (("--target", "-1"), "a target of -1 is no share"),
        (("--dense", "maybe"), "--dense 'maybe' is unknown; choose one of auto, keep, remake"),
        (("--save-every", "0"), "--save-every is 0"),
        (("--length", "4096"), "--length 4096 is more than the model's 2048 positions"),
        (("--measure-steps", "100000"), "name a longer text"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    cli: Cli, tmp_path: Path, words: tuple[str, str], message: str
) -> None:
    done = cli("train-pruning", MODEL, *BRIEF, "-o", tmp_path / "out", *words)
    assert done.code == 2
    assert message in done.err
    assert not left_behind(tmp_path / "out")


def test_an_existing_target_is_refused_at_once(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = cli("train-pruning", MODEL, *BRIEF, "-o", tmp_path / "out")
    assert done.code == 2 and "exists" in done.err


def test_two_processes_do_not_train_into_one_target(tmp_path: Path) -> None:
    with Unfinished(tmp_path / "out", {"seed": 0}, resume=False) as first:
        first.save({"step": 1})
        with pytest.raises(ResumeError, match="another process is training"):
            Unfinished(tmp_path / "out", {"seed": 0}, resume=True)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    with Unfinished(tmp_path / "out", {"seed": 0}, resume=False) as folder:
        folder.save({"step": 1})
        assert folder.load() == {"step": 1}
    (folder.path / "state.pt").write_bytes(b"no state")
    with (
        Unfinished(tmp_path / "out", {"seed": 0}, resume=True) as folder,
        pytest.raises(ResumeError, match="to start over"),
    ):
        folder.load()


def test_memory_decides_whether_dense_weights_are_kept(
    pressed_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = torch.device("cpu")
    model, _ = load_model(pressed_demo, cpu)
    for free, fits in ((0, False), (1 << 40, True)):
        monkeypatch.setattr(command, "free_memory", lambda device, free=free: free)
        assert command.keeps_dense(model, "auto", cpu) is fits
        assert ("kept" if fits else "remade") in capsys.readouterr().out
    assert command.keeps_dense(model, "keep", cpu) and not command.keeps_dense(model, "remake", cpu)
