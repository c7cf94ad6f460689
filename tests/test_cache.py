"""A stored teacher: the same numbers as a live one, of this run and no other, whole or not there."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import workshop
from mlx.utils import tree_flatten
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe
from workshop import command, contents

from mlx_distill import cache, models, pipeline
from mlx_distill.cache import CachedTeacher, write_cache
from mlx_distill.data.batch import Batch, Batches, counted_places, in_order, make_batch
from mlx_distill.errors import Fault
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective

V = 50
ROWS = rows_of([9, 4, 13, 7, 30, 2, 1, 22])
MADE_OF = {"fingerprint": "0123", "rows": "4567"}


@pytest.fixture(scope="module")
def live() -> LiveTeacher:
    return LiveTeacher(tiny_model(V, seed=9), V)


def stored(
    folder: Path, live: LiveTeacher, *, top_k: int = 8, temperature: float = 1.0, **options: Any
) -> CachedTeacher:
    write_cache(folder / "cache", live, ROWS, top_k=top_k, temperature=temperature, made_of=MADE_OF)
    return CachedTeacher(folder / "cache", ROWS, MADE_OF, **options)


def learned(teacher: Any, batches: list[Batch], top_k: int | None, temperature: float, tail: bool) -> Any:
    """Loss and gradients of a student, summed over batches."""
    terms = {name: {"temperature": temperature} for name in ("forward_kl", "jensen_shannon")}
    given = {"top_k": top_k, "tail": tail} if top_k else {}
    recipe = tiny_recipe(objective={**terms, "cross_entropy": {"weight": 0.5}}, teacher=given)
    student = tiny_model(V).model
    objective = make_objective(student, [teacher], recipe, V)
    run: Any = nn.value_and_grad(student, objective.sums)
    total, sums = 0.0, dict[str, Any]()
    for batch in batches:
        (loss, _), gradients = run(batch.tokens, counted_places(batch), [teacher.targets(batch)], {})
        total += float(loss)
        flat: Any = tree_flatten(gradients)
        sums = {name: gradient + sums.get(name, 0) for name, gradient in flat}
    return total, sums


def batches_of(*orders: list[int]) -> list[Batch]:
    return [make_batch([ROWS[i] for i in order])._replace(rows=tuple(order)) for order in orders]


EVERY = [[4, 0, 7], [2, 1], [6, 3, 5]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [V, 10 * V])
def test_all_that_is_stored_teaches_as_a_live_teacher_does(
    top_k: int, temperature: float, live: LiveTeacher, tmp_path: Path
) -> None:
    teacher = stored(tmp_path, live, top_k=top_k, temperature=temperature)
    assert teacher.indices.shape[-1] == V
    expected = learned(live, batches_of(*EVERY), None, temperature, True)
    found = learned(teacher, batches_of(*EVERY), top_k, temperature, True)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert largest_gap(found[1], expected[1]) < 1e-4
    # Stored at another temperature it must not pass.
    other = stored(tmp_path, live, top_k=top_k, temperature=1.5 * temperature)
    wrong = learned(other, batches_of(*EVERY), top_k, temperature, True)
    assert largest_gap(wrong[1], expected[1]) > 1e-2


@pytest.mark.parametrize("tail", [True, False])
def test_the_likeliest_that_are_stored_teach_as_those_of_a_live_teacher(
    tail: bool, live: LiveTeacher, tmp_path: Path
) -> None:
    teacher = stored(tmp_path, live, temperature=2.0, tail=tail)
    expected = learned(live, batches_of(*EVERY), 8, 2.0, tail)
    found = learned(teacher, batches_of(*EVERY), 8, 2.0, tail)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert largest_gap(found[1], expected[1]) < 1e-4
    other = learned(live, batches_of(*EVERY), 8, 2.0, not tail)
    assert largest_gap(found[1], other[1]) > 1e-3


def test_outcomes_are_those_of_the_row_wherever_it_comes(live: LiveTeacher, tmp_path: Path) -> None:
    """Against NumPy, in the batches of two epochs: rows come in another order and company each time."""
    teacher = stored(tmp_path, live)
    batches = Batches(ROWS, 64, seed=0)
    seen: set[tuple[int, ...]] = set()
    for index in range(2 * batches.per_epoch):
        batch = batches[index]
        seen.add(batch.rows)
        targets = teacher.targets(batch)
        top, count = targets.top, int(batch.counted.sum())
        assert top is not None
        assert top.log_tail is not None
        assert top.indices.shape[:2] == counted_places(batch)[None].shape
        logits = np.array(live.logits(batch.tokens), dtype=np.float64)[np.array(batch.counted)]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        indices, kept = np.array(top.indices[0])[:count], np.array(top.log_p[0])[:count]
        assert np.array_equal(np.sort(indices), np.sort(np.argsort(-log_p)[:, :8]))
        np.testing.assert_allclose(kept, np.take_along_axis(log_p, indices, axis=-1), rtol=1e-5, atol=1e-6)
        whole = np.exp(kept.astype(np.float64)).sum(-1) + np.exp(np.array(top.log_tail[0])[:count])
        np.testing.assert_allclose(whole, 1, rtol=1e-6)  # k + 1 outcomes are all there is
        np.testing.assert_array_equal(
            np.array(targets.labels[0])[:count], np.array(batch.labels)[np.array(batch.counted)]
        )
    assert len(seen) > batches.per_epoch  # the second epoch is no copy of the first

    # Rows taken for those of another batch show.
    one, other = batches_of([4, 0, 7], [0, 4, 7])
    wrong = teacher.targets(one._replace(rows=other.rows)).top
    right = teacher.targets(one).top
    assert wrong is not None
    assert right is not None
    assert not mx.array_equal(wrong.log_p, right.log_p)


def test_what_fills_up_is_finite(live: LiveTeacher, tmp_path: Path) -> None:
    for top_k in (8, V):
        top = stored(tmp_path, live, top_k=top_k).targets(batches_of([6])[0]).top  # one counted label
        assert top is not None
        assert mx.all(mx.isfinite(top.log_p))
        assert (top.log_tail is None) == (top_k == V)
        assert mx.all((top.indices >= 0) & (top.indices < V))


@pytest.mark.parametrize("made_of", [{"fingerprint": "other", "rows": "4567"}, {"fingerprint": "0123"}])
def test_another_cache_is_refused_by_name(made_of: dict[str, str], live: LiveTeacher, tmp_path: Path) -> None:
    stored(tmp_path, live)
    [field] = [key for key in MADE_OF if made_of.get(key) != MADE_OF[key]]
    with pytest.raises(Fault, match=f"cache: made of another {field} "):
        CachedTeacher(tmp_path / "cache", ROWS, made_of)


def test_nothing_is_half_written(live: LiveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PLACES", 16 * V)  # a batch for nearly each row
    assert len(in_order(ROWS, max(cache.PLACES // V, 64))) > 2
    calls = 0
    read = live.logits

    def failing(tokens: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        return read(tokens)

    monkeypatch.setattr(live, "logits", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        stored(tmp_path, live)
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    stored(tmp_path, live)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # what was left is gone
    before = contents(tmp_path)

    # An older one stays as it was.
    calls = 0
    monkeypatch.setattr(cache, "PLACES", 16 * V)
    monkeypatch.setattr(live, "logits", failing)
    with pytest.raises(RuntimeError):
        stored(tmp_path, live)
    assert before.items() <= contents(tmp_path).items()
    CachedTeacher(tmp_path / "cache", ROWS, MADE_OF)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


CACHED = [
    "recipe.yaml",
    "teacher.source=cache",
    "teacher.top_k=8",
    "evaluate.tasks=[]",
    "data.valid=good.jsonl",
]


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "forward_kl" in line]


def test_a_run_from_a_cache_is_a_run_with_a_live_teacher(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(folder, capsys, "run", *CACHED, "name=live", "teacher.source=live").code == 0
    teachers: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []
    load, train = models.load, pipeline.train

    def spy(name: str, where: str) -> models.Loaded:
        loaded = load(name, where)
        if where == "teacher.model":
            teachers.append(weakref.ref(loaded.model))
        return loaded

    def look(*arguments: Any) -> Any:
        alive.append(teachers[0]() is not None)
        return train(*arguments)

    monkeypatch.setattr(models, "load", spy)
    monkeypatch.setattr(pipeline, "train", look)
    gc.disable()  # memory of an accelerator does not make Python collect: what is let go must be gone at once
    try:
        assert command(folder, capsys, "run", *CACHED, "name=cached").code == 0
    finally:
        gc.enable()
    assert len(teachers) == 1  # to fill the cache, and not again
    assert alive == [False, False]  # while the student learns, and the baseline
    assert {path.name for path in (folder / "runs/cached/cache/teacher").iterdir()} == {
        "indices.npy",
        "log_p.npy",
        "log_tail.npy",
        "manifest.json",
    }
    one, other = metrics(folder, "live"), metrics(folder, "cached")
    assert len(one) == len(other) == 4
    for live_step, cached_step in zip(one, other, strict=True):
        for name in ("loss", "forward_kl", "cross_entropy", "gradient_norm"):
            assert cached_step[name] == pytest.approx(live_step[name], rel=1e-3), name
    whole = json.loads((folder / "runs/cached/stages.json").read_text())
    assert whole["cache"]["teacher"] > 12  # counted labels


def test_a_cache_is_made_alone_and_gone_on_from(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "name=stored"
    assert command(folder, capsys, "cache", *CACHED, name).code == 0
    run = folder / "runs" / "stored"
    assert list(json.loads((run / "stages.json").read_text())) == ["generate", "cache"]
    assert not (run / "models").exists()
    before = contents(run / "cache")
    with monkeypatch.context() as patch:
        load = models.load

        def refuse(name: str, where: str) -> models.Loaded:
            assert not where.startswith("teacher")
            return load(name, where)

        patch.setattr(models, "load", refuse)
        assert command(folder, capsys, "train", *CACHED, name, "--resume").code == 0
    assert contents(run / "cache") == before
    assert command(folder, capsys, "run", *CACHED, name, "--resume").code == 0
    assert (run / "models" / "student" / "model.safetensors").exists()

    # A cache that was left by another run is not believed.
    manifest = run / "cache" / "teacher" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "rows": "others"}))
    stages = json.loads((run / "stages.json").read_text())
    del stages["train"]
    (run / "stages.json").write_text(json.dumps(stages))
    ended = command(folder, capsys, "run", *CACHED, name, "--resume")
    assert ended.code == 1
    assert "made of another rows (others, not " in ended.err[0]


def test_answers_of_the_teacher_are_stored_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache follows the rows that the student learns from: the labels, then the answers."""
    learn = ["name=taught", "teacher=null", "objective={cross_entropy: }", "student={model: teacher}"]
    more = ["train={steps: 80, batch_tokens: 512, learning_rate: 1e-2}", "evaluate.tasks=[]"]
    assert command(folder, capsys, "train", "recipe.yaml", *learn, *more).code == 0
    asked = ["data.prompts={source: good.jsonl, rows: 5}", "generate.max_tokens=30", "name=answered"]
    taught = "teacher.model=runs/taught/models/student"
    assert command(folder, capsys, "train", *CACHED, *asked, taught).code == 0
    stages = json.loads((folder / "runs/answered/stages.json").read_text())
    assert stages["generate"]["kept"] > 0
    assert stages["train"]["rows"] == 12 + stages["generate"]["kept"]
    assert stages["cache"]["teacher"] == len(np.load(folder / "runs/answered/cache/teacher/log_tail.npy"))
