"""Worked steps and answers: told apart, learned in three ways, weighed, judged and refused."""

import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill import models, recipe
from mlx_distill.answers import _unusable
from mlx_distill.console import Console
from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.evaluate import answering as evaluation
from mlx_distill.evaluate.answering import judge
from mlx_distill.generate import Answer
from mlx_distill.lessons import labels, lessons
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import Data, Evaluate, NewTokenizer, Reasoning, Shape
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.reasoning import Task, as_learned, as_measured, join, split, weigh
from mlx_distill.run import Run
from mlx_distill.teacher import NoTeacher
from mlx_distill.tokenizer import train_tokenizer
from mlx_distill.train import make_objective, make_step
from mlx_distill.work import Work
from mlx_distill.written import Written

MARKS = Reasoning()
V = 50


# ---- telling them apart


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("<think>2 + 2</think>4", "2 + 2", "4"),
        ("<think>\n2 + 2\n</think>\n\n4\n", "\n2 + 2\n", "4\n"),
        ("2 + 2</think>4", "2 + 2", "4"),  # the template opened the block in the prompt
        ("\n <think>2 + 2</think>4", "2 + 2", "4"),
        ("4", None, "4"),
        ("", None, ""),
        ("<think></think>4", "", "4"),
        ("<think>2 + 2", "2 + 2", ""),  # never closed
        ("so <think>2 + 2", "so <think>2 + 2", ""),
        ("<think>2 + 2</think>", "2 + 2", ""),
        ("<think>a<think>b</think>c</think>4", "a<think>b</think>c", "4"),  # nested
        ("<think>a</think>3, no, <think>b</think>4", "a</think>3, no, <think>b", "4"),  # a second thought
        ("<think>a</think>3, no, <think>b", "a</think>3, no, <think>b", ""),
        ("<think>a</think> \n\r\n    return 4", "a", "    return 4"),  # the indent of code stays
        ("<think>a</think>  4 ", "a", "  4 "),
    ],
)
def test_steps_end_at_the_last_closing_mark(text: str, steps: str | None, answer: str) -> None:
    assert split(text, MARKS) == (steps, answer)


def test_splitting_takes_apart_what_joining_put_together() -> None:
    other = Reasoning(open="[steps]", close="[answer]")
    for marks in (MARKS, other):
        for steps in ("", "a", "\na\nb\n", "  a", "<thin", "# 2 < 3 >"):
            for answer in ("4", " 4", "    return 4\n", "4\n\n", "two words"):
                assert split(join(steps, answer, marks), marks) == (steps, answer)
    assert split("<think>a</think>4", other) == (None, "<think>a</think>4")


# ---- the three ways to learn


def learned(row: Row, learn: Any) -> list[tuple[Row, Task]]:
    return as_learned(row, Reasoning(learn=learn))


WORKED = Row(prompt="2 + 2?\n", completion="<think>\n2 and 2\n</think>\n4", references=("4",), origin="a:1")
CHAT = Row(
    messages=(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>2 and 2</think>4"},
    ),
    origin="b:1",
)


def test_both_is_the_row_as_it_is() -> None:
    for row in (WORKED, CHAT):
        assert learned(row, "both") == as_learned(row, None) == [(row, "both")]
    assert as_learned(WORKED, None)[0][0] is WORKED


def test_the_answer_alone_stands_behind_the_same_question() -> None:
    [(row, task)] = learned(WORKED, "answer")
    assert (row.prompt, row.completion, task) == (WORKED.prompt, "4", "answer")
    assert row.references == WORKED.references and row.origin == WORKED.origin
    [(row, task)] = learned(CHAT, "answer")
    assert row.messages is not None and CHAT.messages is not None
    assert (*row.messages[:2], row.messages[2]["content"]) == (*CHAT.messages[:2], "4")


def test_two_tasks_are_two_rows() -> None:
    (steps, first), (answer, second) = learned(WORKED, "two_tasks")
    assert (first, second) == ("steps", "answer")
    assert (steps.prompt, steps.completion) == ("<think>\n2 + 2?\n", "2 and 2")
    assert [(answer, "answer")] == learned(WORKED, "answer")
    (steps, _), (answer, _) = learned(CHAT, "two_tasks")
    assert steps.messages is not None and answer.messages is not None
    assert [m["content"] for m in steps.messages] == ["Be brief.", "<think>\n2 + 2?", "2 and 2"]
    assert [m["content"] for m in answer.messages] == ["Be brief.", "2 + 2?", "4"]


@pytest.mark.parametrize("row", [WORKED, CHAT], ids=["prompt", "chat"])
def test_two_tasks_lose_nothing(row: Row) -> None:
    """The steps and the answer of both rows, joined, are the text, but for white space at their ends."""
    pair = {task: one.answer() or "" for one, task in learned(row, "two_tasks")}
    whole = split(row.answer() or "", MARKS)
    assert (pair["steps"], pair["answer"]) == ((whole[0] or "").strip(), whole[1])
    # The usual mistake, the answer row alone, has lost the steps.
    assert "2 and 2" not in "".join(one.answer() or "" for one, _ in learned(row, "answer"))


@pytest.mark.parametrize("learn", ["both", "answer", "two_tasks"])
@pytest.mark.parametrize(
    "row",
    [
        Row(prompt="2 + 2?", completion="4"),
        Row(prompt="2 + 2?"),
        Row(text="<think>2</think> is text like any other"),
        Row(messages=({"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]})),
    ],
    ids=["no steps", "no answer", "text", "call"],
)
def test_rows_without_steps_are_learned_whole(row: Row, learn: str) -> None:
    [(same, task)] = learned(row, learn)
    assert same == row and task != "steps"


def test_empty_steps_are_none() -> None:
    """Models that can be told not to think write an empty block."""
    row = Row(prompt="2 + 2?", completion="<think>\n\n</think>\n\n4")
    [(same, task)] = learned(row, "two_tasks")
    assert (same.completion, task) == ("4", "answer")


def test_steps_in_a_field_of_their_own_are_put_between_the_marks() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    row = Row(messages=({"role": "user", "content": "2 + 2?"}, message))
    [(both, _)] = learned(row, "both")
    assert both.messages == (
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>2 and 2</think>4"},
    )
    assert [task for _, task in learned(row, "two_tasks")] == ["steps", "answer"]
    assert as_learned(row, None) == [(row, "both")]
    assert message["reasoning_content"] == "2 and 2"  # the data itself is left alone


def test_steps_without_an_answer_are_refused_where_the_answer_is_learned() -> None:
    row = Row(prompt="2 + 2?", completion="<think>2 and 2", origin="data/train.jsonl:7")
    for learn in ("answer", "two_tasks"):
        with pytest.raises(DataError, match=r"^data/train\.jsonl:7: no answer behind the worked steps"):
            learned(row, learn)
    assert learned(row, "both") == [(row, "both")]


def test_what_is_measured_is_asked_as_it_stands() -> None:
    for learn in ("answer", "two_tasks"):
        [row] = as_measured([WORKED], Reasoning(learn=learn))
        assert (row.prompt, row.completion) == (WORKED.prompt, "4")
    assert as_measured([WORKED], MARKS) == as_measured([WORKED], None) == [WORKED]


# ---- the loss of two tasks


STEPS, ANSWERS = rows_of([9, 14], seed=1), rows_of([2, 3, 1], seed=2)
TASKS: list[Task] = ["steps", "answer", "answer", "steps", "answer"]
ROWS = [STEPS[0], ANSWERS[0], ANSWERS[1], STEPS[1], ANSWERS[2]]


def gradient_of(rows: list[Encoded]) -> dict[str, mx.array]:
    """The gradient of a step over these rows, as the loop computes it."""
    options = tiny_recipe(
        teacher=None,
        student={"tokenizer": {"pieces": 64}},
        objective={"cross_entropy": {}},
        train={"compile": False},
    )
    student = tiny_model(V).model
    step = make_step(make_objective(student, [], options, V), make_optimizer(options.train), options)
    batch = make_batch(rows)
    sums, _ = step.gradients(batch, [NoTeacher().targets(batch)], {})
    flat: Any = tree_flatten(sums)
    return {name: value / batch.weights.sum() for name, value in flat}


@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.1])
def test_two_tasks_have_the_gradient_of_the_weighted_means(alpha: float) -> None:
    """alpha * mean over the answers' tokens + (1 - alpha) * mean over the steps' tokens (section 3.2)."""
    answers, steps = gradient_of(ANSWERS), gradient_of(STEPS)
    expected = {name: alpha * answers[name] + (1 - alpha) * steps[name] for name in answers}
    options = Reasoning(learn="two_tasks", alpha=alpha)
    weighed = weigh(ROWS, TASKS, options)
    assert largest_gap(gradient_of(weighed), expected) < 1e-5
    # Rows of equal weight must not pass: 23 tokens of steps drown 6 of answers.
    assert largest_gap(gradient_of(ROWS), expected) > 1e-2


def test_weights_of_all_counted_tokens_add_up_to_their_number() -> None:
    weighed = weigh(ROWS, TASKS, Reasoning(learn="two_tasks", alpha=0.8))
    counted = [len(row.tokens) - row.start for row in weighed]
    of_rows = [row.weight * count for row, count in zip(weighed, counted, strict=True)]
    assert sum(of_rows) == pytest.approx(sum(counted))
    of_answers = [one for one, task in zip(of_rows, TASKS, strict=True) if task == "answer"]
    assert sum(of_answers) == pytest.approx(0.8 * sum(counted))


def test_without_steps_all_weights_stay_one() -> None:
    two = Reasoning(learn="two_tasks", alpha=0.8)
    answers: list[Task] = ["answer"] * 3
    assert weigh(ANSWERS, answers, two) == ANSWERS
    both: list[Task] = ["both"] * 3
    assert weigh(ANSWERS, both, MARKS) == weigh(ANSWERS, both, None) == ANSWERS


# ---- through a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and rows of which every third has no steps."""
    root = tmp_path_factory.mktemp("reasoning")
    rows = [
        {
            "prompt": f"{i} + 1?\n",
            "completion": f"<think>{i} and 1</think>{i + 1}" if i % 3 else f"{i + 1}",
            "references": [f"{i + 1}"],
            "task": "exact",
        }
        for i in range(12)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [row["prompt"] + row["completion"] for row in rows]
    tokenizer = train_tokenizer(texts, NewTokenizer(pieces=40, byte_fallback=False))
    shape = Shape(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    models.save(root / "teacher", models.build(shape, tokenizer, 1))
    return root


def work_of(folder: Path, tmp_path: Path, reasoning: dict[str, Any] | None, **data: Any) -> Work:
    rows = str(folder / "rows.jsonl")
    sections: dict[str, Any] = {
        "data": {"train": rows, "valid": rows, "test": rows, "reasoning": reasoning, **data},
        "teacher": {"model": str(folder / "teacher")},
        "objective": {"cross_entropy": {}},
    }
    options = tiny_recipe(**sections)
    return Work(Run(tmp_path, Console(io.StringIO())), options, prepare(options))


def texts(prepared: Prepared, rows: list[Encoded]) -> list[str]:
    return [prepared.tokenizer.decode(row.tokens[row.start : -1]) for row in rows]


def test_labels_are_learned_as_the_recipe_says(folder: Path, tmp_path: Path) -> None:
    plain = work_of(folder, tmp_path, None)
    both, answer, two = (
        work_of(folder, tmp_path, {"learn": learn}) for learn in ("both", "answer", "two_tasks")
    )
    assert labels(both).encoded == labels(plain).encoded
    assert texts(answer.prepared, labels(answer).encoded) == [str(i + 1) for i in range(12)]
    assert len(labels(two).encoded) == 12 + 8
    assert texts(two.prepared, labels(two).encoded)[:3] == ["1", "1 and 1", "2"]
    weights = {row.weight for row in labels(two).encoded}
    assert len(weights) == 2 and {row.weight for row in labels(answer).encoded} == {1.0}
    for work in (answer, two):
        assert texts(work.prepared, work.prepared.test) == [str(i + 1) for i in range(12)]
        assert texts(work.prepared, work.prepared.valid) == [str(i + 1) for i in range(12)]
    assert len({work.prepared.fingerprint for work in (plain, both, answer, two)}) == 4


def test_answers_of_a_teacher_are_learned_as_the_recipe_says(folder: Path, tmp_path: Path) -> None:
    """In `both` the very tokens that were written, which another way to spell the text shows."""

    def found(learn: str) -> tuple[Work, Any]:
        work = work_of(folder, tmp_path, {"learn": learn}, prompts=str(folder / "rows.jsonl"))
        text = "<think>1 and 1</think>2"
        ids = [work.prepared.tokenizer.encode(one, add_special_tokens=False) for one in text]
        tokens = [token for letter in ids for token in letter]
        line = {"row": 1, "sample": 0, "answer": text, "tokens": tokens, "end": 1, "kept": True}
        work.run.write_rows("generated", [line])
        return work, tokens

    both, tokens = found("both")
    learned = lessons(both)
    assert learned.encoded[-1].tokens[-len(tokens) - 1 :] == [*tokens, 1]
    assert learned.prompts == [None] * 12 + [1]
    answer, _ = found("answer")
    assert texts(answer.prepared, lessons(answer).encoded[12:]) == ["2"]
    two, _ = found("two_tasks")
    learned = lessons(two)
    assert texts(two.prepared, learned.encoded[20:]) == ["1 and 1", "2"]
    assert learned.prompts[20:] == [1, 1]
    weighed = [row.weight * (len(row.tokens) - row.start) for row in learned.encoded]
    asked = [two.prepared.tokenizer.decode(row.tokens[: row.start]) for row in learned.encoded]
    share = sum(weight for weight, text in zip(weighed, asked, strict=True) if "<think>" not in text)
    assert share / sum(weighed) == pytest.approx(0.5)  # over labels and answers together


def test_only_what_follows_the_marks_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(
        ["<think>2 and 2</think>4 is 5"] * 9, NewTokenizer(pieces=28, byte_fallback=False)
    )
    said = ["<think>2 and 2</think>4", "4", "<think>4", "<think>4</think>5"]
    rows = [Row(prompt="2 and 2", references=("4",), task="exact") for _ in said]
    written = [Answer(tokenizer.encode(one), True) for one in said]
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: written)
    loaded = tiny_model(32)._replace(tokenizer=tokenizer)
    options = Evaluate(tasks=["exact"])
    metrics, judged = judge("student", loaded, rows, options, reasoning=MARKS)
    assert [one.score for [one] in judged] == [1, 1, 0, 0]
    assert [one.text for [one] in judged] == said  # the report shows all of it
    assert (metrics["exact_match"], metrics["questions"]) == (0.5, 4)
    assert metrics["exact_match_stderr"] == pytest.approx(0.5 / 3**0.5)
    # Without the marks only the bare answer is right.
    assert judge("student", loaded, rows, options)[0]["exact_match"] == 0.25


def test_answers_that_cannot_be_learned_are_dropped(folder: Path, tmp_path: Path) -> None:
    prompts = {"prompts": str(folder / "rows.jsonl")}

    def reason(text: str, learn: str, max_tokens: int = 1024) -> str | None:
        work = work_of(folder, tmp_path, {"learn": learn}, **prompts, max_tokens=max_tokens)
        tokens = work.prepared.tokenizer.encode(text, add_special_tokens=False)
        written = Written(0, 0, work.prepared.prompts[0].row, text, tokens, True, end=1)
        return _unusable(work, written)

    for learn in ("both", "answer", "two_tasks"):
        assert reason("<think>1 and 1</think>2", learn) is None
        for text in ("<think>1 and 1", "<think>1 and 1</think>\n"):
            assert reason(text, learn) == "no answer behind the worked steps"
    # The length that counts is that of the rows to learn: all of it, or the answer alone.
    long = f"<think>{'1 and ' * 40}</think>2"
    assert reason(long, "both", 60) == reason(long, "two_tasks", 60) == "longer than data.max_tokens 60"
    assert reason(long, "answer", 60) is None


# ---- mistakes


@pytest.mark.parametrize(
    ("reasoning", "said"),
    [
        ({"open": " "}, "`open` and `close` are marks that can be seen"),
        ({"open": "--", "close": "---"}, "one mark holds the other: '--' and '---'"),
        ({"open": "#", "close": "#"}, "one mark holds the other: '#' and '#'"),
        ({"alpha": 0.3}, "`alpha` weighs steps against answers; it needs `learn` two_tasks"),
        ({"alpha": 1.0, "learn": "two_tasks"}, "`data.reasoning.alpha`: less than 1; got 1.0"),
        ({"learn": "steps"}, "`data.reasoning.learn`: one of both, answer, two_tasks; got 'steps'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(reasoning: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(data={"train": "rows.jsonl", "reasoning": reasoning})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_has_no_targets_for_the_steps_as_a_task_of_their_own() -> None:
    data = {"train": "rows.jsonl", "reasoning": {"learn": "two_tasks"}}
    with pytest.raises(RecipeError, match=r"`data\.reasoning\.learn` two_tasks .* `objective\.forward_kl`"):
        tiny_recipe(data=data, objective={"forward_kl": {}})
    tiny_recipe(data=data, objective={"cross_entropy": {}})
    tiny_recipe(data={**data, "reasoning": {"learn": "answer"}}, objective={"forward_kl": {}})


def test_own_rows_alone_cannot_be_taken_apart() -> None:
    with pytest.raises(RecipeError, match=r"`data\.reasoning\.learn` answer takes apart rows of the data"):
        tiny_recipe(
            data={"train": "rows.jsonl", "reasoning": {"learn": "answer"}},
            objective={"forward_kl": {}},
            generate={"on_policy": {}},
        )


def test_marks_that_no_label_has_are_refused(folder: Path, tmp_path: Path) -> None:
    other = {"open": "[[", "close": "]]"}
    with pytest.raises(DataError, match=r"^`data\.reasoning`: no answer of `data\.train` holds '\]\]'; set"):
        work_of(folder, tmp_path, other)
    work_of(folder, tmp_path, other, prompts=str(folder / "rows.jsonl"))  # the teacher may write them


def test_options_survive_being_written_out() -> None:
    loaded = tiny_recipe(
        data={"train": "rows.jsonl", "reasoning": {"learn": "answer", "open": "[", "close": "]"}}
    )
    again = recipe.decode(recipe.yaml.safe_load(recipe.dump(loaded)))
    assert again == loaded and isinstance(again.data, Data)
