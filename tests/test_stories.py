"""Your own local model as the teacher: stories260K, made elsewhere, teaches a third of itself.

The example of docs/own_model.md on a few rows. recipes/README.md has the scores of the whole recipe.
"""

import io
import json
from pathlib import Path

import pytest

from mlx_distill import pipeline, recipe
from mlx_distill.console import Console

QUICK = [
    "data.max_tokens=256",  # short stories are cheap: the teacher's attention grows with the square
    "train.steps=50",
    "train.batch_tokens=1024",
    "train.learning_rate=2e-2",
    "train.warmup=5",
    "evaluate.tasks=[fidelity]",
]


def write_stories(text: str, folder: Path, sizes: dict[str, int], longest: int) -> None:
    """Write `SPLIT.jsonl` files of whole stories, of at most `longest` characters each."""
    folder.mkdir()
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    stories = [story for story in stories if 0 < len(story) <= longest]
    for split, size in sizes.items():
        rows = [json.dumps({"text": story}) + "\n" for story in stories[:size]]
        assert len(rows) == size
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        del stories[:size]


@pytest.fixture(scope="module")
def evaluation(shared: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a short run of recipes/local_model.yaml measured, every stage done."""
    folder = tmp_path_factory.mktemp("stories")
    text = (shared / "data" / "tinystories" / "stories.txt").read_text(encoding="utf-8")
    write_stories(text, folder / "data", {"train": 160, "valid": 8, "test": 16}, longest=600)
    data = [f"data.{key}={folder}/data/{key}.jsonl" for key in ("train", "valid", "test")]
    overrides = [f"teacher.model={shared}/models/stories260K", *data, *QUICK]
    options = recipe.load(repository / "recipes" / "local_model.yaml", overrides)
    run = pipeline.run(options, Console(io.StringIO()), root=folder / "runs")
    assert (run / "report.html").exists()
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["models"]


def test_the_student_has_at_most_a_third_of_the_parameters(evaluation: dict) -> None:
    assert 3 * evaluation["student"]["parameters"] <= evaluation["teacher"]["parameters"] == 260_032


def test_the_kl_to_the_teacher_falls_by_more_than_half(evaluation: dict) -> None:
    before, after = evaluation["student_before"]["kl"], evaluation["student"]["kl"]
    assert after < before / 2


def test_a_baseline_stands_beside_the_student(evaluation: dict) -> None:
    """It learned from as many tokens, and KL and nll of both fall together: here text is the answer."""
    baseline, student = evaluation["baseline"], evaluation["student"]
    assert baseline["train_tokens"] == student["train_tokens"] > 30_000
    assert 0 < baseline["kl"] < evaluation["student_before"]["kl"]


def test_the_teacher_knows_the_stories(evaluation: dict) -> None:
    """1.55 nats a token on stories of any length, says another program; short ones are easier."""
    assert 1.0 < evaluation["teacher"]["nll"] < 1.55
    assert "kl" not in evaluation["teacher"]
