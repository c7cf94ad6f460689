"""Runs from a cache: the same as with a live teacher, shared, killed, damaged, and decided by memory."""

import gc
import json
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
import workshop
from workshop import command, process

from mlx_distill import learning, models, pipeline
from mlx_distill.cache.reader import CachedTeacher

CACHED = [
    "recipe.yaml",
    "teacher.source=cache",
    "teacher.top_k=8",
    "evaluate.tasks=[]",
    "data.valid=good.jsonl",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "forward_kl" in line]


def stages(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "stages.json").read_text(encoding="utf-8"))


def forget(folder: Path, name: str, *gone: str) -> None:
    kept = {stage: result for stage, result in stages(folder, name).items() if stage not in gone}
    (folder / "runs" / name / "stages.json").write_text(json.dumps(kept), encoding="utf-8")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_teacher(patch: pytest.MonkeyPatch) -> None:
    """Refuse to load a teacher."""
    load = models.load

    def refuse(name: str, where: str, **options: Any) -> models.Loaded:
        assert not where.startswith("teacher")
        return load(name, where, **options)

    patch.setattr(models, "load", refuse)


@pytest.mark.parametrize(
    ("kept", "off"),
    [
        ("exact, teacher.top_k=8", 1e-4),
        ("exact, teacher.top_k=200", 1e-4),
        ("compact, teacher.top_k=8", 2e-3),
    ],
)
def test_a_run_from_a_cache_is_a_run_with_a_live_teacher(
    kept: str, off: float, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's losses; a top k beyond the vocabulary is all of it."""
    precision, top_k = kept.split(", ")
    name = kept.replace(", teacher.top_k=", "-")
    options = [*CACHED, top_k, f"teacher.precision={precision}"]
    live = [*options, f"name=live-{name}", "teacher.source=live"]
    assert command(folder, capsys, "train", *live).code == 0
    teachers: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []
    load, train = models.load, learning.train

    def spy(name: str, where: str, **options: Any) -> models.Loaded:
        loaded = load(name, where, **options)
        if where == "teacher.model":
            teachers.append(weakref.ref(loaded.model))
        return loaded

    def look(*arguments: Any, **options: Any) -> Any:
        alive.append(teachers[0]() is not None)
        return train(*arguments, **options)

    monkeypatch.setattr(models, "load", spy)
    monkeypatch.setattr(learning, "train", look)
    gc.disable()  # memory of an accelerator does not make Python collect: what is let go must be gone at once
    try:
        assert command(folder, capsys, "train", *options, f"name={name}").code == 0
    finally:
        gc.enable()
    assert len(teachers) == 2  # to be probed, to fill the cache, and not again
    assert alive == [False]  # while the student learns
    one, other = metrics(folder, f"live-{name}"), metrics(folder, name)
    assert len(one) == len(other) == 4
    for live_step, cached_step in zip(one, other, strict=True):
        for loss in ("loss", "forward_kl", "cross_entropy"):
            assert cached_step[loss] == pytest.approx(live_step[loss], rel=off), loss
    assert stages(folder, name)["cache"]["teacher"] > 12  # counted labels


def test_a_cache_is_made_alone_and_gone_on_from(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "name=stored"
    ended = command(folder, capsys, "cache", *CACHED, name)
    assert ended.code == 0
    assert "MiB; 12 of 12 rows were read now" in ended.out
    run = folder / "runs" / "stored"
    assert list(stages(folder, "stored"))[-1] == "cache"
    assert not (run / "models").exists()
    before = content(run / "cache")
    with monkeypatch.context() as patch:
        no_teacher(patch)
        assert command(folder, capsys, "train", *CACHED, name, "--resume").code == 0
    assert content(run / "cache") == before

    # What was left by another run is not believed.
    manifest = run / "cache" / "teacher" / "manifest.json"
    manifest.write_text(
        json.dumps({**json.loads(manifest.read_text(encoding="utf-8")), "tokenizer": "89" * 32}),
        encoding="utf-8",
    )
    forget(folder, "stored", "train")
    ended = command(folder, capsys, "train", *CACHED, name, "--resume")
    assert ended.code == 2
    [line] = ended.err
    assert "was made with another tokenizer (8989" in line


def test_answers_of_the_teacher_are_stored_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache follows the rows that the student learns from: the labels, then the answers."""
    learn = ["name=taught", "teacher=null", "objective={cross_entropy: }", "student={model: teacher}"]
    more = ["train={steps: 80, batch_tokens: 512, learning_rate: 1e-2}", "evaluate.tasks=[]"]
    assert command(folder, capsys, "train", "recipe.yaml", *learn, *more).code == 0
    rows = ["data.train={source: good.jsonl, rows: 6}", "data.prompts={source: good.jsonl, start: 6}"]
    asked = [*rows, "generate.max_tokens=30", "name=answered"]
    taught = "teacher.model=runs/taught/models/student"
    assert command(folder, capsys, "train", *CACHED, *asked, taught).code == 0
    done = stages(folder, "answered")
    assert done["generate"]["kept"] > 0
    assert done["train"]["rows"] == 6 + done["generate"]["kept"]
    shards = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / "runs/answered/cache/teacher").glob("0*.json")
    ]
    assert sum(shard["rows"] for shard in shards) == done["train"]["rows"]


def test_runs_share_a_cache(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another student, other batches: no teacher. More rows: these alone. Another top k: refused at once."""
    shared = [*CACHED, "teacher.cache=targets/shared"]
    one = command(folder, capsys, "train", *shared, "name=one", "data.train={source: good.jsonl, rows: 7}")
    assert one.code == 0
    assert "7 of 7 rows were read now" in one.out
    assert not (folder / "runs" / "one" / "cache").exists()
    before = content(folder / "targets")
    with monkeypatch.context() as patch:
        no_teacher(patch)
        fewer = ["data.train={source: good.jsonl, rows: 5, start: 2}", "train.batch_tokens=64", "seed=7"]
        assert command(folder, capsys, "train", *shared, "name=two", *fewer).code == 0
        assert content(folder / "targets") == before
        for wrong, said in (
            ("teacher.top_k=9", "another `top_k` (8, and this run's is 9)"),
            ("teacher.model=./student", "the weights of another teacher ("),
            ("objective.forward_kl.temperature=2.0", "another `temperature` (1.0, and this run's is 2.0)"),
        ):
            ended = command(folder, capsys, "train", *shared, "name=three", wrong)
            assert ended.code == 2
            [line] = ended.err
            assert line.startswith("error: `teacher.cache`: targets/shared was made with")
            assert said in line
            assert not (folder / "runs" / "three").exists()
    more = command(folder, capsys, "cache", *shared, "name=more")
    assert "5 of 12 rows were read now" in more.out
    assert before.items() < content(folder / "targets").items()
    # Where it lies does not make another student.
    moved = command(folder, capsys, "train", *CACHED, "name=more", "--resume")
    assert moved.code == 0
    # A run that is started anew does not take along a cache that lies within it.
    own = ["name=one", "teacher.cache=runs/one/targets", "--overwrite"]
    ended = command(folder, capsys, "train", *CACHED, *own)
    assert ended.code == 2
    assert "holds runs/one/targets, which the recipe reads" in ended.err[0]


def test_a_damaged_shard_stops_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "name=damaged"
    assert command(folder, capsys, "cache", *CACHED, name).code == 0
    own = folder / "runs" / "damaged" / "cache" / "teacher"
    before, shard = content(own), own / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    # Noticed while the student learns: one line, with what to do.
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "filled_caches", lambda work: {})
        ended = command(folder, capsys, "train", *CACHED, name, "--resume")
    assert ended.code == 2
    assert len(ended.err) == 1
    assert "the cache lacks 12 of 12 rows; go on with --resume" in ended.err[0]
    ended = command(folder, capsys, "train", *CACHED, name, "--resume")
    assert ended.code == 0
    assert f"00000.safetensors: it has {len(before[shard.name]) - 100} bytes in place of" in ended.out
    assert "; its rows are read again" in ended.out
    assert content(own) == before


def test_a_cache_where_nothing_is_asked_of_the_teacher(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["objective={cross_entropy: }", "name=silent"]
    assert command(folder, capsys, "train", *CACHED, *answers).code == 0
    assert stages(folder, "silent")["cache"] == {}


def test_hidden_states_from_a_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with a live teacher, which is wider; and a model that does not say how deep it is."""
    terms = "objective={forward_kl: , hidden_mse: {layers: uniform}}"
    exact = [*CACHED, terms, "teacher.precision=exact"]
    assert command(folder, capsys, "train", *exact, "name=h-live", "teacher.source=live").code == 0
    assert command(folder, capsys, "train", *exact, "name=h-cached").code == 0
    for one, other in zip(metrics(folder, "h-live"), metrics(folder, "h-cached"), strict=True):
        for loss in ("forward_kl", "hidden_mse"):
            assert other[loss] == pytest.approx(one[loss], rel=1e-3), loss
    manifest = json.loads((folder / "runs/h-cached/cache/teacher/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["hidden"], manifest["layers"]) == ([0, 1, 2], 2)


@pytest.mark.parametrize(("gib", "source"), [(1000.0, "live"), (1e-4, "cache")])
def test_auto_follows_the_memory(
    gib: float,
    source: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_distill.memory.estimates.machine_gib", lambda: gib)
    name = f"auto-{source}"
    asked = [*CACHED, "teacher.source=auto", f"name={name}"]
    planned = command(folder, capsys, "plan", *asked)
    assert planned.code == 0
    fits = "fit" if source == "live" else "do not fit"
    said = f"teacher.source: auto takes {source}; teacher and student {fits} together"
    assert said in planned.out
    assert "\ntrain " in planned.out.partition("memory, GiB")[2]
    assert f"source: {source}" in planned.out
    ended = command(folder, capsys, "train", *asked)
    assert ended.code == 0
    assert said in ended.out
    run = folder / "runs" / name
    assert f"source: {source}" in (run / "recipe.yaml").read_text(encoding="utf-8")
    assert (run / "cache").exists() == (source == "cache")
    # A run goes on with what was decided, as its own recipe says.
    again = ["train", f"runs/{name}/recipe.yaml", "--resume"]
    assert command(folder, capsys, *again).code == 0


def test_a_killed_capture_goes_on_to_the_same_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process of its own, ended at two instants; benchmarks/kills_bench.py does it 200 times."""
    assert command(folder, capsys, "cache", *CACHED, "name=whole").code == 0
    own = folder / "runs" / "killed" / "cache" / "teacher"
    for wanted in ("manifest.json", "00000.safetensors"):
        running = process(folder, "cache", *CACHED, "name=killed", "--resume")
        while running.poll() is None and not (own / wanted).exists():
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert command(folder, capsys, "cache", *CACHED, "name=killed", "--resume").code == 0
    assert content(own) == content(folder / "runs" / "whole" / "cache" / "teacher")


def test_batches_of_a_run_are_announced(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[tuple[int, ...]] = []
    expect = CachedTeacher.expect

    def spy(self: CachedTeacher, batch: Any) -> None:
        announced.append(batch.rows)
        expect(self, batch)

    monkeypatch.setattr(CachedTeacher, "expect", spy)
    assert command(folder, capsys, "train", *CACHED, "name=ahead").code == 0
    assert len(announced) == 3  # of 4 steps; nobody waits for the first
