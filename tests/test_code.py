"""pass@1: right programs pass, wrong ones fail, and nothing that an answer says can change that."""

import pytest

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate import code, sandbox

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
            "    class A(int):\n        def __eq__(self, other):\n            return True\n    return A()\n",
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


def test_truth_is_asked_of_any_value() -> None:
    row = with_tests("assert f(3)", "assert not f(0)")
    assert score("def f(x):\n    return [object()] * x\n", row)[0] == 1.0
    assert score("def f(x):\n    return x == 0\n", row)[0] == 0.0


def test_rows_without_tests_are_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: no `tests`"):
        score("", with_tests())
    with pytest.raises(DataError, match=r"rows.jsonl:1: test 'assert f\(1' is not readable as Python"):
        code.check_tests(with_tests("assert f(1) == 2", "assert f(1"))
    with pytest.raises(DataError, match="no rows with tests"):
        code.pass_at_1([], [], seconds=1.0)


def test_the_share() -> None:
    answers = ["    return x * 2\n"] * 3 + ["    return 0\n"]
    metrics, scores = code.pass_at_1([DOUBLE] * 4, answers, seconds=2.0)
    assert [one for one, _ in scores] == [1, 1, 1, 0]
    assert metrics.pop("sandbox") == sandbox.backend()
    assert metrics == {"pass@1": 0.75, "problems": 4}


# --- tests that no value answers ---

ORDERED = Row(
    prompt="",
    tests=(
        "assert pick(3) == 3",
        "assert all(isinstance(pick(n), int) for n in range(3))",
        "values = [3, 1]\npick_in_place(values)\nassert values == [1, 3]",
        "with_error(-1)",
    ),
    setup="def with_error(n):\n    try:\n        pick(n)\n    except ValueError as error:\n"
    "        assert 'negative' in str(error)\n    else:\n        raise AssertionError('no error')\n",
    origin="rows.jsonl:2",
)
PICK = """
def pick(n):
    if n < 0:
        raise ValueError("negative")
    return n
def pick_in_place(values):
    values.sort()
"""


def test_any_statement_judges() -> None:
    """Statements, exceptions, changes in place and helpers of the tests' own."""
    assert score(PICK, ORDERED) == (1.0, None)
    wrong = {
        "float(n)": "assert all(isinstance(pick(n), int) for n in range(3)): AssertionError",
        "n or 7": None,
    }
    for value, why in wrong.items():
        found = score(PICK.replace("return n", f"return {value}"), ORDERED)
        assert found == ((1.0, None) if why is None else (0.0, why))
    unsorted = score(PICK.replace("values.sort()", "sorted(values)"), ORDERED)
    assert unsorted[0] == 0.0 and "assert values == [1, 3]" in (unsorted[1] or "")
    calm = score(PICK.replace('raise ValueError("negative")', "return n"), ORDERED)
    assert calm[0] == 0.0 and "no error" in (calm[1] or "")


CHEAT = """
isinstance = all = any = lambda *_: True
class Equal(int):
    def __eq__(self, other): return True
    __ne__ = __lt__ = __eq__
    __hash__ = int.__hash__
    def __sub__(self, other): return self
    def __abs__(self): return self
def f(*_): return Equal()
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert isinstance(f(1), str)",
        "assert all(f(x) == x for x in range(9))",
        "assert f(1) < 2",
        "assert f(f(1)) != 5 and f(2) == 7",
        "assert abs(f(1) - 3.5) < 1e-6",
        "assert f(1) == 3",
    ],
)
def test_what_a_program_overrides_is_not_what_judges_it(test: str) -> None:
    """Within the program's own process, where all of them run by themselves, the cheat passes."""
    assert score(CHEAT, with_tests(test))[0] == 0.0
    within = sandbox.run([sandbox.Within(CHEAT, "", (test,))], seconds=2.0)[0]
    assert within.values == [True]


def test_objects_of_the_program_are_tested_beside_it_and_counted() -> None:
    stack = with_tests("s = Stack()", "s.push(1)", "assert s.pop() == 1 and not s.items")
    right = "class Stack:\n    def __init__(self):\n        self.items = []\n"
    right += "    def push(self, x):\n        self.items.append(x)\n"
    answers = [
        right + f"    def pop(self):\n        return self.items.{how}\n" for how in ("pop()", "copy()")
    ]
    metrics, verdicts = code.pass_at_1([stack, stack, DOUBLE], [*answers, "    return 2 * x\n"], seconds=2.0)
    assert metrics["weaker"] == 1  # one problem, however many answers
    assert verdicts[0] == (1.0, "weakly tested: `Stack()` is an object of the program's")
    assert verdicts[1][0] == 0.0 and "assert s.pop() == 1" in (verdicts[1][1] or "")
    assert verdicts[2] == (1.0, None)
    assert "weaker" not in code.pass_at_1([DOUBLE], [""], seconds=2.0)[0]


def test_inputs_of_classes_of_the_program_leave_the_value_outside() -> None:
    """As in MBPP's `test_setup_code`: the tree is built beside the program, the height compared here."""
    row = Row(
        prompt="",
        tests=("assert height(root) == 2",),
        setup="root = Node(1)\nroot.left = Node(2)",
        origin="rows.jsonl:3",
    )
    program = "class Node:\n    def __init__(self, value):\n        self.left = None\n"
    metrics, verdicts = code.pass_at_1(
        [row, row],
        [program + f"def height(node):\n    return {value}\n" for value in ("1 + bool(node.left)", "1")],
        seconds=2.0,
    )
    assert verdicts == [(1.0, None), (0.0, "height(root) gave 1, not 2")]
    assert "weaker" not in metrics


def test_published_problems_count_true_as_one() -> None:
    strict = with_tests("assert f() == 1", "assert f() == [True][0]")
    loose = Row(prompt="", tests=("assert f() == 1",), loose=True)
    assert score("def f():\n    return True\n", strict)[0] == 0.0
    assert score("def f():\n    return True\n", loose)[0] == 1.0
    assert score("def f():\n    return 2\n", loose) == (0.0, "f() gave 2, not 1")


@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        ("assert abs(f() - 2.5) < 0.1", "2.55", ["2.6", "'2.5'", "None", "float('nan')", "10**400"]),
        ("assert math.isclose(f(), 100, rel_tol=0.01)", "100.9", ["102.0", "[100]", "True"]),
        ("assert math.isclose(f(), 0.0, abs_tol=0.5)", "0.4", ["0.6", "False"]),
    ],
)
def test_nearly_right_numbers(test: str, right: str, wrong: list[str]) -> None:
    row = Row(prompt="", tests=(test,), setup="import math")
    answers = [f"def f():\n    return {value}\n" for value in (right, *wrong)]
    scores = [one for one, _ in code.pass_at_1([row] * len(answers), answers, seconds=2.0)[1]]
    assert scores == [1.0] + [0.0] * len(wrong)


def test_what_stands_behind_the_function_is_cut_unless_all_of_it_counts() -> None:
    answer = "    return x * 2\n\nassert solve(2) == 5\n"
    assert score(answer) == (1.0, None)
    assert code.pass_at_1([DOUBLE], [answer], seconds=2.0, whole=True)[1][0][0] == 0.0
