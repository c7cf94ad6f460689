"""Worked steps between two marks: how an answer is told from them, and what a student learns of the two.

    <think>8
    4
    </think>4

`data.reasoning` names the marks. What it says about learning:

- both: the row as it is, so the student works the steps out before it answers.
- answer: the answer alone, behind the same question.
- two_tasks: two rows (Distilling step-by-step, Hsieh et al. 2023, arXiv 2305.02301, section 3.2). The
  question as it is asks for the answer; with the opening mark in a line before it, for the steps. The loss
  is alpha * mean over the answers' tokens + (1 - alpha) * mean over the steps' tokens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from mlx_distill.asked import answered
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.options import Data, Reasoning

Task = Literal["both", "answer", "steps"]  # what a row teaches
_BLANK_LINES = re.compile(r"(?:[ \t]*\r?\n)+")


def split(text: str, marks: Reasoning) -> tuple[str | None, str]:
    """The worked steps in a text, and the answer behind them.

    The answer is what follows the last closing mark, less blank lines at its start. The steps are all that
    stands before that mark, less the opening mark if they begin with it: a chat template may have written
    that one in the prompt. Everything else stays as it is, white space included.

    Returns:
        steps: None where the text has no mark. answer: "" where the steps do not end: behind an opening
        mark no closing one follows.
    """
    before, close, after = text.rpartition(marks.close)
    if marks.open in after:
        return _without_open(text, marks), ""
    if not close:
        return None, text
    blank = _BLANK_LINES.match(after)
    return _without_open(before, marks), after[blank.end() :] if blank else after


def join(steps: str, answer: str, marks: Reasoning) -> str:
    """Steps between the marks, then the answer: what `split` takes apart."""
    return f"{marks.open}{steps}{marks.close}{answer}"


def as_learned(row: Row, options: Reasoning | None) -> list[tuple[Row, Task]]:
    """The rows that a student learns from in place of one with an answer, and what each teaches.

    A row without steps teaches its answer alone. Rows of plain `text`, and calls of tools without words,
    come back as they are.

    Raises:
        DataError: nothing follows the steps, where the answer is to be learned by itself.
    """
    if options is None:
        return [(row, "both")]
    row = _with_marks(row, options)
    text = row.answer()
    if options.learn == "both" or not text:
        return [(row, "both")]
    steps, answer = split(text, options)
    if not answer.strip():
        raise DataError(
            f"{row.origin}: no answer behind the worked steps; write it behind {options.close!r}, "
            "or set `data.reasoning.learn` to both"
        )
    alone: tuple[Row, Task] = (answered(row, answer), "answer")
    if options.learn == "answer" or not steps or not steps.strip():
        return [alone]
    return [(answered(_asked_for_steps(row, options), steps.strip()), "steps"), alone]


def as_measured(rows: Sequence[Row], options: Reasoning | None) -> list[Row]:
    """Rows to measure a student on: the question is as it is, and the answer as it learns to give it."""
    return [learned for row in rows for learned, task in as_learned(row, options) if task != "steps"]


def weigh(rows: Sequence[Encoded], tasks: Sequence[Task], options: Reasoning | None) -> list[Encoded]:
    """The rows with weights that give all answers' tokens together the share alpha of the loss.

    The steps' tokens share the rest, each side as a mean over its tokens; the weights of all counted tokens
    add up to their number. Taken over the whole training set, so that the gradient of a step stays a sum
    over its rows. Without steps all weights stay 1.
    """
    counted = [len(row.tokens) - row.start for row in rows]
    whole = sum(counted)
    steps = sum(count for count, task in zip(counted, tasks, strict=True) if task == "steps")
    if options is None or not 0 < steps < whole:
        return list(rows)
    of_steps, of_answers = (1 - options.alpha) * whole / steps, options.alpha * whole / (whole - steps)
    return [
        row._replace(weight=of_steps if task == "steps" else of_answers)
        for row, task in zip(rows, tasks, strict=True)
    ]


def check_marks(data: Data, rows: Mapping[str, Sequence[Row]]) -> None:
    """Refuse marks that no labelled row has, where there are labels alone to learn from.

    Args:
        rows: by key of `data`.

    Raises:
        DataError: no worked steps, so that `data.reasoning` would do nothing.
    """
    marks = data.reasoning
    if marks is None or data.prompts is not None:
        return
    for key, found in rows.items():
        if key not in ("valid", "test"):
            for row in found:
                if marks.close in (_with_marks(row, marks).answer() or ""):
                    return
    raise DataError(
        f"`data.reasoning`: no answer of `data.train` holds {marks.close!r}; set `data.reasoning.close`, or "
        "leave `data.reasoning` out"
    )


def _without_open(text: str, marks: Reasoning) -> str:
    begun = text.lstrip()
    return begun.removeprefix(marks.open) if begun.startswith(marks.open) else text


def _with_marks(row: Row, marks: Reasoning) -> Row:
    """The row with steps that a last message holds in a field of their own put in front of its content."""
    last: dict[str, Any] = dict(row.messages[-1]) if row.messages else {}
    steps, content = last.pop("reasoning_content", None), last.get("content")
    if not isinstance(steps, str) or not content or row.messages is None:
        return row
    return replace(row, messages=(*row.messages[:-1], {**last, "content": join(steps, content, marks)}))


def _asked_for_steps(row: Row, marks: Reasoning) -> Row:
    """The question with the opening mark in a line before it."""
    if row.messages is None:
        return replace(row, prompt=f"{marks.open}\n{row.prompt}")
    messages = [*row.messages]
    places = [i for i, message in enumerate(messages) if message["role"] != "assistant"]
    if places:  # without a question, encoding says so
        asked = messages[places[-1]]
        messages[places[-1]] = {**asked, "content": f"{marks.open}\n{asked.get('content') or ''}"}
    return replace(row, messages=tuple(messages))
