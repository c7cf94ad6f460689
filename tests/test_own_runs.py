"""Whole runs, tiny, in which the student teaches itself, or learns from what it writes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import workshop
from mlx.utils import tree_flatten
from workshop import command

from mlx_distill import learning, pipeline, recipe
from mlx_distill.console import Console

LORA = "student={model: student, method: lora, rank: 4}"
SHORT = ["train.steps=3", "evaluate={tasks: [fidelity], baseline: false}", "export.formats=[]"]
OWN = "generate.on_policy={max_tokens: 6}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


def run(folder: Path, name: str, *overrides: str, **how: Any) -> tuple[Path, dict[str, Any], str]:
    """The run folder, the models of evaluation.json, and what was said."""
    lines = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = recipe.load("recipe.yaml", [f"name={name}", *SHORT, *overrides])
        found = folder / pipeline.run(loaded, Console(lines), **how)
    evaluation = found / "evaluation.json"
    measured = json.loads(evaluation.read_text(encoding="utf-8"))["models"] if evaluation.exists() else {}
    return found, measured, lines.getvalue()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (LORA, "teacher={model: student}"),
        (LORA, "teacher={model: student, ema: 0.9}"),
        ("student={model: student}", "teacher={model: student}"),
        ("student={model: student}", "teacher={model: student, ema: 0.9}"),
    ],
)
def test_a_student_is_measured_against_itself_before_training(
    folder: Path, student: str, teacher: str
) -> None:
    name = f"self-{'lora' in student}-{'ema' in teacher}"
    objective = "objective={forward_kl: {}, cross_entropy: {}}"
    path, models, _ = run(
        folder, name, student, teacher, objective, "data.valid=good.jsonl", "train.eval_every=1"
    )
    assert list(models) == ["teacher", "student_before", "student"]
    assert models["teacher"]["nll"] == pytest.approx(models["student_before"]["nll"], abs=1e-5)
    assert models["student_before"]["kl"] == pytest.approx(0, abs=1e-5)
    assert models["student"]["kl"] > 1e-4
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    drift = [line["valid_kl"] for line in lines if "valid_kl" in line]
    assert len(drift) == 3 and min(drift) > 1e-4


def test_the_teacher_of_a_run_is_the_model_under_the_adapters(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a second copy, though the answers before training were written by one."""
    plain, shared = learning.train, []

    def train(student: Any, teachers: Any, *rest: Any) -> Any:
        ours = {id(array) for _, array in tree_flatten(student.parameters())}
        shared.extend(id(array) in ours for _, array in tree_flatten(teachers[0].model.parameters()))
        return plain(student, teachers, *rest)

    monkeypatch.setattr(learning, "train", train)
    data = "data={prompts: good.jsonl, max_tokens: 128}"
    answers = "generate={max_tokens: 40, temperature: 1.0, samples: 4}"
    nothing = "evaluate={tasks: []}"
    run(folder, "lent", LORA, "teacher={model: student}", data, answers, nothing, upto="train")
    assert len(shared) > 10 and all(shared)


def test_the_student_answers_prompts_before_it_learns(folder: Path) -> None:
    """Self-distillation: it writes, and the answers are learned as text."""
    path, models, _ = run(
        folder,
        "simple",
        LORA,
        "teacher={model: student}",
        "objective={cross_entropy: }",
        "data={prompts: good.jsonl, test: good.jsonl, max_tokens: 128}",
        "generate={max_tokens: 40, temperature: 1.0, samples: 4}",
    )
    kept = [
        json.loads(line)
        for line in (path / "samples" / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any(line["kept"] for line in kept)
    assert models["teacher"]["nll"] == pytest.approx(models["student_before"]["nll"], abs=1e-5)


def test_own_rows_alone_need_no_answers(folder: Path) -> None:
    """Prompts without answers are enough, and the teacher writes none."""
    data = "data={prompts: good.jsonl, test: good.jsonl, max_tokens: 128}"
    path, models, said = run(folder, "own", data, OWN, "objective={reverse_kl: }")
    assert not (path / "samples" / "generated.jsonl").exists()
    assert models["student"]["kl"] < models["student_before"]["kl"]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["own_share"] == 1 and 0 < line["own_length"] <= 6 for line in lines)
    assert "own_length" in said


def test_own_rows_among_those_of_the_data(folder: Path) -> None:
    path, *_ = run(folder, "mixed", OWN, "generate.on_policy.share=0.5", "train.steps=20", upto="train")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shares = [line["own_share"] for line in lines]
    assert 0.2 < sum(shares) / len(shares) < 0.8
    assert all(("cross_entropy" in line) == (line["own_share"] < 1) for line in lines)


def test_the_baseline_never_writes(folder: Path) -> None:
    path, *_ = run(
        folder, "baseline", OWN, "objective={reverse_kl: }", "evaluate.baseline=true", upto="baseline"
    )
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["stage"] for line in lines if "own_share" in line} == {"student"}
    assert "cross_entropy" in next(line for line in lines if line["stage"] == "baseline")


def test_a_new_student_follows_its_own_average(folder: Path) -> None:
    new = "student.tokenizer={pieces: 50, byte_fallback: false}"
    path, models, _ = run(folder, "new", "teacher={model: student, ema: 0.5}", new)
    assert models["student"]["nll"] < models["student_before"]["nll"]
    assert "size_mib" not in models["teacher"]
    assert (path / "models" / "student").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [OWN, "generate.on_policy.schedule=adaptive", "train.eval_every=1"],
            "schedule adaptive follows the loss on `data.valid`, which is missing",
        ),
        (
            [OWN, "objective={reverse_kl: }", "data.train=text.jsonl"],
            "every row of the data is plain `text`, and the student needs questions",
        ),
    ],
)
def test_data_that_do_not_do(
    folder: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.jsonl").write_text(
        json.dumps({"text": "def add(x): return x + 1"}) + "\n", encoding="utf-8"
    )
    before = workshop.contents(folder)
    ended = command(folder, capsys, "run", "recipe.yaml", "name=bad", *overrides)
    assert (ended.code, len(ended.err)) == (2, 1)
    assert message in ended.err[0]
    assert workshop.contents(folder) == before
