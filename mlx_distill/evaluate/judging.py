"""How each test of a row is judged: by its value, by a referee, or inside the program's own process.

A test that asks for the value of one call is the strongest: the program's process is sent the call alone,
and what it should return never leaves this one. Any other test is Python that a referee executes, in a
process that the program cannot reach. Only tests on what cannot be sent between two processes, such as
objects of a class that the program defines, are executed beside the program, and said to be weaker.

Which way a test goes is read off its text. Nothing that a program does can move its tests.
"""

import ast
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate.asserts import Asked, asked
from mlx_distill.evaluate.names import (
    BUILTINS,
    bound_names,
    calls,
    read_names,
    root_of,
    unbound_names,
    unimported,
    why_no_referee,
)
from mlx_distill.evaluate.programs import open_function


class Test(NamedTuple):
    """One test, as it is judged."""

    __test__ = False  # for pytest: no test of ours

    text: str
    asked: Asked | None  # None: the text is executed


@dataclass(frozen=True, slots=True)
class Plan:
    """The tests of a row."""

    tests: tuple[Test, ...]
    names: tuple[str, ...]  # of what the tests use and the program defines
    setup: str
    inputs: bool  # calls use what `setup` makes: it is executed behind the program
    weaker: str | None  # why the tests that are executed need the program's own process

    @property
    def calls(self) -> tuple[str, ...]:
        return tuple(test.asked.call for test in self.tests if test.asked is not None)

    @property
    def executed(self) -> tuple[str, ...]:
        return tuple(test.text for test in self.tests if test.asked is None)


def plan(row: Row) -> Plan:
    """How the tests of a row are judged.

    Raises:
        DataError: none, one that is no Python, or none that uses anything a program could define.
    """
    if not row.tests:
        raise DataError(f"{row.origin}: no `tests` to judge by; add `assert CALL == VALUE` lines")
    trees = [_parsed(row, f"test {text.strip()[:60]!r}", text.strip()) for text in row.tests]
    setup = row.setup or ""
    before = _parsed(row, "`setup`", setup)
    made, bound = bound_names([before]), bound_names([before, *trees])
    names = _names(row, trees, unbound_names([before, *trees], bound))
    if (used := unimported([before, *trees], names)) is not None:
        module = used.split(".")[0]
        raise DataError(
            f"{row.origin}: the tests use `{used}` and do not import it; put `import {module}` in `setup`"
        )
    if not names or not any(True for tree in trees for _ in calls(tree)):
        raise DataError(
            f"{row.origin}: the tests call no function of a program; one such as `assert f(1) == 2` is needed"
        )
    found = [asked(tree, bound, bound) for tree in trees]
    executed = [tree for tree, one in zip(trees, found, strict=True) if one is None]
    weaker = (
        why_no_referee([before, *executed], [name for name in names if name not in bound], bound)
        if executed
        else None
    )
    inputs = False
    if weaker is not None:  # a call on what `setup` makes can still be asked for its value
        known = bound - made
        again = [one or asked(tree, bound, known) for one, tree in zip(found, trees, strict=True)]
        inputs, found = again != found, again
        weaker = weaker if None in found else None
    tests = tuple(Test(text.strip(), one) for text, one in zip(row.tests, found, strict=True))
    return Plan(tests, names, setup, inputs, weaker)


def _names(row: Row, trees: Sequence[ast.Module], unbound: Sequence[str]) -> tuple[str, ...]:
    """What the program defines and the tests use: the function that the prompt asks for, and unbound names.

    Where there are none, builtins that are called: of a program that calls its function `sum`.
    """
    asked_for = open_function(row.prompt or "")[1]
    names = [*unbound, *({asked_for} & {*read_names(trees)} - {*unbound})]
    called = {root_of(call) for tree in trees for call in calls(tree)}
    return tuple(names or sorted(called & BUILTINS))


def same(value: Any, expected: Any) -> bool:
    """Python's `==` on plain values, except that a bool equals no number, at any depth."""
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, int | float | complex):
        return isinstance(value, int | float | complex) and value == expected
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


def why_unequal(asked: Asked, value: Any, loose: bool) -> str | None:
    """What is wrong with a call's value, None if nothing is.

    Args:
        loose: compare as Python does, for which True is 1.
    """
    if asked.near is None:
        right, nearly = value == asked.expected if loose else same(value, asked.expected), ""
    else:
        is_number = isinstance(value, int | float) and (loose or not isinstance(value, bool))
        right, nearly = is_number and asked.near.holds(value, asked.expected), "nearly "
    if right:
        return None
    return f"{short(asked.call)} gave {short(repr(value))}, not {nearly}{short(repr(asked.expected))}"


def short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _parsed(row: Row, what: str, text: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of `is 2` and the like
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{row.origin}: {what} is not readable as Python ({error})") from None
    if not tree.body and what != "`setup`":
        raise DataError(f"{row.origin}: {what} holds no statement")
    return tree
