"""Ctrl-C and SIGTERM while a run trains: saved, said how to go on, and gone on with to the same bits."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import workshop
from workshop import command, process

from mlx_distill import pipeline, plan
from mlx_distill.interrupt import Interrupted, Interrupts

STEPS = 100
TRAIN = ["train", "recipe.yaml", f"train.steps={STEPS}", "seed=7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> bytes:
    """The student of a run that nobody stopped."""
    child = process(folder, *TRAIN, "name=undisturbed")
    child.communicate(timeout=60)
    assert child.returncode == 0
    return (folder / "runs/undisturbed/models/student/model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    number: signal.Signals, code: int, folder: Path, undisturbed: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"name=stopped-{code}"
    child = process(folder, *TRAIN, name)
    assert child.stdout is not None
    for line in child.stdout:
        if " step " in line:
            child.send_signal(number)
            break
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    go_on, error = err.splitlines()
    assert error == f"error: stopped by {number.name}"
    program, arguments = go_on.split(" -m mlx_distill ")
    assert program == f"go on with: {shlex.quote(sys.executable)}"
    assert shlex.split(arguments) == [*TRAIN, name, "--resume"]
    run = folder / "runs" / f"stopped-{code}"
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step-"))
    assert 0 < step < STEPS
    assert not (run / "models").exists()

    ended = command(folder, capsys, *shlex.split(arguments))
    assert ended.code == 0
    assert f"student: going on from step {step}" in ended.out
    assert (run / "models/student/model.safetensors").read_bytes() == undisturbed
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"student"' in line]
    assert len(steps) == STEPS  # no step twice, none missing


def test_outside_of_training_a_signal_stops_at_once() -> None:
    interrupts = Interrupts()
    with interrupts.caught(), pytest.raises(Interrupted, match="stopped by SIGINT") as caught:
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130


def test_inside_it_waits_to_be_asked_and_a_second_one_does_not() -> None:
    interrupts = Interrupts()
    with interrupts.caught(), interrupts.deferred():
        interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
        assert caught.value.exit_code == 143
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts().caught():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("arguments", [["run", "recipe.yaml", "name=early"], ["plan", "recipe.yaml"]])
def test_a_signal_before_training_ends_the_command_with_its_code(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline, plan):
        monkeypatch.setattr(module, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    ended = command(folder, capsys, *arguments)
    assert ended.code == 130
    assert ended.err == ["error: stopped by SIGINT"]  # there is nothing to go on with
    assert not (folder / "runs" / "early").exists()
