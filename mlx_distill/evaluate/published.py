"""HumanEval and MBPP, from files in their published formats or from the Hub, as rows with tests.

A row has two prompts: `prompt` for a model that goes on with a text, `messages` for one with a chat
template. Both stand here, and docs/tasks.md tells why they are worded so. Whatever changes a prompt or a
verdict changes `VERSION`, for scores of two versions are no scores of one task.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mlx_distill.data import sources
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate.check_function import split_check
from mlx_distill.evaluate.judging import plan
from mlx_distill.evaluate.problems import Problem, read_problems

VERSION = 1  # of our prompts, of what is cut off an answer, and of how tests are judged
HUB = {"humaneval": "openai/openai_humaneval", "mbpp": "google-research-datasets/mbpp"}
MBPP_TEST = range(11, 511)  # its ids; 1 to 10 are examples for prompts, 511 on validation and training
_COMPLETE = (
    "Complete this Python function. Answer with the whole function in one Markdown code block."
    "\n\n```python\n{code}```"
)
_WRITE = (
    "{text}\n\nThe function must pass this test:\n\n```python\n{test}\n```\n\n"
    "Answer with the whole function in one Markdown code block."
)


class Published(NamedTuple):
    """The problems of a published set that are evaluated."""

    name: str  # "humaneval" or "mbpp"
    version: str  # our version of prompts and scoring, which problems, and a digest of them
    rows: list[Row]


class Format(NamedTuple):
    """One way in which a set is published."""

    name: str
    marks: tuple[str, ...]  # any of these keys tells it
    fields: dict[str, type]  # that each problem must have; list: of strings
    row: Callable[[Problem], Row]


def published(task: Literal["humaneval", "mbpp"], source: str | None, limit: int | None) -> Published:
    """The problems of a set as rows, in the order of the file.

    Of MBPP those that are meant for tests, ids 11 to 510, where any are there; else all.

    Args:
        source: a file (.jsonl, .json, .gz of either) or a data set of the Hub; None: the set's own there.
        limit: how many, the first ones; None: all.

    Raises:
        NotFound: no such file or data set.
        DataError: a problem that misses a field or has one of a wrong type, tests that judge nothing, or
            an id that stands twice; with file and line.
        MissingExtra: a data set of the Hub, and no package `datasets`.
    """
    problems = read_problems(source or HUB[task], f"evaluate.files.{task}")
    found = _format(problems[0], FORMATS[task])
    rows, seen = [], dict[str, Problem]()
    for problem in problems:
        _check_fields(problem, found, FORMATS[task])
        number = str(problem.fields["task_id"])
        if number in seen:
            raise DataError(f"{problem.origin}: `task_id` {number} is also that of {seen[number].origin}")
        seen[number] = problem
        rows.append(found.row(problem))
    which = "all ids"
    if task == "mbpp":
        tests = [row for row, number in zip(rows, seen, strict=True) if _number(number) in MBPP_TEST]
        if tests:
            rows, which = tests, f"ids {MBPP_TEST.start}-{MBPP_TEST.stop - 1}"
    rows = rows[:limit]
    for row in rows:
        plan(row)
    digest = sources.digest(rows)[:8]
    version = f"{task} {VERSION}, {found.name}, {which}, {len(rows)} problems, digest {digest}"
    return Published(task, version, rows)


def _format(problem: Problem, formats: tuple[Format, ...]) -> Format:
    found = next((one for one in formats if any(mark in problem.fields for mark in one.marks)), None)
    if found is None:
        keys = ", ".join(f"`{key[:30]}`" for key in list(problem.fields)[:8]) or "none"
        raise DataError(f"{problem.origin}: no format known: its keys are {keys}; {_known(formats)}")
    return found


def _known(formats: tuple[Format, ...]) -> str:
    return "known: " + "; ".join(f"{one.name} with {', '.join(one.fields)}" for one in formats)


def _check_fields(problem: Problem, found: Format, formats: tuple[Format, ...]) -> None:
    for field, kind in found.fields.items():
        if field not in problem.fields:
            raise DataError(f"{problem.origin}: `{field}` is missing, for {found.name}; {_known(formats)}")
        value = problem.fields[field]
        if field == "task_id":
            fits, kinds = isinstance(value, str | int) and not isinstance(value, bool), "a number or a string"
        elif kind is list:
            fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
            kinds = "a list of strings"
        else:
            fits, kinds = isinstance(value, str), "a string"
        if not fits:
            raise DataError(f"{problem.origin}: `{field}` is {kinds}; got {str(value)[:40]!r}")
        if field in ("test", "test_list", "prompt", "text", "entry_point") and not value:
            raise DataError(f"{problem.origin}: `{field}` is empty")

    for field, kind in _MAY_BE_THERE.items():
        value = problem.fields.get(field)
        fits = value is None or isinstance(value, kind)
        if kind is list and isinstance(value, list):
            fits = all(isinstance(one, str) for one in value)
        if not fits:
            kinds = "a list of strings" if kind is list else "a string"
            raise DataError(f"{problem.origin}: `{field}` is {kinds}; got {str(value)[:40]!r}")


def _number(task_id: str) -> int | None:
    """511 of "MBPP/511" and of "511"."""
    digits = task_id.rsplit("/")[-1]
    return int(digits) if digits.isdecimal() else None


def _function(problem: Problem) -> Row:
    """A function to complete, judged by `check(candidate)`: HumanEval, and MBPP in its form."""
    fields = problem.fields
    tests, setup = split_check(fields["prompt"], fields["entry_point"], fields["test"], problem.origin)
    solution = fields.get("canonical_solution")
    code = fields["prompt"] if fields["prompt"].endswith("\n") else fields["prompt"] + "\n"
    return _row(
        problem,
        prompt=fields["prompt"],
        asked=_COMPLETE.format(code=code.lstrip("\n")),
        completion=solution,
        solution=None if solution is None else code + solution,
        tests=tests,
        setup=setup,
    )


def _described(problem: Problem) -> Row:
    """A function to write, of which a sentence and a first test tell: MBPP as Google published it."""
    fields = problem.fields
    text = (fields["text"] if "text" in fields else fields["prompt"]).strip()
    imports = [*(fields.get("test_imports") or []), fields.get("test_setup_code") or ""]
    first = fields["test_list"][0].strip()
    quoted = text.replace('"""', "'''")
    return _row(
        problem,
        prompt=f'"""\n{quoted}\n{first}\n"""\n',
        asked=_WRITE.format(text=text, test=first),
        completion=fields["code"],
        solution=fields["code"],
        tests=tuple(fields["test_list"]),
        setup="\n".join(line for line in imports if line.strip()) or None,
    )


def _row(problem: Problem, *, asked: str, solution: str | None, **fields: Any) -> Row:
    messages: list[dict[str, Any]] = [{"role": "user", "content": asked}]
    if solution is not None:
        messages.append({"role": "assistant", "content": f"```python\n{solution.strip()}\n```"})
    return Row(**fields, messages=tuple(messages), loose=True, task="code", origin=problem.origin)


_MAY_BE_THERE = {"canonical_solution": str, "test_setup_code": str, "test_imports": list}
_CHECKED = {"task_id": str, "prompt": str, "entry_point": str, "test": str}
FORMATS = {
    "humaneval": (Format("HumanEval", ("entry_point", "test", "canonical_solution"), _CHECKED, _function),),
    "mbpp": (
        Format("function format", ("entry_point", "test", "canonical_solution"), _CHECKED, _function),
        Format(
            "sanitized",
            ("test_imports", "source_file", "prompt"),
            {"task_id": int, "prompt": str, "code": str, "test_imports": list, "test_list": list},
            _described,
        ),
        Format(
            "full",
            ("text", "test_setup_code", "challenge_test_list"),
            {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
            _described,
        ),
    ),
}
