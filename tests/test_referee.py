"""Tests that run apart from the program, and those that have to run within it."""

from pathlib import Path

import pytest
from sandboxed import WAYS, use

from mlx_distill.evaluate import sandbox
from mlx_distill.evaluate.sandbox import Failed, Outcome, Program, Refereed, Within
from mlx_distill.evaluate.sandbox.child.shared import Shared


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    use(request.param, monkeypatch, tmp_path)
    return request.param


SOURCE = """
class Tree:
    pass
class Odd(KeyError):
    pass
def double(x):
    return x * 2
def sort(items):
    items.sort()
    return items
def refuse(x):
    raise ValueError(f"not {x}")
def odd():
    raise Odd("k", 3)
def tree():
    return Tree()
def leave():
    import os
    os._exit(3)
"""
NAMES = ("double", "sort", "refuse", "odd", "tree", "leave")


def refereed(*tests: str, setup: str = "", source: str = SOURCE, seconds: float = 5.0) -> Outcome:
    one = Refereed(source, setup, tests, NAMES)
    outcome, after = sandbox.run([one, Program("", ("40 + 2",))], seconds=seconds, workers=1)
    assert after == Outcome([42], None)
    return outcome


def test_the_referee_executes_tests_and_setup(way: str) -> None:
    setup = "import math\ndef check(f):\n    assert f(1) == 2\n    assert f(2) == 5\n"
    outcome = refereed("assert double(3) == math.sqrt(36)", "check(double)", "assert nothing", setup=setup)
    assert outcome.values == [
        True,
        Failed("assert f(2) == 5: AssertionError"),
        Failed("assert nothing: NameError: name 'nothing' is not defined"),
    ]
    assert outcome.why == "assert f(2) == 5: AssertionError"


def test_arguments_are_as_the_function_left_them() -> None:
    aliased = (
        "inner = [2]\nboth = [inner, inner]\nassert double(both) == [[2]] * 4 and both[0] is both[1] is inner"
    )
    returned = "x = [3, 1]\ny = x\nassert sort(x) is x and y == [1, 3]"
    nested = (
        "x = {'a': [{1}, 2]}\nkept = x['a'][0]\nchange(x, by=3)\nassert kept == {1, 3} and x['b'] == (3,)"
    )
    circle = "x = [1]\nx.append(x)\nassert double(x)[3] is x"
    source = SOURCE + "def change(x, by):\n    x['a'][0].add(by)\n    x['b'] = (by,)\n"
    tests = (aliased, returned, nested, circle)
    one = Refereed(source, "", tests, (*NAMES, "change"))
    assert sandbox.run([one], seconds=5)[0].values == [True] * 4


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "1", "-0.0", "'a\\ud800'", "b'\\xff'", "1j", "range(3, 9, 2)", "int",
        "[1, (2, {3: {4}})]",
        "frozenset({1})", "bytearray(b'a')", "__import__('collections').deque([1])", "float('inf')",
        "__import__('collections').OrderedDict(b=1, a=2)", "__import__('collections').Counter('aab')",
        "__import__('collections').defaultdict(int, a=1)",
    ],
)  # fmt: skip
def test_plain_values_travel_with_their_types(value: str) -> None:
    source = "def same(x):\n    return x\ndef kind(x):\n    return type(x).__name__"
    tests = (
        f"x = {value}\ny = same({value})\nassert type(x) is type(y) and repr(x) == repr(y)",
        f"assert kind({value}) == type({value}).__name__",
    )
    assert sandbox.run([Refereed(source, "", tests, ("same", "kind"))], seconds=5)[0].values == [True, True]


def test_sets_are_in_the_order_of_a_literal_over_there() -> None:
    """Published solutions show it: whether `tuple({12, 13, 14, 15, 16})` is sorted is no choice of ours."""
    source = "def order(items):\n    return tuple(items)"
    for literal in ("{12, 13, 14, 15, 16}", "{1, 2, 3}", "{100, 7, 93, 55, 16, 1000, 64}", "{'b', 'a', 'c'}"):
        test = f"assert order({literal}) == tuple({literal})"
        assert sandbox.run([Refereed(source, "", (test,), ("order",))], seconds=5)[0].values == [True]


def test_the_referee_is_confined_too(way: str, tmp_path: Path) -> None:
    """Tests come from files that somebody else may have written."""
    if way.startswith("limits"):
        pytest.skip("which promises nothing")
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    reading, writing = f"open({str(tmp_path / 'secret')!r})", f"open({str(tmp_path / 'mark')!r}, 'w')"
    values = refereed(reading, writing, "import os\nos.fork()", "open('here', 'w')").values
    assert isinstance(values, list)
    assert all(isinstance(value, Failed) and "Error" in value.why for value in values)
    assert not (tmp_path / "mark").exists()


def test_a_missing_key_of_a_defaultdict_is_made_over_there_too() -> None:
    source = "def count(d, words):\n    for word in words:\n        d[word] += 1"
    test = (
        "import collections\nd = collections.defaultdict(int)\ncount(d, 'aab')\nassert d == {'a': 2, 'b': 1}"
    )
    assert sandbox.run([Refereed(source, "", (test,), ("count",))], seconds=5)[0].values == [True]


def test_errors_arrive_as_the_builtin_that_they_are() -> None:
    outcome = refereed(
        "try:\n    refuse(3)\nexcept ValueError as e:\n    assert str(e) == 'not 3'\nelse:\n    1 / 0",
        "try:\n    odd()\nexcept KeyError as e:\n    assert e.args == ('k', 3)\nelse:\n    1 / 0",
        "refuse(4)",
        "missing = double\ntry:\n    double()\nexcept TypeError:\n    pass\nelse:\n    1 / 0",
    )
    assert outcome.values == [True, True, Failed("refuse(4): ValueError: not 4"), True]


def test_what_is_no_value_fails_a_test_whatever_it_catches() -> None:
    catch = "try:\n    {}\nexcept:\n    pass"
    told = Failed("TypeError: returned a Tree, which is no plain value")
    assert refereed("tree()", catch.format("tree()"), "assert double(1) == 2").values == [told, told, True]
    gone = Failed("no value: the program ended by itself with exit code 3")
    outcome = refereed("assert double(1) == 2", catch.format("leave()"), catch.format("double(1)"))
    assert outcome.values == [True, gone, gone]


def test_an_answer_has_its_bounds() -> None:
    source = "def many(n):\n    return 'x' * n"
    tests = ("assert len(many(7 << 20)) == 7 << 20", "many(9 << 20)", "many(1)")
    told = Failed("returned more than 8 MiB")  # and the rest of a long line is no answer to the next call
    assert sandbox.run([Refereed(source, "", tests, ("many",))], seconds=9)[0].values == [True, told, told]


def test_a_loop_in_the_program_or_the_tests_is_cut(way: str) -> None:
    cut = Failed("timed out after 0.3 s")
    loop = SOURCE + "def sort(x):\n    while True: pass"
    assert refereed("assert double(1) == 2", "sort([])", source=loop, seconds=0.3).values == [True, cut]
    assert refereed("assert double(1) == 2", "while True: pass", seconds=0.3).values == [True, cut]


def test_tests_that_fail_themselves_say_so() -> None:
    broken_setup = Failed("the tests themselves fail: ModuleNotFoundError: No module named 'no_such_module'")
    assert refereed("1", "2", setup="import no_such_module").values == [broken_setup] * 2
    syntax = refereed("assert (").values
    assert isinstance(syntax, list) and syntax[0].why.startswith("the tests themselves fail: SyntaxError")
    unsendable = refereed("double(lambda: 1)").values
    assert unsendable == [
        Failed("the tests themselves fail: TypeError: returned a function, which is no plain value")
    ]
    taken = refereed("double(1)", setup="def double(x):\n    return 0").values
    assert taken == [Failed("the tests themselves fail: `setup` defines double itself")]


def test_a_program_that_does_not_load_fails_all_its_tests() -> None:
    outcome = refereed("1", source="1 / 0")
    assert outcome == Outcome(None, "ZeroDivisionError: division by zero")
    assert refereed("1", source="import os\nos._exit(0)").values is None


def test_the_referee_survives_what_the_program_sends() -> None:
    """Whatever stands on the pipe is no value, and the referee goes on."""
    lines = [
        "1", "[]", "{}", '{"value": 1}', '{"value": 1, "objects": []}', "[" * 50_000,
        '{"value": {"object": 9}, "objects": [["list", []]]}', '{"value": 1, "objects": [["list", [[]]]]}',
        '{"value": {"type": "open"}, "objects": [["list", []]]}',
        '{"value": {"type": "__name__"}, "objects": [["list", []]]}',
        '{"value": 1, "objects": [["set", []]]}', '{"none": 1}', "1" * 9_000, "\\xff",
        '{"raised": 1, "value": null, "objects": [["list", []]]}',
        '{"raised": [["Fault"], "", null], "value": 1, "objects": [["list", []]]}',
    ]  # fmt: skip
    source = (
        "import os, json\ndef send(line):\n    os.write(3, line[0].encode() + b'\\n')\n    os.read(4, 1)\n"
    )
    for line in lines:
        one = Refereed(
            source, "", (f"try: send([{line!r}])\nexcept Exception: raise\nexcept: pass",), ("send",)
        )
        values = sandbox.run([one], seconds=2)[0].values
        assert isinstance(values, list) and isinstance(values[0], Failed), line


def test_a_table_of_shared_objects_keeps_what_is_what() -> None:
    """What goes there and back is equal, of the same shape, and the same objects."""
    inner: list[object] = [1]
    value = {"a": inner, "b": (inner, {2})}
    ours, theirs = Shared(), Shared()
    there = theirs.unpack(ours.pack(value))
    assert there == value and there["a"] is there["b"][0]
    there["a"].append(there)
    del there["b"]
    back = ours.unpack(theirs.pack(there["a"]))
    assert back is inner and inner[1] is value and set(value) == {"a"}
    with pytest.raises(TypeError, match="a object"):
        Shared().pack(object())


# Tests within the program's own process.


def test_tests_within_use_the_programs_own_objects(way: str) -> None:
    tests = ("assert tree().__class__ is Tree", "check(double)", "leave()", "1")
    outcome = sandbox.run(
        [Within(SOURCE, "def check(f):\n    assert f(1) == 3", tests)], seconds=5, workers=1
    )[0]
    ended = Failed("no value: the program ended by itself with exit code 3")
    assert outcome.values == [True, Failed("assert f(1) == 3: AssertionError"), ended, ended]


def test_within_is_weaker() -> None:
    """What `weaker` warns of: there, an object of the program's own may equal what is expected."""
    source = "class A:\n    def __eq__(self, other):\n        return True\ndef f():\n    return A()"
    assert sandbox.run([Within(source, "", ("assert f() == 3",))], seconds=5)[0].values == [True]
    assert sandbox.run([Refereed(source, "", ("assert f() == 3",), ("f",))], seconds=5)[0].values != [True]
