"""Several answers to a problem, the temperature they are drawn at, and what may be said of them."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workshop
from tiny import tiny_recipe

from mlx_distill import models
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.evaluate import answering
from mlx_distill.evaluate import model as measuring
from mlx_distill.evaluate.decoding import mean_stderr, pass_at
from mlx_distill.generate import Answer
from mlx_distill.keys import generator
from mlx_distill.models import Loaded
from mlx_distill.options import Evaluate, Sampling
from mlx_distill.preflight import prepare
from mlx_distill.verdict import verdict

DOUBLE = Row(prompt="def solve(x):\n", tests=("assert solve(2) == 4", "assert solve(-3) == -6"), task="code")
RIGHT, WRONG = "    return 2 * x\n", "    return 3 * x\n"


# --- what several answers say ---


def test_pass_at_k_is_the_chance_over_all_choices_of_k() -> None:
    """By its definition: the share of all choices of k of the n answers with one that passes."""
    scores = [[1.0, 0, 0, 0, 0, 0], [0.0] * 6, [1, 1, 0, 0, 1.0, 0], [1.0] * 6]
    for k in (1, 2, 5, 6):
        by_hand = [np.mean([any(choice) for choice in itertools.combinations(one, k)]) for one in scores]
        assert pass_at(k, scores) == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert pass_at(1, scores) == pytest.approx(np.mean(scores))


def published_pass_at_k(n: int, c: int, k: int) -> float:
    """As Chen et al. 2021 (arXiv 2107.03374) print it in figure 3, and openai/human-eval computes it."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def test_pass_at_k_is_the_published_estimator() -> None:
    """On made-up counts; the usual mistakes are off by more than the comparison allows."""
    for n in (1, 5, 10, 200):
        for c in sorted({0, 1, n // 3, n // 2, n - 1, n} - {-1}):
            for k in sorted({1, 2, 5, 10, n} & {*range(1, n + 1)}):
                scores = [[1.0] * c + [0.0] * (n - c)]
                assert pass_at(k, scores) == pytest.approx(published_pass_at_k(n, c, k), abs=1e-12)
    many = [[1.0] * c + [0.0] * (10 - c) for c in (0, 1, 3, 10)]
    mean = np.mean([published_pass_at_k(10, c, 5) for c in (0, 1, 3, 10)])
    assert pass_at(5, many) == pytest.approx(mean, abs=1e-12)
    pooled = published_pass_at_k(40, 14, 5)  # all answers as if to one problem
    replaced = np.mean([1 - (1 - c / 10) ** 5 for c in (0, 1, 3, 10)])  # drawn with replacement
    assert abs(pooled - mean) > 0.1 and abs(replaced - mean) > 0.02


def test_pass_at_k_is_unbiased_and_the_usual_estimate_is_not() -> None:
    """Problems that an answer passes with a chance of 0.2: at least one of five does with 1 - 0.8^5."""
    drawn = generator(0, "pass_at", 0).random((4000, 6)) < 0.2
    true = 1 - 0.8**5
    assert pass_at(5, drawn.astype(float).tolist()) == pytest.approx(true, abs=0.02)
    usual = np.mean([1 - (1 - share) ** 5 for share in drawn.mean(-1)])
    assert usual < true - 0.05


def test_answers_to_one_problem_are_no_problems() -> None:
    """The error of a mean over 50 problems, against how much it varies when the problems are drawn anew."""
    random = generator(0, "stderr", 0)
    errors, means = [], []
    for _ in range(300):
        chances = (random.random(50) < 0.4).astype(float)  # a problem is solved always or never
        scores = (random.random((50, 10)) < chances[:, None]).astype(float).tolist()
        errors.append(mean_stderr(scores))
        means.append(np.mean(scores))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    assert math.sqrt(0.4 * 0.6 / 500) < 0.4 * np.std(means)  # all answers counted as problems
    assert mean_stderr([[1.0], [0.0], [0.0], [0.0]]) == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert mean_stderr([[1.0, 0.0]]) is None  # one problem says nothing of others


# --- one model ---


class Writer:
    """Stands for `generate`: how many of each row's answers are right follows from the temperature."""

    def __init__(self, loaded: Loaded, right: dict[float, list[str]]):
        self.loaded, self.right, self.calls = loaded, right, list[dict[str, Any]]()

    def __call__(
        self, model: Any, prompts: Sequence[Any], stop: Any, *, sampling: Sampling, **how: Any
    ) -> list[Answer]:
        self.calls.append({"prompts": len(prompts), "sampling": sampling, **how})
        texts = itertools.islice(itertools.cycle(self.right[sampling.temperature]), len(prompts))
        return [Answer(self.loaded.tokenizer.encode("\n" + text)[1:], True, 1) for text in texts]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def loaded(made: Path) -> Loaded:
    return models.load(str(made / "student"), "student.model")


def options(**given: Any) -> Evaluate:
    return Evaluate(tasks=["code"], max_tokens=20, **given)


def test_scores_are_means_over_problems_and_answers(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two problems, ten answers each; the first is solved by 1 of 5, the second by 4 of 5."""
    texts = [*[RIGHT, *[WRONG] * 4] * 2, *[WRONG, *[RIGHT] * 4] * 2]
    writer = Writer(loaded, {0.7: texts})
    monkeypatch.setattr(answering, "generate", writer)
    rows = [DOUBLE, Row(prompt="other", task="summary", references=("x",)), DOUBLE]
    found, judged = answering.judge("m", loaded, rows, options(temperature=0.7, samples=10), seed=3)
    assert found["pass@1"] == pytest.approx(0.5)
    assert found["pass@1_stderr"] == pytest.approx(0.3)
    both = [1 - math.comb(8, 5) / math.comb(10, 5), 1 - 0]
    assert found["pass@5"] == pytest.approx(np.mean(both))
    assert found["pass@10"] == 1.0
    assert found["problems"] == 2
    assert [len(one) for one in judged] == [10, 0, 10]
    assert [one.score for one in judged[0]] == [1.0, 0, 0, 0, 0] * 2
    assert judged[0][0].text == RIGHT and "gave" in (judged[0][1].why or "")
    assert (writer.calls[0]["prompts"], writer.calls[0]["seed"]) == (20, 3)


def test_greedy_answers_are_written_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(loaded, {0.0: [RIGHT, WRONG]})
    monkeypatch.setattr(answering, "generate", writer)
    at_zero = options(samples=5, tune=[0.0, 1.0]).model_copy(update={"temperature": 0.0})
    found, judged = answering.judge("m", loaded, [DOUBLE, DOUBLE], at_zero)
    assert writer.calls[0]["prompts"] == 2
    assert found["pass@1"] == found["pass@5"] == 0.5  # as five equal answers give
    assert [len(one) for one in judged] == [1, 1]


def test_each_model_is_tuned_on_other_rows_than_those_of_the_test(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0.5 and 1, equally good, the lower is taken, and the test is answered at it and nothing else."""
    writer = Writer(loaded, {0.2: [WRONG], 0.5: [RIGHT, WRONG], 1.0: [WRONG, RIGHT], 2.0: [WRONG]})
    monkeypatch.setattr(answering, "generate", writer)
    how = options(tune=[2.0, 1.0, 0.5, 0.2], samples=2, top_k=10, top_p=0.8)
    test = measuring.TestSet([DOUBLE] * 3, [], 0)
    found = measuring.measure(
        "m", lambda: loaded, test, how, 100, teacher=lambda: None, folder=None, valid=[DOUBLE] * 5, seed=1
    ).metrics
    assert found["tuned"] == {"0.2": 0.0, "0.5": 0.5, "1": 0.5, "2": 0.0}
    assert found["temperature"] == 0.5
    asked = [(call["prompts"], call["sampling"].temperature) for call in writer.calls]
    assert asked == [(10, 0.2), (10, 0.5), (10, 1.0), (10, 2.0), (6, 0.5)]
    assert all((call["sampling"].top_k, call["sampling"].top_p) == (10, 0.8) for call in writer.calls)
    assert all((call["vocabulary"], call["seed"]) == (100, 1) for call in writer.calls)


def test_a_plain_evaluation_says_nothing_of_temperatures(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "generate", Writer(loaded, {0.0: [RIGHT]}))
    test = measuring.TestSet([DOUBLE], [], 0)
    found = measuring.measure(
        "m", lambda: loaded, test, options(), 100, teacher=lambda: None, folder=None
    ).metrics
    assert not {"temperature", "tuned", "pass@5"} & found.keys()
    assert found["pass@1"] == 1.0


# --- a run ---


def test_a_run_tunes_every_model_alike(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    row = {"prompt": "def solve(x):\n", "completion": RIGHT, "tests": list(DOUBLE.tests)}
    Path("tests.jsonl").write_text(3 * (json.dumps(row) + "\n"), encoding="utf-8")
    ended = workshop.command(
        made,
        capsys,
        "evaluate",
        "recipe.yaml",
        "data.valid=tests.jsonl",
        "data.test=tests.jsonl",
        "evaluate={tasks: [code], tune: [0, 0.5], samples: 5, top_k: 3, max_tokens: 3, baseline: false}",
    )
    assert ended.code == 0, ended.err
    found = json.loads(Path("runs/tiny/evaluation.json").read_text(encoding="utf-8"))["models"]
    assert list(found) == ["teacher", "student_before", "student"]
    for metrics in found.values():
        assert metrics["tuned"].keys() == {"0", "0.5"}
        assert metrics["temperature"] == 0.0  # neither solves anything: the lower of two equals
        assert metrics["pass@5"] == 0.0 and metrics["problems"] == 3
    lines = Path("runs/tiny/samples/evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(answer["scores"] == [0.0] for line in lines for answer in json.loads(line)["answers"].values())


def test_a_self_taught_student_answers_once_before_training(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is the student as it was: its scores count for both, and are not drawn twice."""
    monkeypatch.chdir(made)
    row = {"prompt": "def solve(x):\n", "completion": RIGHT, "tests": list(DOUBLE.tests)}
    Path("tests.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    asked, judge = [], measuring.judge
    monkeypatch.setattr(
        measuring, "judge", lambda name, *a, **how: asked.append(name) or judge(name, *a, **how)
    )
    ended = workshop.command(
        made,
        capsys,
        "evaluate",
        "recipe.yaml",
        "name=self",
        "student={model: student}",
        "teacher.model=student",
        "data.test=tests.jsonl",
        "evaluate={tasks: [fidelity, code], max_tokens: 3, baseline: false}",
    )
    assert ended.code == 0, ended.err
    found = json.loads(Path("runs/self/evaluation.json").read_text(encoding="utf-8"))["models"]
    assert asked == ["teacher", "student"]
    assert found["student_before"]["pass@1"] == found["teacher"]["pass@1"]
    assert found["student_before"]["kl"] == pytest.approx(0, abs=1e-6) and "kl" not in found["teacher"]
    lines = Path("runs/self/samples/evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line)["answers"]) for line in lines] == [["teacher", "student_before", "student"]]


def test_the_verdict_says_how_each_model_was_decoded() -> None:
    found = {
        "teacher": {"pass@1": 0.4, "temperature": 0.7, "tuned": {"0.7": 0.4, "1": 0.3}},
        "student": {"pass@1": 0.5, "temperature": 1.0, "tuned": {"0.7": 0.3, "1": 0.5}},
    }
    said = " ".join(verdict(found))
    assert "best of the temperatures 0.7 and 1 on validation rows: teacher 0.7, student 1" in said
    for metrics in found.values():
        del metrics["tuned"]
    assert "temperature" not in " ".join(verdict(found))


# --- what is refused, before a weight is read ---


@pytest.mark.parametrize(
    ("evaluate", "why"),
    [
        ({"tasks": ["code"], "tune": [0.5], "temperature": 0.7}, "`tune` finds the temperature; leave out"),
        ({"tasks": ["code"], "samples": 4}, "4 `samples` at `temperature` 0 are all the same"),
        ({"tasks": ["code"], "samples": 4, "tune": [0]}, "4 `samples` at `temperature` 0 are all the same"),
        ({"tasks": ["code"], "top_k": 20}, "`temperature` 0 draws nothing"),
        ({"tasks": ["code"], "top_p": 0.8, "tune": [0]}, "`temperature` 0 draws nothing"),
        ({"tasks": ["fidelity"], "tune": [0.5]}, r"`evaluate.tune` is for tasks that score answers"),
        ({"tasks": ["speed"], "temperature": 1.0}, r"`evaluate.temperature` is for tasks .* \[speed\]"),
        ({"tasks": [], "samples": 2, "temperature": 0.5}, "`evaluate.temperature` is for tasks"),
        ({"tasks": ["code"], "tune": [-0.5]}, r"evaluate.tune"),
    ],
)
def test_what_cannot_be_meant_is_refused(evaluate: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        tiny_recipe(evaluate=evaluate)


def test_top_k_needs_no_temperature_beside_tune() -> None:
    loaded = tiny_recipe(evaluate={"tasks": ["code"], "tune": [0.0, 0.5], "top_k": 20, "top_p": 0.8})
    assert loaded.evaluate.temperatures == [0.0, 0.5]


def test_tuning_needs_rows_of_its_own(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    row = {"prompt": "def solve(x):\n", "completion": RIGHT, "tests": list(DOUBLE.tests)}
    Path("tests.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    long = json.dumps({**row, "completion": "x" * 300})
    Path("long.jsonl").write_text(
        json.dumps({"prompt": "short", "completion": "y"}) + "\n" + long + "\n", encoding="utf-8"
    )

    def prepared(valid: str | None, teacher: str = "teacher") -> None:
        data = {"train": "good.jsonl", "test": "tests.jsonl", "valid": valid, "max_tokens": 64}
        prepare(
            tiny_recipe(
                teacher={"model": teacher}, data=data, evaluate={"tasks": ["code"], "tune": [0.5, 1.0]}
            )
        )

    prepared("tests.jsonl")
    with pytest.raises(RecipeError, match=r"`evaluate.tune` chooses .* on `data.valid`, which is missing"):
        prepared(None)
    with pytest.raises(
        DataError, match=r"`evaluate.tasks` \[code\] can score none of the 12 rows of `data.valid`"
    ):
        prepared("good.jsonl", teacher="nobody/nothing")  # before a model is fetched
    with pytest.raises(DataError, match="none of the 1 rows of `data.valid`"):
        prepared("long.jsonl")  # the row with tests is longer than `data.max_tokens`
