"""In the process of the referee: execute the tests, and ask the program over a pipe what it returns."""

import builtins
import json
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from .confine import Guards
from .shared import Shared
from .talk import Lines, describe, write_line

MESSAGE = 8 << 20  # bytes of the values of one call
_VERDICTS, _ANSWERS, _REQUESTS = 3, 4, 5
_ENDED = "the program has ended"


class Fault(BaseException):
    """There is no value to judge. A test that catches it has failed all the same."""


def judge(guards: Guards, work: dict[str, Any]) -> None:
    """Send a line for the loading of the program, then one a test."""
    guards.put_on(work["seconds"], referee=True)
    program = Asked()
    loaded = program.loaded()
    write_line(_VERDICTS, loaded)
    if loaded[0] != "value":
        return
    names = {name: program.function(name) for name in work["names"]}
    for verdict in run_tests(work["setup"], work["tests"], names, program):
        write_line(_VERDICTS, ["value", True] if verdict is True else [program.kind, verdict])


class Asked:
    """The program, as seen through its pipe."""

    def __init__(self) -> None:
        self.lines = Lines(_ANSWERS, MESSAGE)
        self.fault: str | None = None  # why the test that runs has failed, whatever it makes of it
        self.silent: str | None = None  # why it answers no more

    @property
    def kind(self) -> str:
        return "gone" if self.fault == _ENDED else "error"

    def loaded(self) -> list[Any]:
        try:
            line = self.lines.next()
            kind, words = json.loads(line) if line is not None else ("gone", _ENDED)
        except (ValueError, TypeError, RecursionError, OverflowError):
            return ["error", "what came back is not readable"]
        return ["value", True] if kind == "value" else [str(kind), str(words)]

    def function(self, name: str) -> Callable[..., Any]:
        def proxy(*positional: Any, **named: Any) -> Any:
            return self.call(name, positional, named)

        proxy.__name__ = proxy.__qualname__ = name
        return proxy

    def call(self, name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the program's function returns; its arguments are then as it left them.

        Raises:
            Exception: the built-in one that the function raised.
            Fault: it did not return a plain value, or does not answer any more.
        """
        shared = Shared()
        try:
            asked = shared.pack((positional, tuple(named.items())))
        except (TypeError, RecursionError) as error:
            raise self.failed(f"the tests themselves fail: {describe(error)}") from None
        if self.silent is not None:
            raise self.failed(self.silent)
        try:
            write_line(_REQUESTS, {"name": name, **asked})
            line, why = self.lines.next(), _ENDED
        except OverflowError:  # the rest of that line is no answer to the next call
            line, why = None, f"returned more than {MESSAGE >> 20} MiB"
        except OSError:
            line, why = None, _ENDED
        if line is None:
            self.silent = why
            raise self.failed(why)
        return self.answer(line, shared)

    def answer(self, line: bytes, shared: Shared) -> Any:
        try:
            answer = json.loads(line)
            if "none" in answer:
                raise self.failed(str(answer["none"])[:300])
            value = shared.unpack(answer)
            error = as_raised(*answer["raised"]) if "raised" in answer else None
        except Exception:
            raise self.failed("no value: what came back is not readable") from None
        if error is not None:
            raise error
        return value

    def failed(self, why: str) -> Fault:
        self.fault = why
        return Fault(why)


def as_raised(kinds: list[str], words: str, arguments: list[Any] | None) -> BaseException:
    """The built-in exception that a program's exception is, or stands nearest to."""
    for name in kinds:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            try:
                return kind(*(arguments if arguments is not None else [words]))
            except TypeError:  # such as UnicodeError's, which have five arguments of their own
                continue
    return Exception(words)


def run_tests(
    setup: str, tests: list[str], names: dict[str, Any], program: Asked | None = None
) -> Iterator[Any]:
    """Execute `setup`, then each test; for each of those True, or why it failed."""
    own = dict(names)
    module = types.ModuleType("tests")
    namespace = vars(module)
    namespace.update(names)
    why = _executed(setup, "<setup>", namespace, {}, program)
    taken = [name for name in own if namespace.get(name) is not own[name]] if program is not None else []
    if why is None and taken:
        why = f"`setup` defines {taken[0]} itself"
    for number, test in enumerate(tests):
        if why is not None:
            yield why if program is not None and program.fault else f"the tests themselves fail: {why}"
            continue
        place = f"<test {number}>"
        found = _executed(test, place, namespace, {place: test, "<setup>": setup}, program)
        yield True if found is None else found


def _executed(
    text: str, place: str, namespace: dict[str, Any], texts: dict[str, str], program: Asked | None
) -> str | None:
    """None if it ran to its end, else why not."""
    if program is not None:
        program.fault = None
    try:
        exec(compile(text, place, "exec", dont_inherit=True), namespace)
    except BaseException as error:
        why = _line_of(error, texts) + describe(error)
        if isinstance(error, SyntaxError):
            why = f"the tests themselves fail: {why}"
    else:
        why = None
    return (program.fault if program is not None else None) or why


def _line_of(error: BaseException, texts: dict[str, str]) -> str:
    """The line of the tests that raised it, for people to read."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        lines = texts.get(frame.filename, "").splitlines()
        if frame.lineno and frame.lineno <= len(lines):
            return f"{lines[frame.lineno - 1].strip()[:120]}: "
    return ""
