"""pass@1: right programs pass, wrong ones fail, and nothing that an answer says can change that."""

import json
import math
from pathlib import Path

import pytest

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate import code

PROMPT = 'def solve(x):\n    """Double x."""\n'
DOUBLE = Row(prompt=PROMPT, tests=("assert solve(2) == 4", "assert solve(-3) == -6"), origin="rows.jsonl:1")


def score(answer: str, row: Row = DOUBLE, seconds: float = 2.0) -> tuple[float, str | None]:
    return code.pass_at_1([row], [answer], seconds=seconds)[1][0]


def with_tests(*tests: str) -> Row:
    return Row(prompt="", tests=tests, origin="rows.jsonl:1")


@pytest.mark.parametrize(
    "answer",
    [
        "    return x * 2\n",
        "    return 2.0 * x",  # as Python's ==
        "Here it is:\n```python\ndef solve(x):\n    return x + x\n```\nIt doubles.",
        "```\ndef solve(x):\n    return x + x",  # cut short by the token limit
        "```python\nwrong\n```\n```python\ndef solve(x):\n    return x + x\n```\n```text\n4\n```",
    ],
)
def test_a_right_answer_passes(answer: str) -> None:
    assert score(answer) == (1.0, None)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("    return x * 3\n", "solve(2) gave 6, not 4"),
        ("    return x + 2\n", "solve(-3) gave -1, not -6"),  # the first test alone would pass it
        ("    return str(x * 2)\n", "solve(2) gave '4', not 4"),
        ("    return [x * 2]\n", "solve(2) gave [4], not 4"),
        ("    pass\n", "solve(2) gave None, not 4"),
        ("    raise ValueError(x)\n", "solve(2): ValueError: 2"),
        ("    return x *\n", "SyntaxError: invalid syntax (<program>, line 3)"),
        ("", "solve(2) gave None, not 4"),
        ("```python\n```", "solve(2): NameError: name 'solve' is not defined"),
        ("    import sys; sys.exit(0)", "solve(2): SystemExit: 0"),
        ("    import os; os._exit(0)", "solve(2): no value: the program ended by itself with exit code 0"),
        ("    print('PASSED')\n", "solve(2) gave None, not 4"),
        (
            "    return A()\nclass A(int):\n    def __eq__(self, other):\n        return True\n",
            "solve(2): TypeError: returned a A, which is no plain value",
        ),
        ("    while True:\n        pass\n", "solve(2): timed out after 0.3 s"),
    ],
)
def test_a_wrong_answer_fails_and_says_why(answer: str, why: str) -> None:
    assert score(answer, seconds=0.3 if "while" in answer else 2.0) == (0.0, why)


def test_an_error_on_both_sides_is_not_equal() -> None:
    """The sketch's scorer compared what two programs did, and two that raise alike passed for equal."""
    row = Row(prompt=PROMPT, tests=('assert solve("a") == 1',), completion="    return 1 / 0\n")
    assert score("    return 1 / 0\n", row)[0] == 0.0
    assert score("    return None\n", row)[0] == 0.0
    assert score("```python\n1 / 0\n```", row)[0] == 0.0


@pytest.mark.parametrize(
    ("literal", "right", "wrong"),
    [
        ("True", "True", ["1", "1.0", "'True'", "[1]"]),
        ("1", "1.0", ["True", "'1'", "1.1"]),
        ("0", "-0.0", ["False", "None", "''", "[]"]),
        ("[1, 2]", "[1, 2.0]", ["(1, 2)", "[True, 2]", "[1]", "[1, 2, 3]", "{1, 2}"]),
        ("(1, [2])", "(1, [2])", ["[1, [2]]", "(1, (2,))"]),
        ("{'a': (1,)}", "{'a': (1,)}", ["{'a': [1]}", "{'b': (1,)}", "{'a': (1,), 'b': 1}", "{}"]),
        ("{1: True}", "{1: True}", ["{True: True}", "{1: 1}"]),
        ("{1, 2}", "{2, 1}", ["{True, 2}", "[1, 2]", "{1}"]),
        ("0.5", "0.5", ["float('nan')", "0.5000001"]),
    ],
)
def test_values_compare_as_in_python_but_a_bool_is_no_number(
    literal: str, right: str, wrong: list[str]
) -> None:
    rows = [with_tests(f"assert f() == {literal}")] * (1 + len(wrong))
    answers = [f"def f():\n    return {value}\n" for value in (right, *wrong)]
    scores = [one for one, _ in code.pass_at_1(rows, answers, seconds=2.0)[1]]
    assert scores == [1.0] + [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("line", "call", "expected"),
    [
        ("assert f(1, [2]) == -3", "f(1, [2])", -3),
        ("  assert f() == {'a': (1, None)}, 'message'\n", "f()", {"a": (1, None)}),
        ("assert f(1) is True", "f(1)", True),
        ("assert f(1) is None", "f(1)", None),
        ("assert f(1)", "not not (f(1))", True),
        ("assert not f(1)", "not (f(1))", True),
    ],
)
def test_the_forms_of_a_test(line: str, call: str, expected: object) -> None:
    assert code.parse_test(line) == (call, expected)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("assert f(1) == g(1)", "`g(1)` is no literal value"),
        ("assert f(1) == {[]: 1}", "`{[]: 1}` is no literal value"),
        ("assert f(1) == b'a'", "a number, string, boolean"),
        ("assert f(1) < 2", "the forms are"),
        ("assert f(1) is 2", "the forms are"),
        ("assert 2 == f(1)", "the forms are"),
        ("assert True", "the forms are"),
        ("assert 1 < f(1) == 2", "the forms are"),
        ("assert f(1) == 2; assert f(2) == 3", "one `assert` statement"),
        ("print(f(1))", "one `assert` statement"),
        ("", "one `assert` statement"),
        ("assert f(1 == 2", "not readable as Python"),
    ],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_other_tests_are_refused_with_their_row(line: str, reason: str) -> None:
    with pytest.raises(DataError, match=r"^rows.jsonl:1: test ") as caught:
        score("", with_tests("assert f(1) == 2", line))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truth_is_asked_of_any_value() -> None:
    row = with_tests("assert f(3)", "assert not f(0)")
    assert score("def f(x):\n    return [object()] * x\n", row)[0] == 1.0
    assert score("def f(x):\n    return x == 0\n", row)[0] == 0.0


def test_rows_without_tests_are_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: no `tests`"):
        score("", with_tests())
    with pytest.raises(DataError, match="no rows with tests"):
        code.pass_at_1([], [], seconds=1.0)


def test_the_share_and_its_standard_error() -> None:
    answers = ["    return x * 2\n"] * 3 + ["    return 0\n"]
    metrics, scores = code.pass_at_1([DOUBLE] * 4, answers, seconds=2.0)
    assert [one for one, _ in scores] == [1, 1, 1, 0]
    assert metrics.pop("sandbox") in ("unshare", "limits")
    assert metrics == {"pass@1": 0.75, "pass@1_stderr": math.sqrt(0.75 * 0.25 / 4), "problems": 4}


def test_two_hundred_programs_that_people_wrote(shared: Path) -> None:
    """The reference solutions of MBPP pass; with each other's bodies (the negative control) none does."""
    rows, answers = [], []
    for line in (shared / "data" / "mbpp" / "sanitized_mbpp.jsonl").read_text().splitlines():
        problem = json.loads(line)
        row = Row(prompt="", tests=tuple(problem["test_list"]), origin=f"mbpp:{problem['task_id']}")
        try:
            for test in row.tests:
                code.parse_test(test)
        except ValueError:
            continue
        rows.append(row)
        answers.append("\n".join(["```python", *problem["test_imports"], problem["code"], "```"]))
    rows, answers = rows[:200], answers[:200]
    metrics, scores = code.pass_at_1(rows, answers, seconds=5.0)
    assert [(row.origin, why) for row, (one, why) in zip(rows, scores, strict=True) if one == 0.0] == []
    assert metrics["pass@1"] == 1.0
    shifted = code.pass_at_1(rows, answers[1:] + answers[:1], seconds=5.0)[0]
    assert shifted["pass@1"] <= 0.02
