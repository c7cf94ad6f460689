"""In the process of the program: execute it, then answer for it.

Whatever stands here may be changed by the program once it runs. It can only harm itself with that: its values
are judged elsewhere, except for those of tests that have to run here.
"""

import json
import os
import sys
import types
from typing import Any

from .confine import Guards
from .plain import encode
from .referee import MESSAGE, run_tests
from .shared import Shared
from .talk import Lines, describe, write_line

_OUT, _IN = 3, 4


def play(guards: Guards, request: dict[str, Any]) -> None:
    """Execute the program and send whether it loaded; then evaluate, answer or test. Does not return."""
    os.chdir(guards.work)
    guards.put_on(request["seconds"], referee=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "child"]:
        del sys.modules[name]
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and pickle look
    loaded = attempt(request["source"], "exec", vars(module))
    write_line(_OUT, loaded)
    if loaded[0] == "value":
        match request["kind"]:
            case "program":
                for call in request["calls"]:
                    write_line(_OUT, attempt(call, "eval", vars(module)))
            case "refereed":
                answer_calls(vars(module))
            case "within":
                test_within(vars(module))
    os._exit(0)


def attempt(text: str, mode: str, names: dict[str, Any]) -> list[Any]:
    """["value", plain value], or ["error", why in one line]."""
    try:
        return ["value", encode(eval(compile(text, "<program>", mode, dont_inherit=True), names))]
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no way out either
        return ["error", describe(error)]


def answer_calls(names: dict[str, Any]) -> None:
    """Call what the referee asks for, until it asks no more."""
    lines = Lines(_IN, MESSAGE)
    while line := lines.next():
        request = json.loads(line)
        shared = Shared()
        positional, named = shared.unpack(request)
        try:
            value = names[request["name"]](*positional, **dict(named))
        except BaseException as error:
            write_line(_OUT, {"raised": raised(error), **shared.pack(None)})
            continue
        try:
            answer = shared.pack(value)
        except BaseException as error:
            answer = {"none": describe(error)}
        write_line(_OUT, answer)


def raised(error: BaseException) -> list[Any]:
    """The names of its built-in types, nearest first, what it says, and its arguments if they are strings."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    arguments = list(error.args)
    plain = all(type(one) in (str, int, float, bool) or one is None for one in arguments)
    return [kinds, describe(error), arguments if plain else None]


def test_within(names: dict[str, Any]) -> None:
    """Run the tests on the program's own objects."""
    say, name = os.write, "ascii"  # before the program's functions run again
    work = json.loads(Lines(_IN, MESSAGE).next() or b"null")
    token = work["token"].encode(name)
    for verdict in run_tests(work["setup"], work["tests"], dict(names)):
        reason = json.dumps(verdict).encode(name)
        say(_OUT, b'["%b", %b]\n' % (token, reason))
