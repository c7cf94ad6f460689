"""Which way each form of a test goes, which is read off its text."""

from typing import Any

import pytest

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate.asserts import Asked, Near
from mlx_distill.evaluate.judging import Plan, plan, same


def planned(*tests: str, setup: str | None = None, prompt: str | None = None) -> Plan:
    return plan(Row(prompt=prompt, tests=tests, setup=setup, origin="rows.jsonl:1"))


@pytest.mark.parametrize(
    ("line", "call", "expected"),
    [
        ("assert f(1, [2]) == -3", "f(1, [2])", -3),
        ("  assert f() == {'a': (1, None)}, 'message'\n", "f()", {"a": (1, None)}),
        ("assert f(1) == 2, f(1)", "f(1)", 2),
        ("assert 2 == f(1)", "f(1)", 2),
        ("assert f(1) is True", "f(1)", True),
        ("assert f(1) is None", "f(1)", None),
        ("assert f(1)", "not not (f(1))", True),
        ("assert not f(1)", "not (f(1))", True),
        ("assert f(1) == 3 * 5 + 7 // 2", "f(1)", 18),
        ("assert f(1) == -(2 - 4j)", "f(1)", -2 + 4j),
        ("assert set(f(1)) == set([1, 2])", "set(f(1))", {1, 2}),
        ("assert sorted(f(1)) == sorted((2, 1))", "sorted(f(1))", [1, 2]),
        ("assert round(f(1), 2) == round(1.234, 2)", "round(f(1), 2)", 1.23),
        ("assert f(1) == frozenset((1,))", "f(1)", {1}),
        ("assert f(g(2)) == [4]", "f(g(2))", [4]),
        ("assert f(lambda x: x + 1, 2) == 3", "f(lambda x: x + 1, 2)", 3),
        ("assert f([x for x in range(3)]) == 3", "f([x for x in range(3)])", 3),
        ("assert Solution().f(2) == 4", "Solution().f(2)", 4),
        ("assert f(Node(1)) == 1", "f(Node(1))", 1),
        ("assert f((4, 'a'), int) == [4]", "f((4, 'a'), int)", [4]),
        ("assert sum(10, 15) == 6", "sum(10, 15)", 6),  # MBPP/126 calls its function so
    ],
)
def test_a_call_and_its_value(line: str, call: str, expected: Any) -> None:
    found = planned(line)
    assert found.calls == (call,) and not found.executed and found.weaker is None
    asked = found.tests[0].asked
    assert asked is not None and asked == Asked(call, expected)
    assert type(asked.expected) is type(expected)  # True is not 1


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("assert abs(f(1) - 2.5) < 1e-6", Near(1e-6)),
        ("assert abs(f(1) - 5 / 2) < 0.1", Near(0.1)),
        ("assert math.fabs(f(1) - 2.5) < 0.1", Near(0.1)),
        ("assert math.isclose(f(1), 2.5, rel_tol=0.001)", Near(0.0, 0.001)),
        ("assert math.isclose(f(1), 2.5)", Near(0.0, 1e-9)),
        ("assert math.isclose(f(1), 2.5, rel_tol=0, abs_tol=0.5)", Near(0.5, 0)),
    ],
)
def test_a_call_and_a_number_near_its_value(line: str, near: Near) -> None:
    assert planned(line, setup="import math").tests[0].asked == Asked("f(1)", 2.5, near)


@pytest.mark.parametrize(
    "line",
    [
        "assert f(1) == g(1)",
        "assert f(1) == {[]: 1}",
        "assert f(1) == b'a'",
        "assert f(1) == 'a' * 10**9",  # never made here
        "assert f(1) == 2 ** 10**9",
        "assert f(1) == 1 // 0",
        "assert f(1) == helper(1)",
        "assert helper(f(1)) == 2",
        "assert helper(f(1))",
        "assert f(1) < 2",
        "assert f(1) != 2",
        "assert f(1) is 2",
        "assert 1 < f(1) == 2",
        "assert abs(f(1) - g(1)) < 1e-6",
        "assert abs(f(1) - 2.0) <= 1e-6",
        "assert math.isclose(f(1), 2.0, rel_tol=-1)",
        "assert math.isclose(f(1), g(1))",
        "assert all(f(x) == x for x in range(3))",
        "assert isinstance(f(1), int)",
        "assert bool(f(1)) == True",
        "assert f(1) == 2; assert f(2) == 3",
        "assert f(1) == 2 and f(2) == 3",
        "for x in range(3):\n    assert f(x) == x",
        "x = f(1)\nassert x.upper() == 'A'",
        "try:\n    f(1)\nexcept ValueError:\n    pass",
        "helper(f)",
        "print(f(1))",
    ],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_all_else_is_executed_by_a_referee(line: str) -> None:
    found = planned(line, setup="import math\ndef helper(x):\n    return x\n")
    assert found.executed == (line,) and found.weaker is None
    assert "f" in found.names and not {"helper", "math", "x", "print"} & {*found.names}


@pytest.mark.parametrize(
    ("lines", "setup", "reason"),
    [
        (["s = Stack()\ns.push(1)\nassert s.pop() == 1"], None, "`Stack()` is an object of the program's"),
        (["s = make()\nassert s.size == 1"], None, "`s.size` is of an object of the program's"),
        (["s = make()\nt = s.left\nassert t.size == 1"], None, "is of an object of the program's"),
        (["assert make().size == 1"], None, "`make().size` is of an object of the program's"),
        (["assert f.calls == 1 and f(1)"], None, "`f.calls` is looked up in what the program defines"),
        (["assert f(1) == LIMIT"], None, "`LIMIT` is looked up in what the program defines"),
        (["assert len(f(lambda x: x)) < 2"], None, "`lambda x: x` is a function, which cannot be sent"),
        (["assert f(key=len) < 2"], None, "`len` is a function, which cannot be sent"),
        (["assert f(helper) < 2"], "def helper():\n    pass", "`helper` is a function, which cannot be sent"),
        (
            ["assert f(date(2024, 1, 1)) < 2"],
            "from datetime import date",
            "is an object, which cannot be sent",
        ),
        (["p = Point(1)", "assert f(p) < 2"], "class Point: ...", "`p` is an object, which cannot be sent"),
        (["assert f(root) < 2"], "root = Node(1)", "`Node(1)` is an object of the program's"),
    ],
)
def test_what_cannot_be_sent_is_tested_beside_the_program(
    lines: list[str], setup: str | None, reason: str
) -> None:
    found = planned(*lines, setup=setup)
    assert found.weaker is not None and reason in found.weaker
    assert found.executed == tuple(lines)


def test_inputs_that_setup_makes_leave_a_value_to_ask_for() -> None:
    setup = "root = Node(1)\ndef check(f):\n    return f(root) == 1\n"
    found = planned("assert height(root) == 1", setup=setup)
    assert found.calls == ("height(root)",) and found.inputs and found.weaker is None
    judges = planned("assert check(height)", setup=setup)  # a function of the tests' own is not asked
    assert judges.executed and judges.weaker
    plain = planned("assert height(root) == 1", setup="root = [1]")  # the referee sends it
    assert plain.executed and not plain.inputs and plain.weaker is None


def test_the_function_that_a_prompt_asks_for_is_the_programs() -> None:
    prompt = 'def check(n):\n    """Whether n."""\n'
    assert planned("helper(check)", setup="def check(x): ...\ndef helper(x): ...", prompt=prompt).names == (
        "check",
    )


@pytest.mark.parametrize(
    ("lines", "setup", "reason"),
    [
        (["assert f(1 == 2"], None, "test 'assert f(1 == 2' is not readable as Python"),
        (["# nothing"], None, "test '# nothing' holds no statement"),
        (["assert f(1)"], "def (", "`setup` is not readable as Python"),
        (["assert True"], None, "the tests call no function"),
        (["x = 3", "assert x == 3"], None, "the tests call no function"),
        (["assert f"], None, "the tests call no function"),
        (["assert helper(1) == 1"], "def helper(x): return x", "the tests call no function"),
        (
            ["assert math.isclose(f(1), 2.0)"],
            None,
            "the tests use `math.isclose` and do not import it; put `import math` in `setup`",
        ),
    ],
)
def test_tests_that_judge_nothing_are_refused_with_their_row(
    lines: list[str], setup: str | None, reason: str
) -> None:
    with pytest.raises(DataError, match=r"^rows.jsonl:1: ") as caught:
        planned(*lines, setup=setup)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_complex_number_is_no_bool_either() -> None:
    assert same(2 + 0j, 2) and same(2, 2 + 0j) and not same(True, 1 + 0j) and not same("2", 2 + 0j)
