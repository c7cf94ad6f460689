"""The score stage: how difficult each row is, by each measure, whole or not at all."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workshop
from tiny import tiny_recipe
from workshop import command

from mlx_distill import difficulty
from mlx_distill.console import Console
from mlx_distill.data.template import encode
from mlx_distill.difficulty import difficulties, score_rows
from mlx_distill.errors import DataError
from mlx_distill.lessons import lessons
from mlx_distill.preflight import prepare
from mlx_distill.run import Run
from mlx_distill.score import nll_of_rows
from mlx_distill.work import Work


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    rows = [{"prompt": f"def add(x, {i}):", "completion": " return x" + i * f" + {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def work_of(folder: Path, by: str, **sections: Any) -> Work:
    defaults: dict[str, Any] = {
        "teacher": {"model": "teacher"},
        "student": {"model": "student", "shape": None},
        "data": {"train": "rows.jsonl", "max_tokens": 128},
    }
    train = {"curriculum": {"by": by}}
    options = tiny_recipe(train=train, **{**defaults, **sections})
    (folder / "run").mkdir(exist_ok=True)
    return Work(Run(folder / "run", Console(io.StringIO())), options, prepare(options))


def test_length_is_that_of_the_answer(folder: Path) -> None:
    work = work_of(folder, "length")
    assert score_rows(work) == {"by": "length", "rows": 6}
    found = difficulties(work)
    assert found is not None
    assert found.tolist() == [len(row.tokens) - row.start for row in work.prepared.train]
    assert found.tolist() == sorted(found)
    [first, *_] = work.run.read_rows("difficulty")
    assert first == {"difficulty": found[0], "source": "train", "prompt": "def add(x, 0):"}


@pytest.mark.parametrize(("by", "model"), [("teacher_nll", "teacher"), ("student_loss", "student")])
def test_losses_are_those_of_the_model(folder: Path, by: str, model: str) -> None:
    work = work_of(folder, by)
    score_rows(work)
    loaded = {"teacher": work.teacher(), "student": work.new_student()}
    both = {name: nll_of_rows(one.model, work.prepared.train, 150) for name, one in loaded.items()}
    assert difficulties(work) is not None
    assert np.array_equal(difficulties(work), both[model])  # type: ignore[arg-type]
    assert not np.allclose(both["teacher"], both["student"], rtol=1e-3)


def test_a_teacher_with_a_tokenizer_of_its_own_reads_its_own_tokens(folder: Path) -> None:
    work = work_of(folder, "teacher_nll", teacher={"model": "stranger"}, objective={"cross_tokenizer": {}})
    score_rows(work)
    files = work.prepared.teachers["teacher"]
    assert files.foreign
    theirs = [encode(row, files.tokenizer) for row in work.prepared.train_rows]
    assert theirs != work.prepared.train
    expected = nll_of_rows(work.teacher().model, theirs, files.vocabulary)
    assert np.array_equal(difficulties(work), expected)  # type: ignore[arg-type]


def test_the_pass_rate_is_of_the_answers_to_a_prompt(folder: Path) -> None:
    """Answers that were right and dropped for another reason have passed; labels count as the mean."""
    work = work_of(
        folder,
        "pass_rate",
        data={"train": "rows.jsonl", "prompts": {"source": "pocket", "rows": 3}, "max_tokens": 128},
        generate={"samples": 4, "temperature": 1.0, "filters": {"verified": True, "duplicates": 0.9}},
    )
    reasons: list[list[str | None]] = [
        [None, None, "duplicates: a copy of sample 0 of prompt 0", "keep: another was better"],  # all right
        [None, "verified: 2 + 2 is 5", "unfinished within 30 tokens", "empty"],
        ["repetition: 80 % of words", "verified: no program", None, "perplexity: 90 > 50"],
    ]
    lines = [
        {
            "row": i,
            "sample": k,
            "answer": " return 1",
            "tokens": [7],
            "end": 1,
            "reason": why,
            "kept": not why,
        }
        for i, prompt in enumerate(reasons)
        for k, why in enumerate(prompt)
    ]
    work.run.write_rows("generated", lines)
    score_rows(work)
    mean = (0 + 0.75 + 0.5) / 3
    found = difficulties(work)
    assert found is not None
    assert found.tolist() == pytest.approx([mean] * 6 + [0, 0, 0.75, 0.5])
    assert len(found) == len(lessons(work).rows)


def test_without_a_curriculum_nothing_is_measured(folder: Path) -> None:
    work = work_of(folder, "length")
    plain = work.recipe.model_copy(
        update={"train": work.recipe.train.model_copy(update={"curriculum": None})}
    )
    work = Work(work.run, plain, work.prepared)
    assert score_rows(work) == {}
    assert difficulties(work) is None
    assert not (folder / "run" / "samples").exists()


def test_equal_difficulties_are_said(folder: Path) -> None:
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (folder / "rows.jsonl").write_text(2 * f"{rows}\n", encoding="utf-8")
    work, said = work_of(folder, "length"), io.StringIO()
    score_rows(Work(Run(work.run.folder, Console(said)), work.recipe, work.prepared))
    assert "for every row, so their order is left to chance" in said.getvalue()


def test_one_row_has_no_order(folder: Path) -> None:
    with pytest.raises(DataError, match=r"`train\.curriculum` orders rows, and there is one"):
        score_rows(work_of(folder, "length", data={"train": {"source": "rows.jsonl", "rows": 1}}))


def test_a_stop_leaves_no_half_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes, the stage is done again; the file is whole or not there."""
    work = work_of(folder, "teacher_nll")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_distill.files.flush", killed)
    with pytest.raises(KeyboardInterrupt):
        score_rows(work)
    assert not (folder / "run" / "samples" / "difficulty.jsonl").exists()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    score_rows(work)
    assert len(work.run.read_rows("difficulty")) == 6


def test_a_run_keeps_to_its_difficulties_when_it_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["data={train: rows.jsonl, max_tokens: 128}", "evaluate={tasks: []}", "train.log_every=0"]
    changes += ["train.curriculum={by: teacher_nll, pace: sorted}", "train.save_every=2", "train.steps=4"]
    ended = command(folder, capsys, "train", "recipe.yaml", *changes)
    assert ended.code == 0, ended.err
    run = folder / "runs" / "tiny"
    assert list(json.loads((run / "stages.json").read_text(encoding="utf-8"))) == [
        "generate",
        "score",
        "cache",
        "prune",
        "train",
    ]
    before = (run / "samples" / "difficulty.jsonl").read_bytes()
    whole = (run / "models" / "student" / "model.safetensors").read_bytes()
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    del stages["train"]  # as if it had been stopped after step 2
    (run / "stages.json").write_text(json.dumps(stages), encoding="utf-8")
    monkeypatch.setattr(difficulty, "nll_of_rows", None)  # measured once, and never again
    ended = command(folder, capsys, "train", "recipe.yaml", "--resume", *changes)
    assert ended.code == 0, ended.err
    assert (run / "samples" / "difficulty.jsonl").read_bytes() == before
    assert (run / "models" / "student" / "model.safetensors").read_bytes() == whole
    ended = command(folder, capsys, "train", "recipe.yaml", *changes, "train.curriculum=null", "name=plain")
    plain = (folder / "runs" / "plain" / "models" / "student" / "model.safetensors").read_bytes()
    assert plain != whole
