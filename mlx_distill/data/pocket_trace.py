"""The task `trace` of the corpus `pocket`: what does a function return? Worked out step by step.

    def solve(value):
        value = value + 6
        value = value % 6
        return value + 2
    solve(2)

The completion is `<think>8\\n2\\n4\\n</think>4`: the value after each line, then the answer (a "scratchpad",
Nye et al. 2021, arXiv 2112.00114, section 4). The operations are those of `pocket` on one number, and every
number on the way is a digit: a step is a fact that a tiny model can learn by heart, so what is left to learn
is to do one after the other.
"""

from collections.abc import Iterator
from functools import cache
from itertools import islice, product
from random import Random

from mlx_distill.data.pocket import Function, Step, body, signature, stable_hash
from mlx_distill.data.pocket_operations import OPERATIONS, VALUE
from mlx_distill.data.pocket_tests import results
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError

SPLITS = ("train", "valid", "test", "longer")
OPEN, CLOSE = "<think>", "</think>"
NUMBERS = range(10)
LENGTHS, LONGER = (3, 4, 5), 6  # operations of a function, and in the split `longer`
# Results that each operation can have: with fewer the last line alone would give much of the answer away.
_FEWEST_RESULTS = 4
_VALID, _TEST = 4, 4  # of 100 items
_MOST_FRUITLESS = 10_000  # candidates in a row without a new item: the split is nearly exhausted

Item = tuple[Function, int]  # a function and what it is given
Results = dict[int, dict[Step, int]]  # number -> step that it may be followed by -> number


def rows(split: str, count: int | None, start: int = 0, seed: int = 0) -> list[Row]:
    """Rows `start` to `start + count` of an endless list that `split` and `seed` determine.

    No prompt comes twice. What the function does and what it is given decide the split of a row: none is
    a row of another split in other words. The functions of `longer` have one operation more than any other.
    """
    if split not in SPLITS:
        raise DataError(f"pocket/trace: no split {split!r}; one of {', '.join(SPLITS)}")
    if count is None:
        raise DataError(f"pocket/trace/{split}: too many rows for all; name a number, such as `rows: 5000`")
    made, more = _stream(split, seed)
    made.extend(islice(more, max(0, start + count - len(made))))
    if len(made) < start + count:
        raise DataError(f"pocket/trace/{split}: {len(made)} rows nearly exhaust it; ask for fewer rows")
    return [row_of(item, f"pocket/trace/{split}:{i}") for i, item in enumerate(made[start:][:count], start)]


def row_of(item: Item, origin: str = "") -> Row:
    function, given = item
    values = values_of(item)
    worked = "".join(f"{value}\n" for value in values[1:])
    return Row(
        prompt=f"{signature(function)}{body(function)}solve({given})\n",
        completion=f"{OPEN}{worked}{CLOSE}{values[-1]}",
        references=(str(values[-1]),),
        task="exact",
        origin=origin,
    )


def values_of(item: Item) -> list[int]:
    """What the function is given, and the value after each of its operations."""
    function, value = item
    values = [value]
    for step in function:
        values.append(_steps()[values[-1]][step])
    return values


def split_of(item: Item) -> str:
    """The only split in which a function may be given this."""
    function, given = item
    if len(function) == LONGER:
        return "longer"
    place = stable_hash(repr((results(function), given))) % 100
    return "valid" if place < _VALID else "test" if place < _VALID + _TEST else "train"


@cache
def _stream(split: str, seed: int) -> tuple[list[Item], Iterator[Item]]:
    return [], _items(split, seed)


def _items(split: str, seed: int) -> Iterator[Item]:
    """The items of a split in the order of the seed, each once, until hardly a new one comes."""
    # Of all methods of Random only random() is promised to stay the same in later versions of Python.
    draw = Random(f"pocket trace {split} {seed}").random
    seen, fruitless = set(), 0
    while fruitless < _MOST_FRUITLESS:
        item = _candidate(draw, (LONGER,) if split == "longer" else LENGTHS)
        fruitless += 1
        if item not in seen and split_of(item) == split:
            seen.add(item)
            fruitless = 0
            yield item


def _candidate(draw, lengths: tuple[int, ...]) -> Item:
    def one_of(choices):
        return choices[int(draw() * len(choices))]

    given = value = one_of(NUMBERS)
    function: Function = ()
    for _ in range(one_of(lengths)):
        following = _steps()[value]
        name = one_of(sorted({step.operation.name for step in following}))
        step = one_of([step for step in following if step.operation.name == name])
        function, value = (*function, step), following[step]
    return function, given


@cache
def _steps() -> Results:
    """Which steps each number may be followed by: they change it, and stay within `NUMBERS`."""
    found: Results = {number: {} for number in NUMBERS}
    for operation in OPERATIONS:
        if operation.takes == operation.gives == VALUE:
            for constants in product(*operation.constants):
                step = Step(operation, constants)
                after = {number: eval(step.code, {VALUE: number}) for number in NUMBERS}  # our own code
                after = {number: result for number, result in after.items() if result in NUMBERS}
                after = {number: result for number, result in after.items() if result != number}
                if len(set(after.values())) >= _FEWEST_RESULTS:
                    for number, result in after.items():
                        found[number][step] = result
    return found
