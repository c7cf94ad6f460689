"""What is known before a weight is read: rows that fit, one vocabulary, and a fingerprint of what is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workshop
from safetensors.numpy import load_file, save_file
from tiny import tiny_recipe

from mlx_distill import preflight
from mlx_distill.errors import DataError, ModelError, RecipeError
from mlx_distill.preflight import Prepared, prepare

LONG = "x" * 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, and to change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(**sections: Any) -> Prepared:
    defaults = {
        "teacher": {"model": "teacher"},
        "data": {"train": {"source": "good.jsonl"}, "prompts": "good.jsonl", "max_tokens": 64},
    }
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section} if isinstance(section, dict) else section
    return prepare(tiny_recipe(**defaults))


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_all_is_there(folder: Path) -> None:
    found = prepared(data={"valid": "good.jsonl", "test": "good.jsonl"}, evaluate={"tasks": ["fidelity"]})
    assert [len(rows) for rows in (found.train, found.prompts, found.valid, found.test)] == [12] * 4
    assert found.vocabulary == 150
    assert found.teachers["teacher"].folder == Path("teacher")
    (row, tokens, shown), encoded = found.prompts[0], found.train[0]
    assert found.tokenizer.decode(tokens) == row.prompt
    assert encoded.tokens[: encoded.start] == tokens == shown  # it trains on what the teacher is asked
    assert encoded.tokens[-1] == found.tokenizer.eos_token_id


def test_long_rows_are_left_out_and_counted(folder: Path) -> None:
    short, long = {"prompt": "x", "completion": "y"}, {"prompt": LONG, "completion": "y"}
    mixed = write(folder / "mixed.jsonl", short, long, short)
    found = prepared(data={"train": mixed, "prompts": mixed, "test": mixed}, evaluate={"tasks": ["fidelity"]})
    assert [len(rows) for rows in (found.train, found.prompts, found.test, found.test_rows)] == [2] * 4
    assert found.dropped == {"train": 1, "prompts": 1, "valid": 0, "test": 1}
    for key in ("train", "prompts", "valid", "test"):
        with pytest.raises(DataError, match=f"`data.{key}`: every row is longer than `data.max_tokens` 64 "):
            prepared(data={key: write(folder / "long.jsonl", long)}, evaluate={"tasks": []})


def test_evaluation_needs_rows_that_it_can_judge(folder: Path) -> None:
    judged = {"prompt": "def f(x):", "completion": " return x", "tests": ["assert f(1) == 1"]}
    tests = write(folder / "tests.jsonl", judged)
    assert len(prepared(data={"test": tests}, evaluate={"tasks": ["code"]}).test) == 1
    with pytest.raises(DataError, match="'summary' needs rows with `references` in `data.test`"):
        prepared(data={"test": tests}, evaluate={"tasks": ["code", "summary"]})
    with pytest.raises(
        RecipeError, match=r"`evaluate.tasks` \[exact\] measure on `data.test`, which is missing"
    ):
        prepared(evaluate={"tasks": ["speed", "exact"]})


def test_files_are_read_before_corpora_are_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus takes seconds, so a wrong line elsewhere is found first, whatever the order of the keys."""
    asked: list[str] = []
    read = preflight.sources.read
    monkeypatch.setattr(preflight.sources, "read", lambda source, key: asked.append(key) or read(source, key))
    preflight.read_rows(tiny_recipe(data={"test": "good.jsonl", "valid": "good.jsonl"}).data)
    assert asked == ["valid", "test", "train"]


def test_one_vocabulary(folder: Path) -> None:
    own = {"shape": None, "model": "student"}
    assert prepared(student=own).vocabulary == 150
    with pytest.raises(
        ModelError, match=r"differs from the teacher's in \d+ tokens, such as '.*choose a student of"
    ):
        prepared(student={**own, "model": "stranger"})
    # The same tokens under other numbers are no less different.
    path = folder / "student" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ModelError, match="differs from the teacher's in 2 tokens"):
        prepared(student=own)


def test_vocabularies_are_compared_without_tokenizer_files_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check_tokenizer_files", lambda student, teacher: None)
    with pytest.raises(ModelError, match="differs from the teacher's"):
        prepared(student={"shape": None, "model": "stranger"})


def test_a_tokenizer_of_the_students_own_is_trained_on_the_data(folder: Path) -> None:
    student = {"tokenizer": {"pieces": 40, "byte_fallback": False}}
    data = {"prompts": None, "train": "good.jsonl"}
    objective = {"cross_entropy": {}}
    assert prepared(teacher=None, student=student, data=data, objective=objective).vocabulary == 40
    student["tokenizer"]["pieces"] = 4000
    with pytest.raises(DataError, match="`student.tokenizer.pieces`: 4000 cannot be made"):
        prepared(teacher=None, student=student, data=data, objective=objective)


def test_the_fingerprint_knows_what_is_read(folder: Path) -> None:
    def of(**sections: Any) -> str:
        return prepared(**sections).fingerprint

    first = of()
    # Where nothing that the student learns from changes, it stays.
    assert of() == first
    shutil.copy("good.jsonl", "copy.jsonl")
    assert of(data={"valid": "copy.jsonl"}) == first
    rows = Path("good.jsonl").read_text(encoding="utf-8")
    Path("good.jsonl").write_text(rows + "\n", encoding="utf-8")
    assert of() == first

    seen = {first}
    Path("good.jsonl").write_text(rows.replace("x + 3", "x - 3"), encoding="utf-8")
    seen.add(of())
    Path("good.jsonl").write_text(rows, encoding="utf-8")
    weights = load_file("teacher/model.safetensors")
    name = max(weights, key=lambda key: weights[key].size)
    weights[name] = weights[name] + np.float32(0.5)
    save_file(weights, "teacher/model.safetensors")  # another teacher in the same place
    seen.add(of())
    assert len(seen) == 3
