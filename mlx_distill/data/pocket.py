"""The embedded corpus `pocket`: small Python functions, each in words, in code and with tests.

A function is a pipeline of one to three operations of `pocket_operations`, one line each:

    def solve(numbers):
        \"\"\"Keep the numbers above 4, multiply each number by 3, then sum the numbers.\"\"\"
        numbers = [x for x in numbers if x > 4]
        numbers = [x * 3 for x in numbers]
        return sum(numbers)

The task `code` asks for the body, `summary` for the docstring; `trace` (`pocket_trace`) for what a function
returns. The split of a function follows from what it does, so no seed and no other order of its steps moves
a held-out function into training.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise, product
from random import Random
from typing import NamedTuple

from mlx_distill.data.pocket_operations import NUMBERS, OPERATIONS, TEXT, VALUE, Operation
from mlx_distill.data.pocket_tests import is_clear, results, tests_of
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError

SPLITS = ("train", "valid", "test", "composition")
TASKS = ("code", "summary", "both", "trace")
_HELD_OUT_PAIRS = 4  # of 100 pairs of neighbouring operations: they occur in `composition` alone
_VALID, _TEST = 4, 4  # of 100 functions
_MOST_FRUITLESS = 10_000  # candidates in a row without a new function: the split is nearly exhausted
_JOINERS = {
    1: ("{}.",),
    2: ("{}, then {}.", "First {}, then {}."),
    3: ("{}, {}, then {}.", "First {}, then {}, then {}."),
}


class Step(NamedTuple):
    """An operation with its constants."""

    operation: Operation
    constants: tuple[str, ...]

    @property
    def code(self) -> str:
        return self.operation.code.format(*self.constants)


Function = tuple[Step, ...]


def rows(task: str, split: str, count: int | None, start: int = 0, seed: int = 0) -> list[Row]:
    """Rows `start` to `start + count` of an endless list that `split` and `seed` determine.

    Row i is made of function i whatever the task, and no function comes twice; `both` alternates, even
    rows code and odd rows summary. `composition` holds the functions with two neighbouring operations
    that no other split combines.
    """
    if task not in TASKS:
        raise DataError(f"pocket: no task {task!r}; one of {', '.join(TASKS)}")
    if task == "trace":
        from mlx_distill.data import pocket_trace  # which is made of what stands here

        return pocket_trace.rows(split, count, start, seed)
    if split not in SPLITS:
        raise DataError(f"pocket: no split {split!r}; one of {', '.join(SPLITS)}")
    if count is None:
        raise DataError(f"pocket/{task}/{split}: too many rows for all; name a number, such as `rows: 5000`")
    made = []
    for index, function in enumerate(_first(start + count, split, seed)[start:], start):
        kind = task if task != "both" else ("code", "summary")[index % 2]
        make = _code_row if kind == "code" else _summary_row
        made.append(make(function, seed, f"pocket/{kind}/{split}:{index}"))
    return made


def _code_row(function: Function, seed: int, origin: str) -> Row:
    prompt = f'{signature(function)}    """{docstring(function, seed)}"""\n'
    return Row(prompt=prompt, completion=body(function), tests=tests_of(function), task="code", origin=origin)


def _summary_row(function: Function, seed: int, origin: str) -> Row:
    prompt = f"{signature(function)}{body(function)}# Summary:"
    summary, references = docstring(function, seed), docstrings(function)
    return Row(prompt=prompt, completion=f" {summary}", references=references, task="summary", origin=origin)


def signature(function: Function) -> str:
    return f"def solve({function[0].operation.takes}):\n"


def body(function: Function) -> str:
    *others, last = function
    lines = [f"    {step.operation.gives} = {step.code}\n" for step in others]
    return "".join(lines) + f"    return {last.code}\n"


def docstrings(function: Function) -> tuple[str, ...]:
    """Every docstring that is right for the function: all phrases of its steps, joined in all ways."""
    choices = [[phrase.format(*step.constants) for phrase in step.operation.phrases] for step in function]
    return tuple(
        _sentence(joiner, phrases) for joiner in _JOINERS[len(function)] for phrases in product(*choices)
    )


def docstring(function: Function, seed: int) -> str:
    """The one of `docstrings` that the row of the function carries; the seed draws it."""
    digits = stable_hash(f"{seed}\n{body(function)}")
    digits, which = divmod(digits, len(_JOINERS[len(function)]))
    phrases = []
    for step in function:
        digits, place = divmod(digits, len(step.operation.phrases))
        phrases.append(step.operation.phrases[place].format(*step.constants))
    return _sentence(_JOINERS[len(function)][which], phrases)


def _sentence(joiner: str, phrases) -> str:
    sentence = joiner.format(*phrases)
    return sentence[0].upper() + sentence[1:]


def split_of(function: Function) -> str:
    """The only split in which the function may occur.

    What the function does decides, not how it is written: had training "reverse, then add 2", the test of
    "add 2, then reverse" would be no test.
    """
    names = [step.operation.name for step in function]
    if any(_held_out(first, second) for first, second in pairwise(names)):
        return "composition"
    place = stable_hash(repr(results(function))) % 100
    return "valid" if place < _VALID else "test" if place < _VALID + _TEST else "train"


@cache
def _held_out(first: str, second: str) -> bool:
    return stable_hash(f"{first} {second}") % 100 < _HELD_OUT_PAIRS


def stable_hash(text: str) -> int:
    """64 bits of a text, the same in every process."""
    # Python's own hash() differs from process to process.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@cache
def followers(kind: str, family: str) -> tuple[Operation, ...]:
    """The operations on `kind` that may follow one of `family` (of the same family none may)."""
    return tuple(o for o in OPERATIONS if o.takes == kind and o.family != family)


def _first(count: int, split: str, seed: int) -> list[Function]:
    """The first functions of a split; what was made before is not made again."""
    made, more = _stream(split, seed)
    made.extend(islice(more, max(0, count - len(made))))
    if len(made) < count:
        raise DataError(
            f"pocket: {len(made)} functions nearly exhaust the split {split!r}; ask for fewer rows"
        )
    return made[:count]


@cache
def _stream(split: str, seed: int) -> tuple[list[Function], Iterator[Function]]:
    return [], _functions(split, seed)


def _functions(split: str, seed: int) -> Iterator[Function]:
    """The functions of a split in the order of the seed, each once, until hardly a new one comes."""
    # Of all methods of Random only random() is promised to stay the same in later versions of Python.
    draw = Random(f"pocket {split} {seed}").random
    seen, fruitless = set(), 0
    while fruitless < _MOST_FRUITLESS:
        function = _candidate(draw)
        fruitless += 1
        if split_of(function) == split and (text := body(function)) not in seen and is_clear(function):
            seen.add(text)
            fruitless = 0
            yield function


def _candidate(draw) -> Function:
    def one_of(choices):
        return choices[int(draw() * len(choices))]

    kind = one_of((NUMBERS,) * 11 + (TEXT,) * 8 + (VALUE,))
    steps, family = [], ""
    for _ in range(one_of((1,) + (2,) * 9 + (3,) * 10)):
        operation = one_of(followers(kind, family))
        steps.append(Step(operation, tuple(one_of(choices) for choices in operation.constants)))
        kind, family = operation.gives, operation.family
    return tuple(steps)
