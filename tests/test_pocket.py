"""The laws of the corpus `pocket`: splits share nothing, tests tell a function from its near misses."""

import hashlib
import json
import random
import re
import statistics
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise, product
from math import prod

import pytest

from mlx_distill.data import pocket
from mlx_distill.data.pocket import Step, body, docstrings, followers, rows, split_of
from mlx_distill.data.pocket_operations import BY_NAME, NUMBERS, OPERATIONS, TEXT, VALUE, WORDS
from mlx_distill.data.pocket_tests import INPUTS, is_clear, results
from mlx_distill.errors import DataError

SIZES = {"train": 5000, "valid": 400, "test": 400, "composition": 400}
HELD_OUT = [split for split in SIZES if split != "train"]
DIGEST = "5dc222ce03b830d00bf320c6ad67c459a70329033aec534f1c3bbc154a80fcab"


@cache
def functions(split, seed=0):
    """The functions behind the rows of a split."""
    made = pocket._functions(split, seed)
    return [next(made) for _ in range(SIZES[split])]


@cache
def code_rows(split, count=500):
    return rows("code", split, count)


def solve_of(source):
    """The function that a program defines. Not for foreign code: nothing limits it here."""
    names = {}
    exec(source, names)
    return names["solve"]


def passes(source, tests):
    """Whether each test passes; an error of any kind is a failure, never an equal."""
    try:
        names = {}
        exec(source, names)
        for test in tests:
            exec(test, names)
    except Exception:
        return False
    return True


# ---- always the same


def digest_of(some):
    fields = [(row.prompt, row.completion, row.tests, row.references, row.task, row.origin) for row in some]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def test_the_first_thousand_rows_are_pinned():
    """The embedded teacher learned these rows: if this fails, it must be trained again."""
    assert digest_of(rows("both", "train", 1000)) == DIGEST


def test_another_process_with_another_hash_seed_makes_the_same_rows():
    program = "from mlx_distill.data.pocket import rows; print(rows('both', 'valid', 20, start=3, seed=5))"
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(filter(None, sys.path))}
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert printed.stdout.strip() == str(rows("both", "valid", 20, start=3, seed=5))


def test_a_row_depends_on_its_place_alone():
    whole = rows("both", "train", 40, seed=3)
    assert rows("both", "train", 15, seed=3) == whole[:15]
    assert rows("both", "train", 15, start=25, seed=3) == whole[25:]
    assert not set(map(str, whole)) & set(map(str, rows("both", "train", 40, seed=4)))


def test_both_alternates_and_the_task_does_not_change_the_function():
    code, summary = rows("code", "train", 20), rows("summary", "train", 20)
    assert rows("both", "train", 20) == [(code, summary)[i % 2][i] for i in range(20)]
    for one, other in zip(code, summary, strict=True):
        assert one.completion in other.prompt
        assert f'"""{other.completion.strip()}"""' in one.prompt


# ---- what is in a row


def test_rows_look_as_documented():
    for row in code_rows("train"):
        assert re.fullmatch(r'def solve\((numbers|value|text)\):\n    """[A-Z].*\."""\n', row.prompt)
        assert all(line.startswith("    ") for line in row.completion.splitlines())
        assert row.completion.endswith("\n") and row.task == "code" and not row.references
        assert len(row.tests) >= 4 and all(test.startswith("assert solve(") for test in row.tests)
    for row in rows("summary", "train", 500):
        assert row.prompt.startswith("def solve(") and row.prompt.endswith("\n# Summary:")
        assert row.completion.strip() in row.references and row.completion.startswith(" ")
        assert len(set(row.references)) == len(row.references) <= 54 and not row.tests
        assert row.task == "summary"
    lengths = [len(row.prompt + row.completion) for row in code_rows("train")]
    assert statistics.median(lengths) <= 200 and max(lengths) <= 280


def instances():
    """Every operation with every choice of its constants."""
    for operation in OPERATIONS:
        for constants in product(*operation.constants):
            yield Step(operation, constants)


def lines_of_phrases():
    lines = {}
    for step in instances():
        for phrase in step.operation.phrases:
            text = phrase.format(*step.constants)
            lines.setdefault(text, []).append(step)
    return lines


def test_every_phrase_has_one_meaning_and_names_its_constants():
    steps = list(instances())
    assert len({(step.operation.takes, step.code) for step in steps}) == len(steps)
    for text, meanings in lines_of_phrases().items():
        assert len(meanings) == 1, f"{text!r} means {[step.code for step in meanings]}"
        assert not re.search(r"^first |, |\bthen\b|\.", text), f"{text!r} reads as a joiner"
    for operation in OPERATIONS:
        assert len(operation.phrases) >= 3
        holes = [f"{{{place}}}" for place in range(len(operation.constants))]
        assert all(hole in text for hole in holes for text in (operation.code, *operation.phrases))


def test_a_docstring_determines_the_body():
    """Each accepted docstring, read by its phrases alone, gives the very body."""
    lines = lines_of_phrases()
    for function in functions("train")[:300] + functions("composition")[:100]:
        for text in docstrings(function):
            plain = text[0].lower() + text[1:].removesuffix(".")
            phrases = re.split(r", then |, ", plain.removeprefix("first "))
            assert body(tuple(lines[phrase][0] for phrase in phrases)) == body(function)


# ---- how many


@cache
def count(kind, family, length):
    """How many functions of so many steps may follow a step of `family` that gave `kind`."""
    if length == 0:
        return 1
    return sum(ways(o) * count(o.gives, o.family, length - 1) for o in followers(kind, family))


def ways(operation):
    return prod(len(choices) for choices in operation.constants)


def function_at(index, kind, family, length):
    """The function of that index among the `count(kind, family, length)`."""
    if length == 0:
        return ()
    for operation in followers(kind, family):
        rest = count(operation.gives, operation.family, length - 1)
        if index < ways(operation) * rest:
            which, index = divmod(index, rest)
            constants = list(product(*operation.constants))[which]
            return (
                Step(operation, constants),
                *function_at(index, operation.gives, operation.family, length - 1),
            )
        index -= ways(operation) * rest
    raise IndexError


def every(length):
    return (function_at(i, kind, "", length) for kind in INPUTS for i in range(count(kind, "", length)))


def test_more_than_a_million_distinct_functions():
    """Counted from the grammar, less the share that is refused for an idle step or constant."""
    short = [body(function) for length in (1, 2) for function in every(length)]
    assert len(set(short)) == len(short) > 25_000  # the count counts bodies, not ways to write them
    totals = {kind: count(kind, "", 3) for kind in INPUTS}
    total = sum(totals.values())
    rng, sample = random.Random(1), []
    for _ in range(1500):
        kind = rng.choices(list(totals), list(totals.values()))[0]
        sample.append(function_at(rng.randrange(totals[kind]), kind, "", 3))
    assert len({body(function) for function in sample}) >= len(set(sample))
    share = sum(map(is_clear, sample)) / len(sample)
    error = (share * (1 - share) / len(sample)) ** 0.5
    assert total * (share - 5 * error) > 1_000_000, f"{total} functions, {share:.0%} of them clear"


# ---- no leakage


def test_no_row_comes_twice():
    bodies = [body(function) for function in functions("train")]
    assert len(set(bodies)) == len(bodies) == 5000


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_splits_share_no_function_and_no_docstring_with_training(split):
    train = functions("train") + functions("train", seed=1)
    held = functions(split) + functions(split, seed=1)
    assert not {body(function) for function in train} & {body(function) for function in held}
    seen = {text for function in train for text in docstrings(function)}
    assert not seen & {text for function in held for text in docstrings(function)}
    assert {split_of(function) for function in held} == {split}


@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_held_out_function_is_a_training_function_in_another_order(split):
    learned = {(f[0].operation.takes, repr(results(f))) for f in functions("train")}
    assert not learned & {(f[0].operation.takes, repr(results(f))) for f in functions(split)}

    # The usual mistake, a split by the text of the function, does leak.
    train, held = [], []
    for function in functions("train"):
        (held if hashlib.sha256(body(function).encode()).digest()[0] < 10 else train).append(function)
    assert {repr(results(f)) for f in train} & {repr(results(f)) for f in held}


def test_composition_combines_what_training_knows_only_apart():
    def pairs(function):
        return {(one.operation.name, other.operation.name) for one, other in pairwise(function)}

    others = [f for split in ("train", "valid", "test") for f in functions(split)]
    known = set().union(*map(pairs, others))
    new = set().union(*map(pairs, functions("composition"))) - known
    assert all(pairs(function) & new for function in functions("composition"))
    assert len(new) >= 30
    alone = {step.operation.name for function in functions("train") for step in function}
    assert alone == set(BY_NAME)


# ---- the tests of a function


@pytest.mark.parametrize("split", SIZES)
def test_every_reference_body_passes_its_own_tests(split):
    for row in code_rows(split):
        assert passes(row.prompt + row.completion, row.tests), row.origin
        assert not passes(row.prompt + "    return solve\n", row.tests)
        assert not passes(row.prompt + "    return 1 / 0\n", row.tests)  # nor does an error pass


def battery(rng):
    """Inputs other than those that the tests came from, many and random."""
    letters = "aeiosrtnld AEIOSRTNLD xyz,-+*/!?"
    numbers = [[rng.randint(-60, 99) for _ in range(rng.randint(0, 12))] for _ in range(300)]
    numbers += [[rng.randint(-3, 12) for _ in range(rng.randint(0, 12))] for _ in range(300)]
    text = ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(400)]
    return {NUMBERS: numbers, VALUE: list(range(-150, 1200)), TEXT: text}


SPELLINGS = {
    " > ": " >= ",
    " < ": " <= ",
    " == ": " != ",
    " != ": " == ",
    " + ": " - ",
    " - ": " + ",
    " * ": " + ",
    " // ": " % ",
    " % ": " // ",
    "min(": "max(",
    "max(": "min(",
    "sum(": "len(",
    "abs(x)": "x",
    ", reverse=True": "",
    "[::-1]": "",
    "upper": "lower",
    "lower": "upper",
}


def near_misses(row):
    """Mutated bodies with the kind of their mutation, made from the text, without the grammar."""
    lines = [line.strip() for line in row.completion.splitlines()]
    code = [re.sub(r"^(\w+ = |return )", "", line) for line in lines]
    gives = [re.match(r"(\w+) = |return ", line)[1] for line in lines]  # None for the last
    takes = [re.search(r"\((\w+)\)", row.prompt)[1], *gives[:-1]]

    def text(code, gives):
        steps = [f"    {name} = {line}\n" for name, line in zip(gives[:-1], code[:-1], strict=True)]
        return "".join(steps) + f"    return {code[-1]}\n"

    for place, line in enumerate(code):
        before, after = code[:place], code[place + 1 :]
        for kind, wrong in misspelt(line):
            yield kind, text([*before, wrong, *after], gives)
        if not after and before and keeps_kind(line, takes[place]):
            yield "drop", text([*before, takes[place]], gives)
        if after and takes[place] == gives[place]:
            yield "drop", text(before + after, gives[:place] + gives[place + 1 :])
            if keeps_kind(after[0], takes[place]):
                yield "order", text([*before, after[0], line, *after[1:]], gives)


def misspelt(line):
    for spot in re.finditer(r"(?<!\w)[2-9](?!\w)", line):
        for digit in (int(spot[0]) - 1, int(spot[0]) + 1):
            yield "constant", f"{line[: spot.start()]}{digit}{line[spot.end() :]}"
    for spot in re.finditer(r"(?<=')[a-z](?=')", line):
        yield "constant", f"{line[: spot.start()]}u{line[spot.end() :]}"
    for old, new in SPELLINGS.items():
        if old in line:
            yield "spelling", line.replace(old, new, 1)


def keeps_kind(line, kind):
    """Whether a line gives the kind that it takes."""
    value = eval(line, {kind: {NUMBERS: [1], VALUE: 1, TEXT: "a", WORDS: ["a"]}[kind]})
    shape = {NUMBERS: "list", VALUE: "int", TEXT: "str", WORDS: "list"}[kind]
    return type(value).__name__ == shape


def test_every_near_miss_fails_a_test():
    """A mutant may pass only where it does what the reference does on hundreds of other inputs.

    Only the order of steps comes out so: of 4,500 mutants about 300 are equal, all of them swaps.
    """
    inputs = battery(random.Random(7))
    tried, equal, missed_by_one_test = Counter(), Counter(), 0
    for row in (row for split in SIZES for row in code_rows(split)[:150]):
        kind = re.search(r"\((\w+)\)", row.prompt)[1]
        right = solve_of(row.prompt + row.completion)
        answers = [right(value) for value in inputs[kind]]  # outside `passes`: here no error is forgiven
        for mutation, wrong_body in near_misses(row):
            source = row.prompt + wrong_body
            tried[mutation] += 1
            if not passes(source, row.tests):
                missed_by_one_test += passes(source, row.tests[:1])
                continue
            wrong = solve_of(source)
            differing = [v for v, a in zip(inputs[kind], answers, strict=True) if wrong(v) != a]
            assert not differing, f"{row.origin}\n{source}passes its tests, not on {differing[0]!r}"
            equal[mutation] += 1
    assert tried.total() > 4000 and min(tried.values()) > 500
    assert equal["order"] < 0.6 * tried["order"]
    assert equal.total() - equal["order"] < 0.005 * tried.total()

    # The usual mistake, a single test, misses many.
    assert missed_by_one_test > 0.05 * tried.total()


# ---- mistakes


def test_what_cannot_be_had_is_refused():
    with pytest.raises(DataError, match=r"pocket/code/train: .*name a number, such as `rows: 5000`"):
        rows("code", "train", None)
    with pytest.raises(DataError, match="no task 'translate'; one of code, summary, both, trace"):
        rows("translate", "train", 3)
    with pytest.raises(DataError, match="no split 'dev'; one of train, valid, test, composition"):
        rows("code", "dev", 3)


def test_an_exhausted_split_ends_with_an_error_not_in_a_loop(monkeypatch):
    found = functions("train")[:3]
    monkeypatch.setattr(pocket, "_candidate", lambda draw: found[int(draw() * 3)])
    assert len(rows("code", "train", 3, seed=991)) == 3  # a seed of its own: streams are kept
    for _ in range(2):  # and once more: what is kept must not come back short
        with pytest.raises(
            DataError, match="3 functions nearly exhaust the split 'train'; ask for fewer rows"
        ):
            rows("code", "train", 4, seed=991)
    pocket._stream.cache_clear()
