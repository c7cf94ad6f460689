"""`train.log_to`: every number reaches every tracker, its trouble stays its own, and nothing else is sent."""

import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import workshop
from tiny import tiny_model, tiny_recipe
from workshop import REPOSITORY, command

from mlx_distill import trackers
from mlx_distill.console import Console
from mlx_distill.counters import Counters
from mlx_distill.errors import MissingExtra
from mlx_distill.interrupt import Interrupted
from mlx_distill.optimizer import make_optimizer
from mlx_distill.recipe import Recipe
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog
from mlx_distill.tracker_packages import TensorBoard, Wandb
from mlx_distill.trackers import Trackers, check_trackers

Series = dict[tuple[str, str], dict[int, float]]  # (stage, name) -> step -> value


class Kept:
    """A tracker that keeps what it gets, as a chart shows it; `told` are the calls."""

    where = "in memory"

    def __init__(self, recipe: Recipe | None = None, folder: Path | None = None):
        self.told: list[tuple[Any, ...]] = []
        self.series: Series = {}
        self.doubled: list[tuple[str, str, int]] = []  # values of a step that was there already

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.told.append(("write", stage, step))
        for name, value in values.items():
            points = self.series.setdefault((stage, name), {})
            if step in points:
                self.doubled.append((stage, name, step))
            points[step] = value

    def restart(self, stage: str, step: int) -> None:
        self.told.append(("restart", stage, step))
        for (of, _), points in self.series.items():
            for later in [number for number in points if of == stage and number > step]:
                del points[later]

    def scores(self, model: str, values: Mapping[str, float]) -> None:
        self.told.append(("scores", model))
        self.series |= {(f"evaluation/{model}", name): {0: value} for name, value in values.items()}

    def close(self, finished: bool) -> None:
        self.told.append(("close", finished))


class Broken(Kept):
    """A tracker whose network is gone."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        super().write(stage, step, values)
        raise ConnectionError("no route to host\nmore of it")


def logged(path: Path) -> Series:
    """What metrics.jsonl holds."""
    found: Series = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        step, stage = line.pop("step"), line.pop("stage")
        for name, value in line.items():
            found.setdefault((stage, name), {})[step] = value
    return found


def opened(folder: Path, *kept: Kept) -> tuple[Run, io.StringIO]:
    """A run that these trackers follow, and what its console says."""
    folder.mkdir(exist_ok=True)
    stream = io.StringIO()
    run = Run(folder, Console(stream))
    found = {f"tracker {number}": tracker for number, tracker in enumerate(kept)}
    run.following._trackers = Trackers(run.console.say, found)
    return run, stream


def trained(run: Run, stage: str, first: int, last: int, loss: float) -> None:
    """Steps `first` to `last`, each with a line of metrics, every second one with validation."""
    log, counters = StageLog(run, stage), Counters()
    for step in range(first, last + 1):
        counters.add(step, {"forward_kl": loss / step, "cross_entropy": loss}, 1.0, 10, 0.1 * step)
        log.metrics(counters, tiny_recipe(), 0.5, 1e-3)
        if step % 2 == 0:
            log.validation(step, {"nll": loss + step, "kl": float("nan")})


def test_every_number_of_metrics_jsonl_reaches_every_tracker_in_its_order(tmp_path: Path) -> None:
    one, other = Kept(), Kept()
    run, _ = opened(tmp_path / "run", one, other)
    trained(run, "student", 1, 5, 2.0)
    trained(run, "baseline", 1, 3, 3.0)
    lines = [
        json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert one.told == [("write", line["stage"], line["step"]) for line in lines] == other.told
    assert repr(one.series) == repr(logged(run.folder / "metrics.jsonl"))  # as text: NaN is not itself
    assert {("student", "loss"), ("student", "valid_nll"), ("baseline", "tokens")} <= one.series.keys()


def test_a_tracker_that_fails_is_told_of_once_and_left_alone(tmp_path: Path) -> None:
    broken, kept = Broken(), Kept()
    run, stream = opened(tmp_path / "run", broken, kept)
    trained(run, "student", 1, 5, 2.0)
    assert len(broken.told) == 1 and len(kept.told) == 7
    (warning,) = [line for line in stream.getvalue().splitlines() if "ConnectionError" in line]
    assert warning == (
        "tracker 0 gets no more numbers: ConnectionError: no route to host; the run goes on, and "
        "metrics.jsonl has them all"
    )


def test_a_signal_that_comes_meanwhile_is_no_failure_of_the_tracker(tmp_path: Path) -> None:
    class Slow(Kept):
        def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
            raise Interrupted(2)

    run, stream = opened(tmp_path / "run", Slow())
    with pytest.raises(Interrupted):
        trained(run, "student", 1, 1, 2.0)
    assert "gets no more" not in stream.getvalue()


def test_steps_that_are_taken_again_replace_what_was_written(tmp_path: Path) -> None:
    kept = Kept()
    run, _ = opened(tmp_path / "run", kept)
    model, optimizer = tiny_model().model, make_optimizer(tiny_recipe().train)
    optimizer.init(model.trainable_parameters())
    trained(run, "baseline", 1, 4, 7.0)
    trained(run, "student", 1, 4, 2.0)
    StageLog(run, "student").save(model, optimizer, Counters(step=2))
    # Killed, and another process goes on from step 2.
    again, _ = opened(tmp_path / "run", kept)
    assert StageLog(again, "student").restore(model, optimizer).step == 2
    trained(again, "student", 3, 6, 5.0)
    assert repr(kept.series) == repr(logged(run.folder / "metrics.jsonl"))
    assert kept.doubled == []
    # Without the word about the restart, steps 3 and 4 would be there twice.
    deaf = Kept()
    deaf.restart = lambda stage, step: None  # type: ignore[method-assign]
    for call in kept.told:
        if call[0] == "write":
            deaf.write(call[1], call[2], {"loss": 1.0})
    assert [step for _, _, step in deaf.doubled if step in (3, 4)]


def test_scores_are_the_numbers_of_evaluation_json(tmp_path: Path) -> None:
    kept = Kept()
    run, _ = opened(tmp_path / "run", kept)
    student = {"kl": 0.5, "sandbox": "unshare", "joules_per_token": None, "problems": 3, "speed": [{"a": 1}]}
    text = json.dumps({"schema": 1, "models": {"teacher": {"nll": 0.25}, "student": student}})

    def evaluate() -> dict[str, Any]:
        (run.folder / "evaluation.json").write_text(text, encoding="utf-8")
        return {}

    run.stage("train", dict)
    assert kept.series == {}
    run.stage("evaluate", evaluate)
    teacher, mine = "evaluation/teacher", "evaluation/student"
    assert kept.series == {(teacher, "nll"): {0: 0.25}, (mine, "kl"): {0: 0.5}, (mine, "problems"): {0: 3.0}}
    run.stage("evaluate", evaluate)  # finished before: nothing is sent again
    assert len(kept.told) == 2


def test_a_missing_package_stops_the_run_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.make(tmp_path)
    for name in ("tensorboard", "wandb", "trackio"):  # as wandb leaves one behind: no package
        (tmp_path / "runs" / name).mkdir(parents=True)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "runs")])
    both = tiny_recipe(train={"log_to": ["trackio", "wandb", "trackio"]})
    with pytest.raises(
        MissingExtra, match=r"\[trackio, wandb\] needs packages .* 'mlx-distill\[trackio,wandb\]'"
    ):
        check_trackers(both)
    check_trackers(tiny_recipe())
    monkeypatch.undo()
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    before = workshop.contents(tmp_path)
    for verb in ("run", "plan"):
        ended = command(tmp_path, capsys, verb, "recipe.yaml", "train.log_to=[tensorboard]")
        assert (ended.code, len(ended.err)) == (2, 1)
        assert ended.err[0] == (
            "error: `train.log_to` [tensorboard] needs a package that is missing: "
            "pip install 'mlx-distill[tensorboard]'"
        )
    assert workshop.contents(tmp_path) == before


def test_trackers_do_not_belong_to_the_fingerprint() -> None:
    from mlx_distill.recipe import fingerprint

    assert fingerprint(tiny_recipe(train={"log_to": ["wandb"]})) == fingerprint(tiny_recipe())
    assert fingerprint(tiny_recipe(train={"steps": 5})) != fingerprint(tiny_recipe())


def test_a_whole_run_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From recipe to tracker: student and baseline by stage, then the scores; a finished run is silent."""
    workshop.make(tmp_path)
    made: list[Kept] = []

    def make(recipe: Recipe, folder: Path) -> Kept:
        made.append(Kept())
        return made[-1]

    def refuses(recipe: Recipe, folder: Path) -> Kept:
        raise OSError("no space")

    monkeypatch.setattr(trackers, "_is_installed", lambda name: True)
    monkeypatch.setattr(trackers, "OPEN", {"tensorboard": make, "trackio": refuses})
    run = [
        "run",
        "recipe.yaml",
        "name=tracked",
        "train.steps=2",
        "evaluate.tasks=[fidelity]",
        "data.valid=good.jsonl",
    ]
    ended = command(tmp_path, capsys, *run, "train.eval_every=2", "train.log_to=[tensorboard, trackio]")
    assert ended.code == 0
    assert "tensorboard: in memory" in ended.out and "trackio gets no more numbers: OSError" in ended.out
    (kept,) = made
    assert kept.told[-1] == ("close", True)
    folder = tmp_path / "runs" / "tracked"
    evaluation = {key: points for key, points in kept.series.items() if key[0].startswith("evaluation/")}
    series = {key: points for key, points in kept.series.items() if key not in evaluation}
    assert series == logged(folder / "metrics.jsonl")
    assert {stage for stage, _ in series} == {"student", "baseline"} and ("student", "valid_nll") in series
    models = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["models"]
    assert evaluation["evaluation/student", "kl"] == {0: models["student"]["kl"]}
    assert {name for name, _ in evaluation} == {f"evaluation/{model}" for model in models}
    ended = command(tmp_path, capsys, *run, "train.eval_every=2", "train.log_to=[tensorboard]", "--resume")
    assert ended.code == 0 and len(made) == 1


# The packages themselves, where they are installed.


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@needs("tensorboard")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    board = TensorBoard(tiny_recipe(), tmp_path)
    for stage in ("student", "baseline"):
        for step in (10, 20, 30):
            board.write(stage, step, {"loss": 1 / step, "valid_nll": float(step)})
    board.scores("student", {"kl": 0.5})
    # Another process goes on from step 20, and measures again.
    other = TensorBoard(tiny_recipe(), tmp_path)
    other.restart("student", 20)
    for step in (30, 40):
        other.write("student", step, {"loss": 2 / step})
    other.scores("student", {"kl": 0.25})
    board.close(True), other.close(True)
    found = read_events(tmp_path / "tensorboard" / "student")
    assert found["loss"] == [
        (step, pytest.approx(value)) for step, value in ((10, 0.1), (20, 0.05), (30, 2 / 30), (40, 0.05))
    ]
    assert found["valid_nll"] == [(10, 10.0), (20, 20.0)]
    assert [step for step, _ in read_events(tmp_path / "tensorboard" / "baseline")["loss"]] == [10, 20, 30]
    assert read_events(tmp_path / "tensorboard" / "evaluation" / "student") == {"kl": [(0, 0.25)]}
    assert "tensorflow" not in sys.modules


@needs("tensorboard")
def test_tensorboard_would_keep_doubled_steps_without_the_restart(tmp_path: Path) -> None:
    board = TensorBoard(tiny_recipe(), tmp_path)
    for step in (10, 20, 30, 30, 40):
        board.write("student", step, {"loss": 1.0})
    board.close(False)
    assert [step for step, _ in read_events(tmp_path / "tensorboard" / "student")["loss"]].count(30) == 2


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import mlx_distill  # before mlx
from tiny import tiny_recipe
from mlx_distill.trackers import Trackers, check_trackers
folder, name = Path(sys.argv[1]), sys.argv[2]
recipe = tiny_recipe(train={"log_to": [name]}, data={"train": {"source": "pocket", "rows": 10}})
check_trackers(recipe)
for first, loss in ((1, 0.5), (3, 0.25)):
    trackers = Trackers(print)
    trackers.open([name], recipe, folder)
    trackers.restart("student", first - 1)
    for step in range(first, 5):
        trackers.write("student", step, {"loss": loss / step})
    trackers.scores(folder / "evaluation.json")
    trackers.close(True)
"""


def drive(folder: Path, name: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A process that tracks a run twice, as if it was resumed at step 3."""
    (folder / "evaluation.json").write_text('{"models": {"student": {"kl": 0.5}}}', encoding="utf-8")
    home = {"HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), name],
        cwd=REPOSITORY,
        env={**os.environ, **home, **environment},
        capture_output=True,
        text=True,
    )


@needs("wandb")
def test_wandb_keeps_numbers_and_the_recipe_and_nothing_else(tmp_path: Path) -> None:
    done = drive(tmp_path, "wandb", WANDB_MODE="offline")
    assert (done.returncode, done.stderr) == (0, "")
    where = f"wandb: scalars and the recipe stay in {tmp_path / 'wandb'} until `wandb sync` sends them"
    assert done.stdout.splitlines() == [where] * 2
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    identity = json.loads((tmp_path / "trackers.json").read_text(encoding="utf-8"))["id"]
    assert {path.name for path in runs} == {f"run-{identity}.wandb"}
    kept = b"".join(path.read_bytes() for path in runs)
    for part in (b"student/loss", b"student/step", b"evaluation/student/kl", b'"batch_tokens":256', b"tiny"):
        assert part in kept, part
    host = [platform.node()] if len(platform.node()) > 5 else []  # a short one is in other words
    for part in (*host, sys.executable, "def add", str(REPOSITORY)):
        assert part.encode() not in kept, part
    sent = {path.name for path in (tmp_path / "wandb").glob("offline-run-*/files/**/*")}
    assert not sent & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch"}


@needs("wandb")
def test_wandb_never_asks_for_a_key_in_the_middle_of_a_run(tmp_path: Path) -> None:
    done = drive(tmp_path, "wandb", WANDB_MODE="online", WANDB_API_KEY="")
    assert done.returncode == 1
    assert "RecipeError: `train.log_to` [wandb]: nobody is logged in; run `wandb login`, or " in done.stderr
    assert not (tmp_path / "wandb").exists()


@needs("trackio")
def test_trackio_keeps_numbers_and_the_recipe(tmp_path: Path) -> None:
    import sqlite3

    done = drive(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "kept"))
    assert (done.returncode, done.stderr) == (0, "")
    name = "tiny-" + json.loads((tmp_path / "trackers.json").read_text(encoding="utf-8"))["id"]
    assert (
        done.stdout.splitlines()
        == [
            f"trackio: scalars and the recipe are kept on this machine, as {name}; look with "
            "`trackio show --project mlx_distill`"
        ]
        * 2
    )
    with sqlite3.connect(tmp_path / "kept" / "mlx_distill.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        configs = database.execute("select config from configs").fetchall()
    assert {run for _, run, *_ in rows} == {name}
    assert len({identity for identity, *_ in rows}) == 1  # the second went on with the run of the first
    assert json.loads(configs[0][0])["train"]["batch_tokens"] == 256
    points = [(step, json.loads(metrics)) for *_, step, metrics in rows]
    losses = [(step, values["student/loss"]) for step, values in points if "student/loss" in values]
    assert losses == [*((i, 0.5 / i) for i in (1, 2, 3, 4)), (3, 0.25 / 3), (4, 0.25 / 4)]
    assert {"evaluation/student/kl": 0.5} in [values for _, values in points]


def test_wandb_says_aloud_when_numbers_leave_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the package: what it is given, and what is said."""
    given: dict[str, Any] = {}

    class Made:
        url = "https://example.org/run"

        class settings:
            mode = "online"

    class Package:
        @staticmethod
        def Settings(**settings: Any) -> dict[str, Any]:
            return settings

        @staticmethod
        def init(**options: Any) -> Made:
            given.update(options)
            return Made()

    monkeypatch.setitem(sys.modules, "wandb", Package)  # type: ignore[arg-type]
    first = Wandb(tiny_recipe(), tmp_path)
    assert first.where == "scalars and the recipe are SENT to https://example.org/run"
    assert (given["project"], given["name"], given["resume"]) == ("mlx_distill", "tiny", "allow")
    assert given["config"]["train"]["steps"] == 4 and "mode" not in given  # WANDB_MODE decides
    quiet = ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
    assert all(given["settings"][name] is True for name in quiet)
    assert given["settings"]["console"] == "off" and given["settings"]["x_save_requirements"] is False
    identity = given["id"]
    Wandb(tiny_recipe(), tmp_path)
    assert given["id"] == identity  # a resumed run goes on
    (tmp_path / "trackers.json").unlink()
    Wandb(tiny_recipe(), tmp_path)
    assert given["id"] != identity  # one that replaces it does not
