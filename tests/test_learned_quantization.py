"""Learned quantization of a run: rows, recipes, what is kept, and how it goes on."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import workshop
from mlx.utils import tree_flatten
from tiny import rows_of, tiny_recipe

from mlx_distill import models, pipeline, recipe
from mlx_distill.console import Console
from mlx_distill.data.batch import Encoded
from mlx_distill.errors import RecipeError
from mlx_distill.options import Quantize
from mlx_distill.prune.sparse import sparsity_of
from mlx_distill.quantize import learned
from mlx_distill.quantize.levels import Level, levels
from mlx_distill.quantize.rounding import quantized
from mlx_distill.stage_log import StageLog

METHODS = pytest.mark.parametrize("method", ["dwq", "qad"])


def level(method: str = "qad", **options: Any) -> Level:
    return levels(Quantize.model_validate({"method": method, "bits": 3, "group_size": 32, **options}))[0]


# Rows that are kept apart


def work_of(rows: list[Encoded], valid: list[Encoded], prompts: list[list[int]] | None = None) -> Any:
    asked = [SimpleNamespace(row=None, tokens=tokens) for tokens in prompts or []]
    prepared = SimpleNamespace(valid=valid, prompts=asked)
    return SimpleNamespace(prepared=prepared, recipe=tiny_recipe(), rows=rows)


@pytest.mark.parametrize(("count", "apart"), [(1, 1), (2, 1), (12, 1), (60, 3)])
def test_some_lessons_are_kept_apart(count: int, apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([5] * count)
    found = learned.Lessons([], rows, ["train"] * count, [None] * count)._replace(rows=[None] * count)  # type: ignore[list-item]
    monkeypatch.setattr(learned, "lessons", lambda work: found)
    one = learned._rows(work_of(rows, []))
    assert len(one.valid) == apart and "apart" in one.judged_on
    assert len(one.learned.encoded) == len(one.learned.sources) == max(1, count - apart)
    if count > 1:
        assert not {tuple(row.tokens) for row in one.valid} & {tuple(r.tokens) for r in one.learned.encoded}
    assert learned._rows(work_of(rows, [])).valid == one.valid
    valid = rows_of([4] * 2)
    one = learned._rows(work_of(rows, valid))
    assert (one.valid, one.judged_on, len(one.learned.encoded)) == (valid, "data.valid", count)


def test_a_student_without_lessons_learns_on_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "lessons", lambda work: learned.Lessons([], [], [], []))
    one = learned._rows(work_of([], rows_of([4]), [[5, 6, 7], [8], [9, 10]]))
    assert one.learned.encoded == [Encoded([5, 6, 7], 1), Encoded([9, 10], 1)]
    assert (one.learned.sources, one.learned.prompts) == (["prompts", "prompts"], [0, 2])


# Recipes


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {
                "student": {"shape": None, "model": "x"},
                "teacher": None,
                "objective": {"cross_entropy": {}},
                "quantize": {"towards": "teacher"},
            },
            "`quantize.towards` teacher: the recipe names no `teacher`; use student",
        ),
        (
            {
                "student": {"shape": None, "model": "x"},
                "teacher": {"model": "student", "ema": 0.9},
                "quantize": {"towards": "teacher"},
            },
            "`quantize.towards` teacher: it is a moving average of the student, gone once that is trained; "
            "use student",
        ),
        (
            {"teacher": {"source": "cache", "top_k": 4}, "quantize": {"temperature": 2.0}},
            "`quantize.temperature` 2: the teacher's targets are stored at 1, the temperature of "
            "`objective`; use that, or `quantize.towards` student",
        ),
        (
            {
                "student": {"shape": None, "prune": {"sparsity": {}}},
                "quantize": {"method": "dwq"},
            },
            "`quantize.method` dwq moves whole groups of weights, and with them the zeros of "
            "`student.prune.sparsity`; use qad or rtn",
        ),
        (
            {"student": {"shape": None, "prune": {"sparsity": {}}}, "quantize": {"rank": 4}},
            "`quantize.rank` 4: LoRA matrices would fill the zeros of `student.prune.sparsity`; drop it",
        ),
    ],
)
def test_refused_before_anything_is_read(sections: dict[str, Any], line: str) -> None:
    given = {"method": "qad", "group_size": 32, **sections.pop("quantize")}
    with pytest.raises(RecipeError) as error:
        tiny_recipe(quantize=given, **sections)
    assert str(error.value).splitlines() == [f"recipe: {line}"]


def test_a_cache_of_another_temperature_does_when_the_student_is_learned_from() -> None:
    made = {"method": "dwq", "group_size": 32, "temperature": 2.0, "towards": "student"}
    tiny_recipe(teacher={"source": "cache", "top_k": 4}, quantize=made)


def test_the_recipe_of_the_training() -> None:
    """All of the run but its objective, and what would act on other rows, teachers or weights."""
    teacher = {"model": "embedded", "others": [{"model": "embedded"}]}
    train = {"steps": 100, "warmup": 10, "weight_decay": 0.1, "eval_every": 5, "curriculum": {"by": "length"}}
    plain = tiny_recipe(
        student={"shape": None, "model": "x", "method": "lora", "dropout": 0.5},
        teacher=teacher,
        generate={"on_policy": {"share": 0.5}},
        train={**train, "clip": 0.5, "save_every": 7},
    )
    options = level(steps=50, learning_rate=0.03, temperature=2.0).options
    how = learned.recipe_of(plain, options, "teacher", "folder")
    assert list(how.objective) == ["forward_kl"] and how.objective["forward_kl"].options == {
        "temperature": 2.0
    }
    assert (how.train.steps, how.train.learning_rate, how.train.warmup) == (50, 0.03, 5)
    assert (how.train.weight_decay, how.train.eval_every, how.train.curriculum) == (0, 0, None)
    kept = ("clip", "save_every", "batch_tokens", "beta2", "compile", "log_every", "micro_batches")
    assert all(getattr(how.train, key) == getattr(plain.train, key) for key in kept)
    assert (how.student.dropout, how.generate.on_policy) == (0, None)
    assert list(how.teachers) == ["teacher"] and how.teachers["teacher"].model == "embedded"
    how = learned.recipe_of(plain, options.model_copy(update={"steps": 1}), "student", "folder")
    assert (how.train.warmup, list(how.teachers), how.teachers["teacher"].model) == (0, ["teacher"], "folder")


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


SHORT = ["train.steps=3", "evaluate={tasks: [], baseline: false}", "export.formats=[]", "train.compile=false"]
STEPS = "quantize={method: dwq, bits: 3, group_size: 32, steps: 6}"


def run(
    folder: Path, name: str, *overrides: str, measured: bool = True, **how: Any
) -> tuple[Path, dict[str, Any], str]:
    """The run folder, what was measured of its first level, and what was said."""
    lines = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = recipe.load("recipe.yaml", [f"name={name}", *SHORT, *overrides])
        found = folder / pipeline.run(loaded, Console(lines), **{"upto": "quantize", **how})
    stages = json.loads((found / "stages.json").read_text(encoding="utf-8"))
    told = next(iter(stages["quantize"]["measured"].values())) if measured else {}
    return found, told, lines.getvalue()


@pytest.mark.parametrize(
    ("overrides", "towards"),
    [
        ([STEPS], "teacher"),
        ([STEPS, "quantize.method=qad", "data.valid=good.jsonl"], "teacher"),
        ([STEPS, "quantize.method=qad", "quantize.rank=2", "quantize.towards=student"], "student"),
        ([STEPS, "teacher=null", "objective={cross_entropy: }", "student={model: student}"], "student"),
        ([STEPS, "teacher={model: teacher, source: cache, top_k: 8}"], "teacher"),
        (
            [STEPS, "teacher={model: teacher, source: cache, top_k: 8}", "objective={cross_entropy: }"],
            "teacher",
        ),
        (
            [STEPS, "teacher={model: stranger}", "objective={cross_tokenizer: }", "student={model: student}"],
            "student",
        ),
        ([STEPS, "teacher={model: student, ema: 0.9}", "student={model: student}"], "student"),
        ([STEPS, "quantize.mixed=[2, 4]", "quantize.dtype=float16", "quantize.rows=4"], "teacher"),
        (["quantize={method: qad, mode: nvfp4, steps: 6}"], "teacher"),
    ],
)
def test_runs(folder: Path, overrides: list[str], towards: str) -> None:
    path, measured, said = run(folder, "runs", *overrides, overwrite=True)
    assert measured["towards"] == towards
    assert f"KL to the {towards}" in said
    where = "data.valid" if "data.valid=good.jsonl" in overrides else "the lessons, which were kept apart"
    assert f"rows of {where}" in said
    assert measured["kept"] == (measured["after_kl"] < measured["before_kl"])
    assert measured["train_tokens"] > 0 and measured["train_seconds"] > 0
    stages = json.loads((path / "stages.json").read_text(encoding="utf-8"))["quantize"]
    assert (path / "models" / stages["models"][0] / "model.safetensors").exists()
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [line for line in steps if line["stage"] == stages["models"][0]]
    assert [line["step"] for line in own] == [1, 2, 3, 4, 5, 6]
    assert all("forward_kl" in line and "cross_entropy" not in line for line in own)


def test_a_cache_that_was_removed_is_filled_again(folder: Path) -> None:
    cached = [STEPS, "teacher={model: teacher, source: cache, top_k: 8}"]
    path, *_ = run(folder, "emptied", *cached, upto="train", measured=False)
    shutil.rmtree(path / "cache")
    _, found, _ = run(folder, "emptied", *cached, resume=True)
    assert found["train_tokens"] > 0


def test_a_sparse_student_stays_sparse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = learned.train, list[Any]()

    def train(student: Any, *rest: Any, masks: Any, **more: Any) -> Any:
        seen.append((dict(tree_flatten(student.trainable_parameters())), masks))
        return plain(student, *rest, masks=masks, **more)

    monkeypatch.setattr(learned, "train", train)
    prune = "student={prune: {sparsity: {share: 0.5, by: magnitude}}}"
    quick = "quantize={method: qad, bits: 4, group_size: 32, steps: 6, learning_rate: 0.1}"
    path, found, _ = run(folder, "sparse", prune, quick)
    made = [models.load(str(path / "models" / name), name).model for name in ("student", "student-4bit")]
    assert found["kept"] is True
    before, after = (sparsity_of(model) for model in made)
    assert after >= before > 0.2
    [(moving, masks)] = seen  # where nothing moves; small moves from zero would be rounded back to it too
    assert len(masks) == 14 and masks.keys() <= moving.keys()
    assert all(float(mask.astype(mx.float32).mean()) == pytest.approx(0.5) for mask in masks.values())


def test_a_foreign_teacher_is_refused_where_it_is_asked_for(folder: Path) -> None:
    with pytest.raises(RecipeError, match="`quantize.towards` teacher: its tokens are others"):
        run(
            folder,
            "foreign",
            STEPS,
            "quantize.towards=teacher",
            "teacher={model: stranger}",
            "objective={cross_tokenizer: }",
            "student={model: student}",
        )


@METHODS
def test_what_is_no_better_is_not_kept(folder: Path, method: str) -> None:
    """Wild learning ends worse than rounding, which then is what is saved, to the bit."""
    wild = [STEPS, f"quantize.method={method}", "quantize.learning_rate=1000.0"]
    path, measured, said = run(folder, f"wild-{method}", *wild)
    assert measured["kept"] is False and measured["after_kl"] >= measured["before_kl"]
    assert "the rounded model is kept (no nearer)" in said
    plain = quantized(models.load(str(path / "models/student"), "student"), level().grid)
    saved: Any = mx.load(str(path / "models/student-3bit/model.safetensors"))
    expected: dict[str, mx.array] = dict(tree_flatten(plain.model.parameters()))
    for name, array in expected.items():
        assert mx.array_equal(saved[name], array), name


def test_training_that_diverges_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: Any, **__: Any) -> None:
        raise learned.Diverged("the gradient is not finite")

    monkeypatch.setattr(learned, "train", diverged)
    _, measured, said = run(folder, "diverged", STEPS)
    assert (measured["kept"], measured["after_kl"]) == (False, None)
    assert "the rounded model is kept (training diverged; lower `quantize.learning_rate`)" in said


class Killed(Exception):
    """As a process that is not there any more."""


def killed(step: int, *how: Any) -> None:
    """A run that ends at a step of its first level."""
    plain = StageLog.metrics

    def metrics(self: StageLog, counters: Any, *rest: Any) -> None:
        if self.stage.startswith("student-") and counters.step == step:
            raise Killed
        plain(self, counters, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLog, "metrics", metrics)
        with pytest.raises(Killed):
            run(*how)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "models/student-3bit").iterdir()}


@METHODS
def test_a_killed_run_goes_on_to_the_same_bits(folder: Path, method: str) -> None:
    options = [STEPS, f"quantize.method={method}", "train.save_every=2", "train.steps=5"]
    whole, expected, _ = run(folder, f"whole-{method}", *options)
    killed(5, folder, f"killed-{method}", *options)
    path = folder / "runs" / f"killed-{method}"
    assert sorted(one.name for one in (path / "checkpoints").glob("student-3bit-*")) == [
        "student-3bit-step-000002",
        "student-3bit-step-000004",
    ]
    path, found, said = run(folder, f"killed-{method}", *options, resume=True)
    assert "student-3bit: going on from step 4" in said
    assert files(path) == files(whole)
    assert found | {"train_seconds": 0} == expected | {"train_seconds": 0}


def test_checkpoints_of_other_options_are_not_gone_on_from(folder: Path) -> None:
    options = [STEPS, "train.save_every=2", "train.steps=5"]
    killed(5, folder, "changed", *options)
    kept = folder / "kept"
    shutil.copytree(folder / "runs" / "changed", kept)
    for change in ("quantize.learning_rate=0.02", "data.valid=good.jsonl", "quantize.method=qad"):
        shutil.rmtree(folder / "runs" / "changed")
        shutil.copytree(kept, folder / "runs" / "changed")
        path, _, said = run(folder, "changed", *options, change, resume=True)
        assert "going on from" not in said
        fresh, *_ = run(folder, "fresh", *options, change, overwrite=True)
        assert files(path) == files(fresh)
