"""Watching a run: what it leaves for onlookers, what they make of it, and that they leave it alone."""

import io
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe
from workshop import REPOSITORY, command, process

from mlx_distill.console import Console
from mlx_distill.counters import Counters
from mlx_distill.errors import DistillError, NotFound, RunFolderError
from mlx_distill.files import write_text
from mlx_distill.interrupt import Interrupted
from mlx_distill.layout import STAGES
from mlx_distill.look import Look, Tail, Watched, find_run
from mlx_distill.progress_file import EVERY, ProgressFile, is_alive
from mlx_distill.progress_file import process as this_process
from mlx_distill.resident import memory_in_use
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog
from mlx_distill.watch import going_on, watch
from mlx_distill.watch_view import ASCII, BLOCKS, Changes, curve, picture, printable
from mlx_distill.watch_view import EVERY as TELL_EVERY

SCORES = {"nll": 0.5, "kl": 0.25, "top1_agreement": 0.9, "parameters": 1000}


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def quiet() -> Console:
    return Console(io.StringIO())


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "progress.json").read_text(encoding="utf-8"))


def make(folder: Path, **files: Any) -> Path:
    """A run folder; a keyword is a JSON file, `metrics` lines of metrics.jsonl, `log` those of log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fingerprint").write_text("0\n", encoding="utf-8")
    for name, value in files.items():
        lines = value if isinstance(value, list) else []
        if name == "metrics":
            write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        elif name == "log":
            write_text(folder / "log.txt", "".join(line + "\n" for line in lines))
        else:
            write_text(folder / f"{name}.json", json.dumps(value))
    return folder


def step(number: int, stage: str = "student", **values: float) -> dict[str, Any]:
    return {"step": number, "stage": stage, **values}


def progress_now(**changes: Any) -> dict[str, Any]:
    """A progress.json of this process, a second old."""
    now = time.time()
    state = {
        "stage": "train",
        "stage_started": now - 61,
        "title": "student",
        "done": 300,
        "total": 1000,
        "unit": "steps",
        "started": now - 60,
        "rate": 5.0,
        "left_seconds": 140.0,
        "columns": {"loss": 0.41, "memory": 1.5},
        "inside": None,
        "memory_gib": 1.5,
        "memory": "memory",
        "updated": now - 1,
        "ended": None,
        **this_process(),
    }
    return {**state, **changes}


def working(folder: Path, **changes: Any) -> Path:
    metrics = [step(i, loss=3 / i, forward_kl=2 / i, tokens_per_second=900.0) for i in range(20, 301, 20)]
    metrics.insert(10, step(200, valid_nll=0.5, valid_kl=0.3))
    return make(
        folder,
        progress=progress_now(**changes),
        stages={name: {} for name in STAGES[:4]},
        times={"generate": 62.0},
        environment={"command": "mlx-distill run recipe.yaml train.steps=1000 --overwrite"},
        metrics=metrics,
        log=["2026-01-02 03:04:05  a warning"],
    )


def finished(folder: Path) -> Path:
    make(folder, stages={name: {} for name in STAGES}, times=dict.fromkeys(STAGES, 5.0), log=["last words"])
    models = {"teacher": {"nll": 0.4}, "student": SCORES, "baseline": {**SCORES, "kl": 0.75}}
    (folder / "evaluation.json").write_text(
        json.dumps({"schema": 1, "recipe": "x", "models": models}), encoding="utf-8"
    )
    (folder / "report.html").write_text("<p>", encoding="utf-8")
    return folder


def drawn(look: Look, width: int = 100, blocks: str = BLOCKS) -> str:
    from rich.console import Console as RichConsole

    stream = io.StringIO()
    RichConsole(file=stream, width=width).print(picture(look, blocks))
    return stream.getvalue()


# What a run leaves for onlookers.


def test_progress_json_says_what_goes_on(tmp_path: Path) -> None:
    clock = Clock()
    file = ProgressFile(tmp_path / "progress.json", quiet().progress, lambda: ("memory", 1.5), clock)
    file.stage("generate")
    assert written(tmp_path)["stage"] == "generate" and written(tmp_path)["title"] is None
    clock.now += EVERY
    with file.progress("teacher answers", 200, "rows") as advance:
        clock.now += 10
        advance(50, tokens_per_second=812.0, loss=float("nan"))
        found = written(tmp_path)
    assert (found["title"], found["done"], found["total"], found["unit"]) == (
        "teacher answers",
        50,
        200,
        "rows",
    )
    assert (found["rate"], found["left_seconds"], found["memory_gib"]) == (5.0, 30.0, 1.5)
    assert found["columns"] == {"tokens_per_second": 812.0, "loss": None}  # JSON has no NaN
    assert abs(found["updated"] - time.time()) < 60 and found["started"] <= found["updated"]
    assert (found["pid"], found["ended"], found["inside"]) == (os.getpid(), None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_progress_json_is_written_at_most_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, writes = Clock(), []
    write = "mlx_distill.progress_file.write_status"
    monkeypatch.setattr(write, lambda path, value: writes.append((clock.now, value["done"])))
    file = ProgressFile(tmp_path / "progress.json", quiet().progress, clock=clock)
    with file.progress("work", 1000, "rows") as advance:
        for _ in range(1000):
            clock.now += 0.01
            advance()
    times, done = zip(*writes, strict=True)
    assert 10 <= len(writes) <= 11 and done[0] == 0 and list(done) == sorted(done)
    assert min(b - a for a, b in itertools.pairwise(times)) >= EVERY


def test_work_inside_work_does_not_hide_it(tmp_path: Path) -> None:
    clock = Clock()
    file = ProgressFile(tmp_path / "progress.json", quiet().progress, clock=clock)
    with file.progress("student", 100, "steps") as outer:
        outer(40)
        with file.progress("validation", 8, "rows") as inner:
            clock.now += 2
            inner(2)
            both = written(tmp_path)
        clock.now += 2
        outer(1)
    assert (both["title"], both["done"], both["inside"]["title"], both["inside"]["done"]) == (
        "student",
        40,
        "validation",
        2,
    )
    assert (written(tmp_path)["done"], written(tmp_path)["inside"]) == (41, None)


def test_work_that_an_error_ended_is_what_the_run_stopped_at(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "progress.json", quiet().progress, clock=Clock())
    file.stage("train")
    with pytest.raises(KeyError), file.progress("student", 100, "steps") as advance:  # noqa: PT012
        advance(40)
        raise KeyError("x")
    file.ended("why")
    found = written(tmp_path)
    assert (found["stage"], found["title"], found["done"], found["ended"]) == ("train", "student", 40, "why")
    file.stage("baseline")  # what another stage did is no news of this one
    assert (written(tmp_path)["title"], written(tmp_path)["ended"]) == (None, None)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "gone" / "progress.json", quiet().progress)
    file.stage("train")
    with file.progress("student", 10, "steps") as advance:
        advance(10)
    file.ended("stopped")
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_progress_is_handed_on_to_the_one_who_shows_it(tmp_path: Path) -> None:
    got: list[Any] = []

    @contextmanager
    def shown(title: str, total: int, unit: str) -> Iterator[Any]:
        got.append((title, total, unit))
        yield lambda amount=1, **columns: got.append((amount, columns))

    with ProgressFile(tmp_path / "progress.json", shown).progress("a", 3, "rows") as advance:
        advance()
        advance(2, loss=1.0)
    assert got == [("a", 3, "rows"), (1, {}), (2, {"loss": 1.0})]


def test_whether_a_process_lives() -> None:
    assert is_alive(this_process()) is True
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    ended = {**this_process(), "pid": child.pid, "born": "1"}
    assert child.stdout is not None
    child.stdout.read()
    child.wait()
    assert is_alive(ended) is False
    assert is_alive({**this_process(), "host": "another"}) is None  # its numbers say nothing here
    assert is_alive({}) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_neither_a_zombie_nor_a_namesake_lives() -> None:
    assert is_alive({**this_process(), "born": "1"}) is False  # the number was given away again
    child = subprocess.Popen([sys.executable, "-c", "print(end='')"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # its end of the pipe closes as it ends
    state = Path(f"/proc/{child.pid}/stat")
    while state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert is_alive({"pid": child.pid, "host": platform.node(), "born": None}) is False
    child.wait()


def test_memory_in_use_is_that_of_the_process() -> None:
    how, gib = memory_in_use()
    assert how in ("memory", "peak")
    assert 0.01 < gib < 1024


def test_a_run_keeps_times_and_lines_of_stages_that_are_done(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    for attempt in range(3):
        console = quiet()
        run = Run(folder, console)

        def work(attempt: int = attempt, console: Console = console) -> dict[str, Any]:
            console.say(f"attempt {attempt}")
            time.sleep(0.01 if attempt else 0.05)
            if attempt == 0:
                raise Interrupted(signal.SIGINT)
            return {}

        try:
            with run.following.whole(tiny_recipe()):
                console.say("headline")
                run.stage("train", work)
        except Interrupted:
            assert (written(folder)["ended"], written(folder)["stage"]) == ("stopped by SIGINT", "train")
            first = run.following.times()["train"]
    said = [line.partition("  ")[2] for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    # The third process found the stage finished: it did nothing, and left nothing.
    assert said == ["headline", "attempt 0", "headline", "attempt 1"]
    assert run.following.times()["train"] > first >= 0.05  # both attempts
    assert not (folder / "progress.json").exists()
    run.forget({"train"})
    assert run.following.times() == {}


def test_the_bar_of_training_has_loss_and_memory(tmp_path: Path) -> None:
    run = Run(make(tmp_path / "run"), quiet())
    shown: list[dict[str, float]] = []

    @contextmanager
    def progress(title: str, total: int, unit: str) -> Iterator[Any]:
        yield lambda amount=1, **columns: shown.append(columns)

    run.progress = progress
    log, counters = StageLog(run, "student"), Counters()
    for number in log.steps(1, 2):
        counters.add(number, {}, 1.0, 10, float(number))
        if number == 2:
            counters.window_losses = {"cross_entropy": 3.0}
            log.metrics(counters, tiny_recipe(), 1.0, 1e-3)
    how, _ = memory_in_use()
    assert list(shown[0]) == [how] and list(shown[1]) == ["loss", how]
    line = json.loads((run.folder / "metrics.jsonl").read_text(encoding="utf-8"))
    assert shown[1]["loss"] == line["loss"]


# What an onlooker makes of it.


def test_the_lines_of_a_file_that_changes(tmp_path: Path) -> None:
    """Whatever happens to the file: at every look, its whole lines and nothing else."""
    path, rng = tmp_path / "metrics.jsonl", random.Random(0)
    tail, content = Tail(path), b""
    assert tail.lines() == []
    for _ in range(300):
        match rng.randrange(5):
            case 0:  # replaced by fewer lines, as after a resume
                content = b"".join(content.splitlines(keepends=True)[: rng.randrange(4)])
                (tmp_path / "new").write_bytes(content)
                os.replace(tmp_path / "new", path)
            case 1 if path.exists() and rng.random() < 0.3:
                path.unlink()
                content = b""
            case _:  # a piece of a line, a line, or several
                piece = "".join(rng.choice("aé\u2028\n") for _ in range(rng.randrange(12))).encode()
                content += piece
                with open(path, "ab") as file:
                    file.write(piece)
        assert tail.lines() == content.decode().split("\n")[:-1]


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({"progress": progress_now()}, "working"),
        ({"progress": progress_now(host="another")}, "working"),  # nothing says that it ended
        ({"progress": progress_now(ended="the drive is full")}, "stopped"),
        ({"progress": progress_now(pid=2**30)}, "killed"),
        ({"progress": progress_now(pid=2**30), "stages": {name: {} for name in STAGES}}, "finished"),
        ({"stages": {name: {} for name in STAGES}}, "finished"),
        ({"stages": {"generate": {}}}, "idle"),
        ({}, "idle"),
    ],
)
def test_states(tmp_path: Path, files: dict[str, Any], state: str) -> None:
    assert Watched(make(tmp_path / "run", **files)).look().state == state


def test_half_written_files_are_no_trouble(tmp_path: Path) -> None:
    """Every file cut off anywhere, or holding what it should not: something is shown, nothing raised."""
    folder = working(tmp_path / "run")
    for path in [path for path in folder.iterdir() if path.suffix in (".json", ".jsonl", ".txt")]:
        whole = path.read_bytes()
        odd = [b"", b"\xff\xfe", b"[1]", b"null", b'{"stage": [], "done": "x", "columns": 3, "step": {}}\n']
        for content in [*(whole[:i] for i in range(0, len(whole), 17)), *odd]:
            path.write_bytes(content)
            look = Watched(folder).look()
            assert drawn(look, 40) and isinstance(Changes().lines(look), list)
        path.unlink()
        assert drawn(Watched(folder).look())
        path.write_bytes(whole)
    assert Watched(folder).look().state == "working"


def test_a_run_is_found_by_folder_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("runs/quickstart"))
    make(Path("elsewhere/mine"))
    Path("runs/notes").mkdir()
    assert find_run("quickstart") == find_run("runs/quickstart") == Path("runs/quickstart")
    assert find_run("elsewhere/mine") == Path("elsewhere/mine")
    with pytest.raises(NotFound, match="runs/quickstrat: no such .* did you mean runs/quickstart?"):
        find_run("quickstrat")
    with pytest.raises(NotFound, match="did you mean elsewhere/mine?"):
        find_run("elsewhere/mime")
    for folder in ("runs", "runs/notes"):
        with pytest.raises(RunFolderError, match=f"{folder} is no run folder"):
            find_run(folder)


def test_the_picture_of_a_run_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.chdir(tmp_path)
    text = drawn(Watched(working(Path("run"))).look())
    for part in (
        "run  working  memory 1.5 GiB",
        "✓  generate  00:01:02",
        "▸  train     00:01:01",
        "then",
        "300/1000 steps   30%  5.00 steps/s  left 00:02:19  loss 0.410",  # a second less than was written
        "student step 300",
        "loss       0.010  █",
        "tok/s 900",
        "valid_nll  0.500",
        "a warning",
    ):
        assert part in text, (part, text)


def test_a_terminal_without_the_letters_gets_others(tmp_path: Path) -> None:
    text = drawn(Watched(working(tmp_path / "run")).look(), blocks=ASCII)
    assert "+  generate  00:01:02" in text and ">  train     00:01:01" in text and "-  then" in text


def test_old_news_is_called_old(tmp_path: Path) -> None:
    look = Watched(working(tmp_path / "run", updated=time.time() - 600)).look()
    assert "no word for 00:10:00" in drawn(look, 200)
    assert "left 00:00:00" in drawn(look)


def test_a_run_that_was_killed_promises_nothing(tmp_path: Path) -> None:
    text = drawn(Watched(working(tmp_path / "run", pid=2**30)).look())
    assert "killed" in text and "300/1000 steps" in text and "▸  train     00:01:00" in text
    assert "left" not in text and "steps/s" not in text


def test_each_change_is_one_line_and_told_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", progress=progress_now(stage="generate", title=None))
    watched, changes = Watched(folder), Changes()
    assert changes.lines(watched.look()) == ["generate: begun"]
    assert changes.lines(watched.look()) == []
    make(
        folder,
        progress=progress_now(title=None),
        stages={"generate": {}},
        times={"generate": 3.0},
        metrics=[step(1, loss=2.0, learning_rate=1e-3, tokens_per_second=50.0)],
        log=["a warning"],
    )
    first = [
        "generate: done in 00:00:03",
        "train: begun",
        "a warning",
        "student   step     1  loss 2.000  tok/s 50",
    ]
    assert changes.lines(watched.look()) == first
    assert changes.lines(watched.look()) == []
    make(
        folder,
        metrics=[step(i, loss=2.0) for i in (1, 2, 3)] + [step(3, valid_nll=0.25, valid_kl=0.5, ece=1)],
    )
    assert changes.lines(watched.look()) == [
        "student   step     2  loss 2.000",
        "student   step     3  loss 2.000",
        "student   step     3  valid_nll 0.250  valid_kl 0.500",
    ]
    # A resumed run drops what it will do again: that is told again, and nothing else.
    make(folder, metrics=[step(1, loss=2.0)])
    assert changes.lines(watched.look()) == []
    make(folder, metrics=[step(1, loss=2.0), step(2, loss=2.5)])
    assert changes.lines(watched.look()) == ["student   step     2  loss 2.500"]


def test_work_without_metrics_is_told_of_now_and_then(tmp_path: Path) -> None:
    watched, changes = Watched(make(tmp_path / "run", progress=progress_now())), Changes()
    look = watched.look()
    assert changes.lines(look)[-1].startswith("student   300/1000 steps   30%  5.00 steps/s  left ")
    later = look._replace(progress={**look.progress, "done": 301})
    assert changes.lines(later._replace(now=look.now + TELL_EVERY - 1)) == []
    assert len(changes.lines(later._replace(now=look.now + TELL_EVERY))) == 1
    assert changes.lines(later._replace(now=look.now + 3 * TELL_EVERY)) == []  # nothing has moved


def test_a_curve() -> None:
    assert curve([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == BLOCKS
    assert curve([7.0, 0.0], ASCII) == "@_"
    assert curve([5.0, 5.0]) == "▁▁" and curve([5.0]) == "▁"
    values = [1 / (1 + i) for i in range(1000)]
    assert len(curve(values)) == 32
    heights = [BLOCKS.index(block) for block in curve(values)]
    assert heights == sorted(heights, reverse=True) and heights[0] == 7 and heights[-1] == 0


def test_nothing_moves_the_cursor() -> None:
    assert printable("a\x1b[2Jb\x07\rc\u202ed é") == "a [2Jb  c d é"


@pytest.mark.parametrize(
    ("ran", "state", "command"),
    [
        ("mlx-distill run r.yaml --overwrite", "killed", "mlx-distill run r.yaml --resume"),
        ("mlx-distill run r.yaml --resume", "stopped", "mlx-distill run r.yaml --resume"),
        (
            "python -m mlx_distill train 'my r.yaml' 'data={a: 1}'",
            "killed",
            "python -m mlx_distill train 'my r.yaml' 'data={a: 1}' --resume",
        ),
        ("mlx-distill train r.yaml", "idle", "mlx-distill run r.yaml --resume"),  # what was asked for is done
        ("mlx-distill evaluate r.yaml", "stopped", "mlx-distill evaluate r.yaml"),  # goes on by itself
        ("mlx-distill compress a.yaml b.yaml", "killed", "mlx-distill compress a.yaml b.yaml --resume"),
        ("my_script.py", "killed", "mlx-distill run runs/x/recipe.yaml --resume"),
        ("mlx-distill run don't", "killed", "mlx-distill run runs/x/recipe.yaml --resume"),
        (None, "killed", "mlx-distill run runs/x/recipe.yaml --resume"),
    ],
)
def test_how_to_go_on(
    ran: str, state: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Watched(make(tmp_path / "runs" / "x")).look()._replace(command=ran, state=state)
    assert going_on(look) == f"cd {tmp_path} && {command}"
    monkeypatch.chdir(tmp_path)
    assert going_on(look) == command


# The command.


def followed(folder: Path, changes: list[Any], **how: Any) -> str:
    """What is said while the folder changes: one of `changes` is done at each pause."""
    stream, left = io.StringIO(), list(changes)
    watch(str(folder), stream=stream, sleep=lambda seconds: left.pop(0)(), **how)
    assert not left
    return stream.getvalue()


def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    folder = working(tmp_path / "runs" / "x")

    def end() -> None:
        finished(folder)
        (folder / "progress.json").unlink()

    said = followed(folder, [lambda: None, end]).splitlines()
    assert said[:2] == ["generate: done in 00:01:02", "score: done"] and "train: begun" in said
    assert said.index("train: begun") < said.index("train: done in 00:00:05")
    assert "The student's KL to the teacher is 0.250" in said[-2] or "KL" in said[-2]
    assert said[-1] == f"report: {folder / 'report.html'}"


def test_a_finished_run_says_its_verdict_at_once(tmp_path: Path) -> None:
    assert followed(finished(tmp_path / "x"), []).splitlines()[-1].startswith("report: ")
    (tmp_path / "x" / "evaluation.json").write_text('{"schema": 7}', encoding="utf-8")
    assert "expected" in followed(tmp_path / "x", [])
    (tmp_path / "x" / "evaluation.json").unlink()
    assert followed(tmp_path / "x", []).splitlines()[-1] == "finished; nothing was measured"


def test_a_run_that_died_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    folder = working(tmp_path / "runs" / "x")
    dead = json.dumps(progress_now(pid=2**30))
    said = followed(
        folder, [lambda: (folder / "progress.json").write_text(dead, encoding="utf-8")]
    ).splitlines()
    assert said[-2] == f"killed at stage train: its process {2**30} is no more"
    there = f"go on with: cd {tmp_path} && mlx-distill run recipe.yaml train.steps=1000 --resume"
    assert said[-1] == there
    stopped = json.dumps(progress_now(ended="stopped by SIGINT"))
    (folder / "progress.json").write_text(stopped, encoding="utf-8")
    assert "stopped at stage train: stopped by SIGINT" in followed(folder, [])


def test_one_look(tmp_path: Path) -> None:
    assert "train: begun" in followed(working(tmp_path / "x"), [], once=True)


def test_a_folder_that_is_replaced_is_waited_for_and_one_that_is_gone_is_not(tmp_path: Path) -> None:
    folder = working(tmp_path / "x")
    away = tmp_path / "away"
    back = [lambda: folder.rename(away), lambda: None, lambda: away.rename(folder), lambda: finished(folder)]
    # Replaced by a finished one: this process still works on it, as its progress.json says.
    assert "verdict" not in followed(folder, [*back, (folder / "progress.json").unlink])
    with pytest.raises(NotFound, match="is gone"):
        followed(working(folder), [lambda: folder.rename(away), *[lambda: None] * 6])


def test_watching_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    folders = [working(tmp_path / "a"), finished(tmp_path / "b"), make(tmp_path / "c")]
    paths = [*folders, *(path for folder in folders for path in folder.rglob("*"))]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths}
    for folder in folders:
        followed(folder, [], once=True)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths} == before
    assert sorted(paths) == sorted([*folders, *(path for folder in folders for path in folder.rglob("*"))])
    for path in paths:
        path.chmod(0o755)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_picture_that_replaces_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    folder, stream = working(tmp_path / "x"), Terminal()
    ends = [lambda: None, lambda: finished(folder), (folder / "progress.json").unlink]
    watch(str(folder), stream=stream, sleep=lambda seconds: ends.pop(0)())
    text = stream.getvalue()
    assert text.count("300/1000 steps") >= 2 and "\x1b[2K" in text  # drawn again over the old one
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back
    assert text.endswith(f"report: {folder / 'report.html'}\n")


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    folder = working(tmp_path / "runs" / "x", pid=os.getpid())
    child = process(tmp_path, "watch", "x", "--every", "30")
    assert child.stdout is not None
    assert child.stdout.readline() == "generate: done in 00:01:02\n"
    while "student" not in child.stdout.readline():  # the last line of the first look
        pass
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "")
    assert is_alive(written(folder)) is True


def test_a_pipe_that_closes_is_no_fault(tmp_path: Path) -> None:
    working(tmp_path / "runs" / "x", pid=os.getpid())
    child = process(tmp_path, "watch", "x", "--every", "0.1")
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(timeout=60) == 0


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "runs" / "quickstart")
    ended = command(tmp_path, capsys, "watch", "quickstrt")
    assert (ended.code, len(ended.err)) == (2, 1)
    assert "did you mean runs/quickstart?" in ended.err[0]
    ended = command(tmp_path, capsys, "watch", "quickstart", "--once")
    assert (ended.code, ended.err) == (0, [])
    assert "report: runs/quickstart/report.html" in ended.out
    assert command(tmp_path, capsys, "watch", "quickstart", "--every", "0").code == 2


def test_an_onlooker_takes_no_device_and_no_time_to_start() -> None:
    code = (
        "import sys, mlx_distill.watch; "
        "sys.exit(bool({'mlx.core', 'numpy', 'rich', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_errors_of_the_run_are_told_in_their_first_line(tmp_path: Path) -> None:
    run = Run(make(tmp_path / "run"), quiet())

    def fails(error: BaseException) -> dict[str, Any]:
        raise error

    for error, told in ((KeyError("x"), "KeyError: 'x'"), (DistillError("one\ntwo"), "one")):
        with pytest.raises(type(error)), run.following.whole(tiny_recipe()):
            run.stage("train", lambda error=error: fails(error))
        assert written(run.folder)["ended"] == told
