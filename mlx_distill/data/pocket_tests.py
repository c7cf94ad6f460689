"""Tests of the functions of `pocket`: few `assert` lines that tell a function from its near misses."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

from mlx_distill.data.pocket_operations import BY_NAME, NUMBERS, OPERATIONS, TEXT, VALUE, Operation

FEWEST_TESTS = 5
_FEWEST_RESULTS = 4  # of a function on INPUTS

# Chosen for what they tell apart: the bounds 2 to 9 on both sides, repeats, negatives, order, both cases.
INPUTS = {
    NUMBERS: (
        [3, 8, 5, 2, 9, 4, 7, 6],
        [-4, 12, 7, 7, -9, 3, 0, 15],
        [],
        [10, 2, 33, 2, 18, 5, 27],
        [1, 0, -1, 6, 14, 6, 21, 8],
        [9, 30, 4, 25, -6, 11, 16],
        [-2, -7, -5, -12, -3],
        [5],
        [40, 13, 36, 24, 8, 1, 35, 22],
        [-8, 2, 4, -8, 20, 6, -1, 3, 5],
        [19, 17, 28, 32, 45, 10, 9, 3],
        [4, 3, 3, 2, 1, 0, -1, -2, -3],
        [6, 9, 12, 5, 10, 7, 14, 8, 16],
        [-15, -10, 18, 42, 63, 56, 72],
        [2, 5],
        [11, -11, 13, -13, 8, -6, 9],
        [7, 8, 9, 1, 2, 3, 4, 5, 6, 10],
        [-20, -18, -16, -14, -21, -25, -27],
        [26, 23, 29, 31, 34, 37, 38],
        [50, -40, 64, -32, 81, 49],
    ),
    VALUE: (7, 358, -46, 0, 12, 93, -5, 24, 41, 130, 2, 65, -99, 18, 807, 56, -12, 3, 1, 9, 77),
    TEXT: (
        "Tall trees in a Silent forest",
        "An Orange rat ran",
        "",
        "no",
        "Stone tiles, ONE lantern; nine oars",
        "LITTLE lions learn as SAILORS rest",
        "a to-do list is on its SEAT",
        "Seven rare stars rise",
        "xyz ABC hello World",
        "snail trail on the inner rail",
        "Eat less salt in stew",
        "banana  isle",
        "ROTOR",
        "zebra apple Mango lemon",
    ),
}

# For the tests alone: the split of a function hangs on INPUTS, and more of those would move functions.
MORE_INPUTS = {
    NUMBERS: (
        [40],
        [1],
        [60, 20, 12, 36, 48],
        [-1, -20, 30, -45, 15],
        [12, 4, 16, 8, 2, 0, 6, 14],
        [15, 3, 27, 9, 1, 21, 5, 11, 33],
        [9, 44, -12, 18, -46, 5, -47, -13, -20, -31],
        [-3, -24, 1, -50, 32, 6, 3, 54, 10, 21],
        [63, 9, 72, 18, 8, 56, 24, 45],
        [8, 4, -8],
        [12, 18, 12, 30, 18, 24, 42],
        [35, 14, 20, 35, 40, 14, 28, 20],
        [16, 32, 16, -4, 27, 45, 9, 27],
    ),
    VALUE: (99, 1000, -7, 33, 90, -909, 5490, 8172),
    TEXT: (
        "area near panamA",
        "eel in a treE",
        "ivy on the taxI",
        "oval radiO",
        "sea of starS",
        "red riveR",
        "two a nighT",
        "nine in teN",
        "loud owL",
        "dry lanD",
        "IDLE motor",
        "Odd radio",
        "NO data",
        "DRY sushi",
    ),
}


def results(function) -> list:
    """What the function returns for each of `INPUTS` of its kind."""
    return _run(function, list(INPUTS[function[0].operation.takes]))


def is_clear(function) -> bool:
    """Whether the function shows what it does: each near miss, but for the order of steps, differs somewhere.

    So no step is without effect, no constant is idle, and the result is not nearly always the same.
    """
    values = _values(function, list(INPUTS[function[0].operation.takes]))
    if len({repr(value) for value in values[-1]}) < _FEWEST_RESULTS:
        return False
    misses = mutants(function, wide=False)
    return all(_run(mutant[place:], values[place]) != values[-1] for place, mutant in misses)


def tests_of(function) -> tuple[str, ...]:
    """`assert solve(INPUT) == OUTPUT` lines that fail for every mutant that any input tells apart.

    The first inputs with different outputs, and one more for each mutant that would pass until then.
    """
    kind = function[0].operation.takes
    values = _values(function, [*INPUTS[kind], *MORE_INPUTS[kind]])
    inputs, outputs = values[0], values[-1]
    chosen: list[int] = []
    for index, output in enumerate(outputs):
        if len(chosen) < FEWEST_TESTS and output not in [outputs[other] for other in chosen]:
            chosen.append(index)
    for place, mutant in mutants(function):
        steps, before = mutant[place:], values[place]
        if _run(steps, [before[index] for index in chosen]) == [outputs[index] for index in chosen]:
            wrong = _run(steps, before)
            chosen += [index for index, output in enumerate(outputs) if wrong[index] != output][:1]
    return tuple(f"assert solve({inputs[index]!r}) == {outputs[index]!r}" for index in chosen)


def mutants(function, wide: bool = True) -> Iterator[tuple[int, tuple]]:
    """The near misses of a function, each with the place of the first step that differs.

    A step dropped, a constant changed, an operation taken for another: one easily taken for it or, if
    `wide`, any that fits. If `wide` also two neighbours swapped, which may well mean the same: to sort the
    numbers and to add 2 to each, say.
    """
    for place, step in enumerate(function):
        before, after = function[:place], function[place + 1 :]
        operation, constants = step
        if operation.takes == operation.gives and len(function) > 1:
            yield place, before + after
        kinds = {kind for each in (step, *after[:1]) for kind in (each.operation.takes, each.operation.gives)}
        if wide and after and len(kinds) == 1:
            yield place, (*before, after[0], step, *after[1:])
        for which, constant in enumerate(constants):
            for other in _neighbours(constant, operation.constants[which]):
                changed = (*constants[:which], other, *constants[which + 1 :])
                yield place, (*before, step._replace(constants=changed), *after)
        for other in _fitting(operation.name) if wide else map(BY_NAME.__getitem__, operation.swaps):
            yield place, (*before, step._replace(operation=other), *after)


@cache
def _fitting(name: str) -> tuple[Operation, ...]:
    """The other operations that could stand in the place of one, with its constants."""

    def shape(operation):
        # Digits fit where any digit does, letters and marks where a letter does.
        numeric = tuple(choices[0].isdigit() for choices in operation.constants)
        return operation.takes, operation.gives, numeric

    wanted = BY_NAME[name]
    others = [other for other in OPERATIONS if shape(other) == shape(wanted) and other is not wanted]
    code = wanted.code.replace(" % ", " // ")  # not the code of an operation everywhere
    return (*others, replace(wanted, code=code)) if code != wanted.code else tuple(others)


def _neighbours(constant: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    if constant.isdigit():  # one less is also `>` taken for `>=`
        return str(int(constant) - 1), str(int(constant) + 1)
    place = choices.index(constant)
    return choices[place - 1], choices[(place + 1) % len(choices)]


def _values(function, inputs: list) -> list[list]:
    """What the variable holds for each input: before the first step, and after each."""
    values = [inputs]
    for step in function:
        values.append(_run((step,), values[-1]))
    return values


def _run(steps, values: list) -> list:
    for step in steps:
        run = _compiled(step.operation.takes, step.code)
        values = [run(value) for value in values]
    return values


@cache
def _compiled(kind: str, code: str) -> Callable:
    return eval(f"lambda {kind}: {code}")  # our own operations, never a model's answer
