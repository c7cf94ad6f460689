"""What is run, in three ways, and what comes of it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Program:
    """Values come back and the caller compares: for tests of the form call and expected value."""

    source: str
    calls: tuple[str, ...]  # expressions, evaluated in turn after `source` was executed


@dataclass(frozen=True, slots=True)
class Refereed:
    """The program in one process, its tests in another, the referee, which runs no line of the program.

    The referee executes `setup` and then each test. There, each of `names` stands for the program's function
    of that name: calling it sends plain values to the program's process and brings back the plain value
    that it returned, or raises the built-in exception that it raised. Lists, dicts and sets among the
    arguments are afterwards as the function left them. Expected values exist in the referee alone.
    """

    source: str
    setup: str  # trusted Python that the tests stand on: imports, helpers, `def check(candidate): ...`
    tests: tuple[str, ...]  # Python statements; one that raises has failed
    names: tuple[str, ...]  # functions of the program that tests or `setup` call


@dataclass(frozen=True, slots=True)
class Within:
    """Weaker: the tests run in the process of the program, for arguments that are no plain values.

    A printed "passed", an exit code or an early exit still passes nothing, but code that looks for its tests
    finds them, and an object of its own may claim to equal what they expect.
    """

    source: str
    setup: str  # as in `Refereed`
    tests: tuple[str, ...]


Runnable = Program | Refereed | Within


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands where a value would, and says why there is none."""

    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    # One a call of a `Program`; one a test of the others, True where it held. `Failed` where there is none;
    # None: the program did not even load.
    values: list[Any] | None
    why: str | None  # the first thing that went wrong, None if nothing did
