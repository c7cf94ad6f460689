"""pass@1: the share of answers whose program passes all the tests of its row."""

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate import sandbox
from mlx_distill.progress import Progress, silent

FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def pass_at_1(
    rows: Sequence[Row],
    answers: Sequence[str],
    *,
    seconds: float,
    workers: int = 2,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[tuple[float, str | None]]]:
    """Run each answer against the tests of its row.

    Args:
        answers: one a row, as the model wrote them.
        seconds: wall time of one program with all of its tests.

    Returns:
        `pass@1`, `pass@1_stderr`, `problems` and the `sandbox` that ran them;
        and for each row 1.0 or 0.0 with the reason of a 0.0.

    Raises:
        DataError: no rows, or a row without tests or with one that is not understood.
    """
    if not rows:
        raise DataError("pass@1: no rows with tests to score; give the test split some, or drop the task")
    tests = [tests_of(row) for row in rows]
    programs = []
    for row, answer, parsed in zip(rows, answers, tests, strict=True):
        if not parsed:
            raise DataError(f"{row.origin}: no `tests` to judge by; add `assert CALL == VALUE` lines")
        programs.append(sandbox.Program(program_of(row, answer), tuple(call for call, _ in parsed)))
    different = list(dict.fromkeys(programs))  # of many samples most are the same
    ran = sandbox.run(different, seconds=seconds, workers=workers, progress=progress)
    outcomes = dict(zip(different, ran, strict=True))
    whys = [_why_wrong(outcomes[one], parsed) for one, parsed in zip(programs, tests, strict=True)]
    scores = [0.0 if why else 1.0 for why in whys]
    share = sum(scores) / len(scores)
    metrics = {
        "pass@1": share,
        "pass@1_stderr": math.sqrt(share * (1 - share) / len(scores)),
        "problems": len(scores),
        "sandbox": sandbox.backend(),
    }
    return metrics, list(zip(scores, whys, strict=True))


def program_of(row: Row, answer: str) -> str:
    """The program in an answer: its last fenced Python block, else the prompt and what goes on with it."""
    blocks = [(language.lower(), code) for language, code in FENCED.findall(answer)]
    python = [code for language, code in blocks if language in ("python", "python3", "py")]
    unnamed = [code for language, code in blocks if not language]
    if python or unnamed:
        return (python or unnamed)[-1]
    return answer if row.prompt is None else row.prompt + answer


def parse_test(line: str) -> tuple[str, Any]:
    """A test as the expression to evaluate and the value that it should have.

    Understood are `assert CALL == LITERAL`, `assert CALL is True` (False, None), `assert CALL` and
    `assert not CALL`; the last two ask for the truth of what the call returns.

    Raises:
        ValueError: anything else, with the reason.
    """
    try:
        statements = ast.parse(line.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not readable as Python ({error})") from None
    if len(statements) != 1 or not isinstance(statements[0], ast.Assert):
        raise ValueError("one `assert` statement is expected")
    match statements[0].test:
        case ast.Call() as call:
            return f"not not ({ast.unparse(call)})", True
        case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call):
            return f"not ({ast.unparse(call)})", True
        case ast.Compare(
            left=ast.Call() as call, ops=[ast.Is()], comparators=[ast.Constant(True | False | None as value)]
        ):
            return ast.unparse(call), value
        case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[literal]):
            try:
                value = ast.literal_eval(literal)
            except (ValueError, TypeError, MemoryError, RecursionError):
                raise ValueError(f"`{ast.unparse(literal)[:60]}` is no literal value") from None
            if not _is_plain(value):
                raise ValueError("a number, string, boolean, None, list, tuple, set or dict is expected")
            return ast.unparse(call), value
    raise ValueError("the forms are `assert CALL == LITERAL`, `assert CALL is None`, `assert [not] CALL`")


def same(value: Any, expected: Any) -> bool:
    """Python's `==` on plain values, except that a bool equals no number, at any depth."""
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, int | float):
        return isinstance(value, int | float) and value == expected
    if type(value) is not type(expected):
        return False
    if isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict | set):
        keys = {key: key for key in value}  # to compare the keys themselves: {True: 1} == {1: 1}
        if len(value) != len(expected) or not all(key in keys and same(keys[key], key) for key in expected):
            return False
        return isinstance(expected, set) or all(same(value[key], expected[key]) for key in expected)
    return value == expected


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)


def tests_of(row: Row) -> list[tuple[str, Any]]:
    """The tests of a row, each as `parse_test` has it.

    Raises:
        DataError: one that is not understood.
    """
    return [_test_of(row, line) for line in row.tests]


def _test_of(row: Row, line: str) -> tuple[str, Any]:
    try:
        return parse_test(line)
    except ValueError as error:
        raise DataError(f"{row.origin}: test {line.strip()[:60]!r}: {error}") from None


def _why_wrong(outcome: sandbox.Outcome, tests: list[tuple[str, Any]]) -> str | None:
    """The first test that failed and how, None if all passed."""
    if outcome.values is None:
        return outcome.why or "no value"
    for value, (call, expected) in zip(outcome.values, tests, strict=True):
        if isinstance(value, sandbox.Failed):
            return f"{_short(call)}: {value.why}"
        if not same(value, expected):
            return f"{_short(call)} gave {_short(repr(value))}, not {_short(repr(expected))}"
    return None


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
