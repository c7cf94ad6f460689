"""What a user calls a model: folders, runs, models of runs, names on the Hub; and what is not there yet."""

import json
from pathlib import Path

import pytest
import workshop

from mlx_distill.errors import DistillError, ModelError, NotFound
from mlx_distill.model_names import find_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model, a finished run and some that are not."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "teacher")
    model(tmp_path / "mine" / "model")
    for name, models in {
        "done": ("student", "student-4bit", "baseline"),
        "begun": (),
        "alone": ("student",),
    }.items():
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "fingerprint").write_text("0123456789abcdef\n", encoding="utf-8")
        (run / "recipe.yaml").write_text(workshop.RECIPE, encoding="utf-8")
        for one in models:
            model(run / "models" / one)
    (tmp_path / "runs" / "done" / "stages.json").write_text(
        json.dumps({"train": {}, "baseline": {}, "quantize": {"models": []}}), encoding="utf-8"
    )
    why = {"train": {}, "baseline": {"why": "`evaluate.baseline` is false"}}
    (tmp_path / "runs" / "alone" / "stages.json").write_text(json.dumps(why), encoding="utf-8")
    alone = workshop.RECIPE.replace("teacher: {model: teacher}", "teacher: {model: student, ema: 0.9}")
    alone = alone.replace("  shape: {", "  tokenizer: {pieces: 300}\n  shape: {")
    (tmp_path / "runs" / "alone" / "recipe.yaml").write_text(alone, encoding="utf-8")
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


def model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")


FOUND = {
    "embedded": "embedded",
    "teacher": "teacher",
    "./teacher": "./teacher",
    "mine/model": "mine/model",
    "done": "runs/done/models/student",
    "runs/done": "runs/done/models/student",
    "runs/done/": "runs/done/models/student",
    "runs/done/models/student": "runs/done/models/student",
    "done/student-4bit": "runs/done/models/student-4bit",
    "runs/done/student-4bit": "runs/done/models/student-4bit",
    "runs/done/models/student-4bit": "runs/done/models/student-4bit",
    "done/models/baseline": "runs/done/models/baseline",
    "done/teacher": "teacher",
    "mlx-community/Qwen3-4B-4bit": "mlx-community/Qwen3-4B-4bit",  # of the Hub
}


@pytest.mark.parametrize("name", FOUND)
def test_a_name_stands_for_a_model(name: str, here: Path) -> None:
    assert find_model(name) == FOUND[name]


def test_names_seen_from_within_a_run_and_from_afar(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(here / "runs" / "done")) == str(here / "runs/done/models/student")
    assert find_model(str(here / "teacher")) == str(here / "teacher")
    monkeypatch.setenv("HOME", str(here))
    assert find_model("~/runs/done/baseline") == str(here / "runs/done/models/baseline")
    monkeypatch.chdir(here / "runs" / "done")
    assert find_model(".") == "models/student"
    assert find_model("student-4bit") == "models/student-4bit"


MISSING = {
    "teachr": (NotFound, "MODEL: no model folder, run or Hub repository (organisation/name) 'teachr'; "
               "did you mean `teacher`?"),
    "embeded": (NotFound, "did you mean `embedded`?"),
    "don": (NotFound, "did you mean `done`?"),
    "zzzzzzzz": (NotFound, "MODEL: no model folder, run or Hub repository (organisation/name) 'zzzzzzzz'"),
    "": (NotFound, "(organisation/name) ''"),
    "a\0b": (NotFound, "no model folder, run or Hub repository"),
    "x" * 5000: (NotFound, "no model folder, run or Hub repository"),
    "begun": (NotFound, "MODEL: runs/begun has no student yet: its stage `train` has not finished; "
              "go on with `mlx-distill run runs/begun/recipe.yaml --resume`"),
    "begun/student-4bit": (NotFound, "has no student-4bit yet: its stage `quantize` has not finished"),
    "begun/student-exit2": (NotFound, "has no student-exit2 yet: its stage `train` has not finished"),
    "begun/pruned": (NotFound, "has no pruned yet: its stage `prune` has not finished"),
    "done/student-8bit": (NotFound, "runs/done has no model 'student-8bit'; there are: "
                          "baseline, student, student-4bit, teacher"),
    "done/studnt": (NotFound, "runs/done has no model 'studnt'; there are: baseline, student,"),
    "begun/studnt": (NotFound, "runs/begun has no model 'studnt'; there are: teacher"),
    "runs/done/models": (NotFound, "runs/done has no model 'models'"),
    "alone/baseline": (NotFound, "runs/alone has no baseline: `evaluate.baseline` is false"),
    "alone/teacher": (ModelError, "the teacher of runs/alone is the student itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_told_in_one_line(name: str, here: Path) -> None:
    error, message = MISSING[name]
    with pytest.raises(error) as caught:
        find_model(name)
    assert isinstance(caught.value, DistillError)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_of_another_kind_is_left_to_the_loader(here: Path) -> None:
    """It says what of a model is missing in it."""
    assert find_model("runs/notes") == "runs/notes"
