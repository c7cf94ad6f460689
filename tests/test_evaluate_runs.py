"""Evaluations through the command line: every task at once, stopped and gone on, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workshop
from workshop import command, contents

from mlx_distill.evaluate import model as measuring
from mlx_distill.evaluate import stage
from mlx_distill.evaluate.parts import Parts

ROWS = [
    {"prompt": "def one(x):", "completion": " return 1", "tests": ["assert one(0) == 1"]},
    {
        "prompt": "def two(x):",
        "tests": ["assert sorted([two(0), 1]) == [1, 2]"],
    },  # no answer, and no simple test
    {"prompt": "Say", "references": ["return x"], "completion": "return x"},
    {"prompt": "Say", "references": ["x"], "completion": "x", "task": "exact"},
    {"prompt": "def add(x, y): return x", "choices": [" + y", " - y", " * z"], "answer": 0},
    {"prompt": "def sub(x, y): return x", "choices": [" + y", " - y"], "answer": 1},
    *({"prompt": f"def add(x, {i}):", "completion": f" return x + {i}"} for i in range(5)),
]
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
}
ASKED = [
    "data.test=judged.jsonl",
    "evaluate={tasks: [fidelity, code, summary, exact, choice, humaneval, speed], max_tokens: 8, "
    "files: {humaneval: problems.jsonl}, prompt_lengths: [8, 16]}",
]
TIMED = ("_per_second", "_ms", "_gib", "_spread", "_seconds", "_why", "joules", "energy", "power", "thermal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = workshop.make(tmp_path_factory.mktemp("workshop"))
    (root / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (root / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run with every task that needs nothing from elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from mlx_distill import recipe
        from mlx_distill.bundled import find_recipe
        from mlx_distill.console import Console
        from mlx_distill.pipeline import run

        patch.setenv("PYTHONPATH", str(workshop.REPOSITORY))
        return folder / run(recipe.load(find_recipe("recipe.yaml"), ["name=judged", *ASKED]), Console())


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))


def steady(run: Path) -> dict[str, Any]:
    """The evaluation without what is timed."""
    found = read(run)
    for metrics in found["models"].values():
        for name in [name for name in metrics if any(part in name for part in TIMED) or name == "speed"]:
            del metrics[name]
    return found


def test_every_task_leaves_its_metrics(finished: Path) -> None:
    models = read(finished)["models"]
    assert list(models) == ["teacher", "student_before", "baseline", "student"]
    for metrics in models.values():
        wanted = {"nll", "perplexity", "pass@1", "problems", "rougeL", "exact_match", "accuracy", "choices"}
        assert wanted | {"humaneval_pass@1", "humaneval_problems", "unfinished", "empty"} <= metrics.keys()
        assert (metrics["problems"], metrics["humaneval_problems"], metrics["choices"]) == (2, 1, 2)
    assert {"kl", "kl_median", "kl_p95"} <= models["student"].keys()
    assert models["student"]["decode_tokens_per_second"] > 0
    assert [one["prompt_tokens"] for one in models["student"]["speed"]] == [8, 16]
    assert models["baseline"]["decode_tokens_per_second"] is None
    assert "speed" in models["baseline"]["decode_tokens_per_second_why"]


def test_an_evaluation_says_how_it_was_made(finished: Path) -> None:
    tasks = read(finished)["tasks"]
    assert list(tasks) == ["fidelity", "code", "summary", "exact", "choice", "humaneval", "speed"]
    assert {"version", "rows", "digest", "prompt", "seed", "max_tokens", "temperature"} <= tasks[
        "humaneval"
    ].keys()
    assert tasks["code"]["rows"] == 2
    assert tasks["fidelity"]["rows"] == 10  # the row without an answer has nothing to predict
    assert "def double" in tasks["humaneval"]["prompt"]
    assert tasks["speed"]["prompt_lengths"] == [8, 16]


def test_models_are_compared_on_the_same_problems(finished: Path) -> None:
    compared = {(one["model"], one["other"], one["metric"]): one for one in read(finished)["comparisons"]}
    assert compared["student", "teacher", "nll"]["problems"] == 10
    one = compared["student", "baseline", "kl"]
    models = read(finished)["models"]
    assert one["difference"] == pytest.approx(models["student"]["kl"] - models["baseline"]["kl"], abs=1e-6)
    assert one["low"] <= one["difference"] <= one["high"]


def test_answers_and_disagreements_are_kept(finished: Path) -> None:
    rows = [
        json.loads(line)
        for line in (finished / "samples" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(row["set"], row["task"]) for row in rows] == [
        (None, "code"),
        (None, "code"),
        (None, "summary"),
        (None, "exact"),
        (None, "choice"),
        (None, "choice"),
        ("humaneval", "code"),
    ]
    assert rows[4]["reference"] == " + y"
    assert {"teacher", "student", "baseline"} <= rows[6]["answers"].keys()
    lines = (finished / "samples" / "disagreements.jsonl").read_text(encoding="utf-8").splitlines()
    differing = [json.loads(line) for line in lines]
    assert differing and all(row["model"] == "student" for row in differing)
    assert [row["kl"] for row in differing] == sorted((row["kl"] for row in differing), reverse=True)
    assert not (finished / "evaluation").exists()


def test_measured_memory_stands_beside_the_predicted(finished: Path) -> None:
    memory = json.loads((finished / "memory.json").read_text(encoding="utf-8"))
    assert memory["predicted_gib"]["together"] > 0
    assert {"train", "evaluate"} <= memory["measured_gib"].keys()
    if memory["how"] is not None:
        assert memory["measured_gib"]["train"] is not None
    else:
        assert memory["why"]


@pytest.mark.parametrize("after", [2, 11])
def test_a_stopped_evaluation_goes_on(
    folder: Path, finished: Path, after: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped after some parts, it does the others, and ends with the same numbers."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    run = copy / "runs" / "judged"
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    del stages["evaluate"]
    (run / "stages.json").write_text(json.dumps(stages), encoding="utf-8")
    (run / "evaluation.json").unlink()
    done: list[str] = []
    once = Parts.once

    def counted(self: Parts, name: str, work: Any) -> Any:
        def noted() -> Any:
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(name)
            return work()

        return once(self, name, noted)

    monkeypatch.chdir(copy)
    monkeypatch.setenv("PYTHONPATH", str(workshop.REPOSITORY))
    from mlx_distill import recipe
    from mlx_distill.console import Console
    from mlx_distill.pipeline import run as do

    options = recipe.load(Path("recipe.yaml"), ["name=judged", *ASKED])
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "once", counted)
        with pytest.raises(KeyboardInterrupt):
            do(options, Console(), resume=True)
    assert not (run / "evaluation.json").exists()
    first, more = list(done), []

    def watched(self: Parts, name: str, work: Any) -> Any:
        return once(self, name, lambda: (more.append(name), work())[1])

    monkeypatch.setattr(Parts, "once", watched)
    do(options, Console(), resume=True)
    assert more and not set(more) & set(first)
    assert steady(run) == steady(finished)


def test_parts_of_another_evaluation_are_not_taken(tmp_path: Path) -> None:
    Parts(tmp_path, "one").once("student/code", lambda: [1, (2, 3)])
    assert Parts(tmp_path, "one").once("student/code", lambda: 4) == [1, [2, 3]]
    assert Parts(tmp_path, "other").once("student/code", lambda: 4) == 4
    assert Parts().once("student/code", lambda: (5,)) == [5]  # the same kinds of values, kept or not


def test_the_same_seed_gives_the_same_evaluation(folder: Path, finished: Path, capsys: Any) -> None:
    before = steady(finished)
    assert command(folder, capsys, "evaluate", "recipe.yaml", "name=judged", *ASKED).code == 0
    assert steady(finished) == before


def test_a_model_that_writes_nothing_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_distill.data.rows import parse_row
    from mlx_distill.evaluate import answering
    from mlx_distill.generate import Answer
    from mlx_distill.options import Evaluate

    rows = [parse_row(row, f"rows:{i}") for i, row in enumerate(ROWS)]

    class Silent:
        model, tokenizer = None, None

    monkeypatch.setattr(
        answering, "generate", lambda model, prompts, *_, **__: [Answer([], True)] * len(prompts)
    )
    monkeypatch.setattr(answering, "encode_prompt", lambda *_: [1])
    monkeypatch.setattr(answering, "end_of_turn_ids", lambda *_: {0})
    monkeypatch.setattr(answering, "decode_answer", lambda *_: "")
    loaded: Any = Silent()
    metrics, judged = answering.judge("x", loaded, rows, Evaluate(tasks=["code", "summary", "exact"]))
    assert (metrics["pass@1"], metrics["rougeL"], metrics["exact_match"]) == (0, 0, 0)
    assert (metrics["empty"], metrics["unfinished"]) == (1, 0)
    assert all(one.score == 0 for row in judged for one in row)


WRONG = {
    "two times the same task": (["evaluate.tasks=[speed, speed]"], "names speed twice; drop one"),
    "problems that nobody asks for": (
        ["evaluate={tasks: [speed], files: {mbpp: x.jsonl}}"],
        "`evaluate.files.mbpp` says where the problems of mbpp are, and `evaluate.tasks` [speed] do not ask",
    ),
    "no such file": (
        ["evaluate={tasks: [humaneval], files: {humaneval: problem.jsonl}}"],
        "problem.jsonl: no such file or folder; did you mean problems.jsonl?",
    ),
    "a field is missing": (
        ["evaluate={tasks: [humaneval], files: {humaneval: good.jsonl}}"],
        "good.jsonl:1",
    ),
    "limit of nothing": (
        ["evaluate={tasks: [speed], limit: 3}"],
        "`evaluate.limit` 3 is for humaneval, mbpp",
    ),
    "harness without names": (["evaluate={tasks: [harness]}"], "harness needs names of its tasks"),
    "names without harness": (["evaluate={tasks: [speed], harness: [x]}"], "add harness to `evaluate.tasks`"),
    "lengths without speed": (
        ["evaluate={tasks: [fidelity], prompt_lengths: [4]}"],
        "`evaluate.prompt_lengths` are for the task speed",
    ),
    "no lengths": (["evaluate={tasks: [speed], prompt_lengths: []}"], "`evaluate.prompt_lengths` []"),
    "nothing to choose": (["evaluate={tasks: [choice]}"], "needs rows with `choices` and `answer`"),
    "no answers to predict": (
        ["evaluate={tasks: [fidelity]}", "data.test=bare.jsonl"],
        "fidelity needs rows with an answer in `data.test`; it has none",
    ),
    "tests that are no Python": (
        ["evaluate={tasks: [code]}", "data.test=odd.jsonl"],
        "odd.jsonl:1",
    ),
    "samples without answers": (
        ["evaluate={tasks: [fidelity], samples: 4, temperature: 1}"],
        "is for tasks that score answers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_measured_is_refused(folder: Path, capsys: Any, case: str) -> None:
    (folder / "bare.jsonl").write_text(
        '{"prompt": "def f():", "tests": ["assert f() == 1"]}\n', encoding="utf-8"
    )
    (folder / "odd.jsonl").write_text(
        '{"prompt": "def f():", "completion": "x", "tests": ["assert f( == 1"]}\n', encoding="utf-8"
    )
    overrides, said = WRONG[case]
    before = contents(folder)
    ended = command(folder, capsys, "run", "recipe.yaml", "name=wrong", *overrides)
    assert (ended.code, len(ended.err)) == (2, 1)
    assert said in ended.err[0]
    assert contents(folder) == before


def test_a_run_without_test_rows_can_be_measured_on_published_problems(folder: Path, capsys: Any) -> None:
    asked = [
        "data={train: good.jsonl, max_tokens: 128}",
        "evaluate={tasks: [humaneval, speed], baseline: false, max_tokens: 4, prompt_lengths: [8], "
        "files: {humaneval: problems.jsonl}}",
    ]
    assert command(folder, capsys, "run", "recipe.yaml", "name=bare", "train.steps=1", *asked).code == 0
    models = read(folder / "runs" / "bare")["models"]
    assert all(metrics["humaneval_problems"] == 1 for metrics in models.values())
    assert all("pass@1" not in metrics for metrics in models.values())


def test_the_score_of_a_test_set_is_no_others(finished: Path) -> None:
    """A published set leaves the numbers of `data.test` alone."""
    assert measuring.METRIC_OF.keys() == {"code", "summary", "exact", "choice"}
    assert stage.Parts is Parts
    models = read(finished)["models"]
    assert models["teacher"]["problems"] != models["teacher"]["humaneval_problems"]


def test_scores_of_a_teacher_with_other_tokens_are_compared_but_not_its_nats() -> None:
    sums = np.array([[1.0, 1.0]])
    one = measuring.Measured({}, {}, {"nll": sums, "pass@1": sums}, [])
    found = stage.comparable({"teacher": one, "student": one}, foreign=True)
    assert {name: list(scores) for name, scores in found.items()} == {
        "teacher": ["pass@1"],
        "student": ["nll", "pass@1"],
    }
    assert "nll" in stage.comparable({"teacher": one}, foreign=False)["teacher"]
