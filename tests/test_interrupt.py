"""Ctrl-C, SIGTERM, a closed terminal: saved, said how to go on, and gone on with to the same bits."""

import json
import os
import pkgutil
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import workshop
from workshop import command, process

from mlx_distill import pipeline, plan
from mlx_distill.counters import Counters
from mlx_distill.interrupt import SIGNALS, Interrupted, Interrupts
from mlx_distill.layout import STAGES as NAMES
from mlx_distill.stage_log import StageLog

STEPS = 100
ON_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from mlx_distill.cli import main
main()
"""
TRAIN = ["train", "recipe.yaml", f"train.steps={STEPS}", "seed=7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def undisturbed(folder: Path, capsys: pytest.CaptureFixture[str]) -> bytes:
    """The student of a run that nobody stopped."""
    student = folder / "runs/undisturbed/models/student/model.safetensors"
    if not student.exists():
        assert command(folder, capsys, *TRAIN, "name=undisturbed").code == 0
    return student.read_bytes()


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_in_a_step_saves_what_was_learned(
    number: signal.Signals, step: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the last one, too: without `save_every` there is nothing else to go on from."""
    asked = ["train", "recipe.yaml", "seed=8"]
    if not (folder / "runs" / "four").exists():
        assert command(folder, capsys, *asked, "name=four").code == 0
    name, metrics = f"{number.name}-{step}", StageLog.metrics

    def signalled(self: StageLog, counters: Counters, *rest: Any) -> None:
        metrics(self, counters, *rest)
        if counters.step == step:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLog, "metrics", signalled)
        ended = command(folder, capsys, *asked, f"name={name}")
    assert ended.code == CODES[number]
    assert ended.err == [
        f"go on with: mlx-distill {shlex.join([*asked, f'name={name}', '--resume'])}",
        f"error: stopped by {number.name}",
    ]
    run = folder / "runs" / name
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    again = command(folder, capsys, *asked, f"name={name}", "--resume")
    assert again.code == 0 and f"student: going on from step {step}" in again.out
    student = "models/student/model.safetensors"
    assert (run / student).read_bytes() == (folder / "runs" / "four" / student).read_bytes()
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 4


RUN = [
    "--resume",
    "recipe.yaml",
    "data={train: good.jsonl, prompts: good.jsonl, test: good.jsonl, max_tokens: 128}",
    "generate={max_tokens: 30, temperature: 1.0}",
    "teacher={model: teacher, source: cache, top_k: 8}",
    "train={steps: 2, save_every: 0, batch_tokens: 256, learning_rate: 0.01, compile: false}",
    "quantize={bits: 4, group_size: 32}",
    "evaluate={tasks: [fidelity], baseline: false}",
]
# In the order of a run: after which call the signal comes, and how many stages are finished then.
PLACES = [
    ("mlx_distill.answers.write_block", 0),
    ("mlx_distill.cache.stage.fill", NAMES.index("cache")),
    ("mlx_distill.work.models.save", NAMES.index("train") + 1),  # it is saved first
    ("mlx_distill.quantize.stage.quantized", NAMES.index("quantize")),
    ("mlx_distill.evaluate.parts.write_json", NAMES.index("evaluate")),
    ("mlx_distill.evaluate.stage.np.load", NAMES.index("export")),
    ("mlx_distill.pipeline.write_report", NAMES.index("report")),
]


@pytest.mark.parametrize(
    ("name", "places"),
    [("some", [PLACES[1], PLACES[2], PLACES[4]]), pytest.param("every", PLACES, marks=pytest.mark.slow)],
    ids=["some", "every"],
)
def test_a_signal_in_any_stage_ends_it_and_the_run_goes_on(
    name: str, places: list[tuple[str, int]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / name
    for place, finished in places:
        with pytest.MonkeyPatch.context() as patch:
            signalled_after(patch, place)
            ended = command(folder, capsys, "run", *RUN, f"name={name}")
        assert ended.code == 143, place
        assert ended.err[-1] == "error: stopped by SIGTERM"
        assert ended.err[-2].startswith("go on with: mlx-distill run recipe.yaml ")
        assert ended.err[-2].endswith(f" name={name} --resume")
        stages = run / "stages.json"
        assert list(json.loads(stages.read_text(encoding="utf-8")) if stages.exists() else {}) == list(
            NAMES[:finished]
        ), place
    quiet = "export.formats=[]"  # fresh processes have been started often enough
    for one in (name, "all-stages"):
        assert command(folder, capsys, "run", *RUN, f"name={one}", quiet).code == 0
    whole = folder / "runs" / "all-stages"
    for file in ("samples/generated.jsonl", "models/student/model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert measured(run) == measured(whole)


def signalled_after(patch: pytest.MonkeyPatch, place: str) -> None:
    """Let SIGTERM come right after the first call of this function."""
    module, _, name = place.rpartition(".")
    plain = pkgutil.resolve_name(place)

    def signalled(*arguments: Any, **how: Any) -> Any:
        found = plain(*arguments, **how)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    patch.setattr(pkgutil.resolve_name(module), name, signalled)


def measured(run: Path) -> dict[str, Any]:
    """What a run's evaluation says of each model, but how long it was trained."""
    models = json.loads((run / "evaluation.json").read_bytes())["models"]
    return {name: {**metrics, "train_seconds": None} for name, metrics in models.items()}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
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
    steps = [
        line
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"student"' in line
    ]
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


@pytest.mark.parametrize("cause", [True, False])
def test_a_library_that_takes_a_signal_for_its_own_failure_hides_none(cause: bool) -> None:
    """As mlx-lm does when Ctrl-C comes while it loads a model. Other failures after a signal are told."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Exception as error:
            raise ValueError("cannot be loaded") from (error if cause else None)

    with pytest.raises(Interrupted, match="stopped by SIGINT"), Interrupts().caught():
        load()

    def save() -> None:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            raise ZeroDivisionError

    interrupts = Interrupts()
    with pytest.raises(ZeroDivisionError), interrupts.caught():
        save()


def test_a_block_within_a_block_waits_no_less() -> None:
    interrupts = Interrupts()
    with interrupts.caught(), interrupts.deferred():
        with interrupts.deferred():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupts.check()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts().caught():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_hang_up_that_comes_twice_is_one() -> None:
    """A closed terminal's comes from the system, and again from the shell; the save goes on."""
    interrupts = Interrupts()
    with interrupts.caught(), interrupts.deferred():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Interrupted, match="stopped by SIGHUP") as caught:
            interrupts.check()
        assert caught.value.exit_code == 129
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_a_hang_up_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupts = Interrupts()
        with interrupts.caught():
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_costs_nothing(
    folder: Path, undisturbed: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real one: the system sends SIGHUP, and whatever is printed from then on fails."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *TRAIN, "name=closed"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(workshop.REPOSITORY), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while b" step " not in said:
        said += os.read(ours, 1000)
    os.close(ours)
    assert child.wait(timeout=60) == 129
    run = folder / "runs" / "closed"
    [saved] = (run / "checkpoints").iterdir()
    assert 0 < int(saved.name.removeprefix("step-")) < STEPS
    assert json.loads((run / "progress.json").read_text(encoding="utf-8"))["ended"] == "stopped by SIGHUP"
    assert command(folder, capsys, *TRAIN, "name=closed", "--resume").code == 0
    assert (run / "models/student/model.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("arguments", [["run", "recipe.yaml", "name=early"], ["plan", "recipe.yaml"]])
def test_a_signal_before_training_ends_the_command_with_its_code(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline, plan):
        monkeypatch.setattr(module, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    ended = command(folder, capsys, *arguments)
    assert ended.code == 130
    assert ended.err == ["error: stopped by SIGINT"]  # there is nothing to go on with
    assert not (folder / "runs" / "early").exists()
