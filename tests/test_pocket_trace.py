"""The laws of the task `trace`: every line of the steps is true, and splits share nothing."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from mlx_distill.data import pocket, pocket_trace
from mlx_distill.data.pocket_tests import INPUTS, results
from mlx_distill.data.pocket_trace import LENGTHS, LONGER, NUMBERS, rows, split_of
from mlx_distill.data.template import decode_answer, encode
from mlx_distill.errors import DataError
from mlx_distill.evaluate.exact import exact_match
from mlx_distill.options import NewTokenizer, Reasoning
from mlx_distill.reasoning import as_learned, join, split
from mlx_distill.tokenizer import train_tokenizer

SIZES = {"train": 3000, "valid": 200, "test": 200, "longer": 200}
HELD_OUT = [name for name in SIZES if name != "train"]
DIGEST = "801a9bbfee897135073fbb14fb5060541aaba108ac1ad42823a407feade8c674"
MARKS = Reasoning()


@cache
def made(name, seed=0):
    return rows(name, SIZES[name], seed=seed)


@cache
def items(name, seed=0):
    stream = pocket_trace._items(name, seed)
    return [next(stream) for _ in range(SIZES[name])]


def traced(prompt):
    """What the variable holds after each line of the program in the prompt: found by running its text."""
    *program, call = prompt.splitlines()
    lines = [re.sub(r"^    (value = |return )", "", line) for line in program[1:]]
    value = int(re.fullmatch(r"solve\((\d+)\)", call)[1])
    found = []
    for line in lines:
        value = eval(line, {"value": value})
        found.append(value)
    return found


# ---- what is in a row


@pytest.mark.parametrize("name", SIZES)
def test_every_step_is_true_and_the_last_is_the_answer(name):
    for row in made(name):
        steps, answer = split(row.completion, MARKS)
        values = [int(line) for line in steps.splitlines()]
        assert values == traced(row.prompt), row.origin
        names = {}
        exec(row.prompt.rpartition("solve(")[0], names)  # and the program as a whole
        given = int(row.prompt.rpartition("(")[2].strip(")\n"))
        assert answer == str(values[-1]) == str(names["solve"](given))
        assert row.references == (answer,) and row.task == "exact" and not row.tests
        assert all(value in NUMBERS for value in [given, *values])
        assert all(one != other for one, other in zip([given, *values], values, strict=False))


def test_a_wrong_step_is_seen():
    """The check above can fail: a line left out changes what follows."""
    row = made("train")[0]
    steps = traced(row.prompt)
    first, *rest = row.prompt.splitlines(keepends=True)
    assert traced(first + "".join(rest[1:])) != steps[1:]


def test_the_answer_is_scored_by_exact_match():
    some = made("test")
    answers = [split(row.completion, MARKS)[1] for row in some]
    assert exact_match(some, answers)[0]["exact_match"] == 1
    # The usual mistake, to compare the whole completion, scores nothing.
    assert exact_match(some, [row.completion for row in some])[0]["exact_match"] == 0


def test_rows_of_all_ways_to_learn_are_the_same_text():
    for row in made("train")[:200]:
        pair = {task: one for one, task in as_learned(row, Reasoning(learn="two_tasks"))}
        assert join(pair["steps"].completion + "\n", pair["answer"].completion, MARKS) == row.completion
        assert pair["answer"].prompt == row.prompt


def test_the_last_line_alone_leaves_the_answer_open():
    """Every last line leaves four answers possible or more, and guessing the likeliest gets few right."""
    answers = Counter(row.references[0] for row in made("train"))
    assert len(answers) == len(NUMBERS) and max(answers.values()) < 0.2 * SIZES["train"]
    known = {}
    for row in made("train"):
        known.setdefault(row.prompt.splitlines()[-2], Counter())[row.references[0]] += 1
    assert min(len(counter) for counter in known.values()) >= 4
    guessed = sum(max(counter.values()) for counter in known.values())
    assert guessed < 0.4 * SIZES["train"]


def test_a_tokenizer_trained_on_it_writes_it_in_few_tokens():
    some = made("train")[:1000]
    texts = [row.prompt + row.completion for row in some]
    tokenizer = train_tokenizer(texts, NewTokenizer(pieces=80, byte_fallback=False))
    unknown = tokenizer.convert_tokens_to_ids("<unk>")
    for row in [*some[:50], *made("longer")[:50]]:
        found = encode(row, tokenizer)
        assert len(found.tokens) <= 120 and unknown not in found.tokens
        assert decode_answer(found.tokens[found.start :], tokenizer) == row.completion


# ---- always the same


def test_the_first_rows_are_pinned():
    """Teachers learned these rows: if this fails, the numbers of docs/reasoning.md are of other ones."""
    fields = [(row.prompt, row.completion, row.origin) for row in made("train")[:1000]]
    assert hashlib.sha256(json.dumps(fields).encode()).hexdigest() == DIGEST


def test_another_process_with_another_hash_seed_makes_the_same_rows():
    program = "from mlx_distill.data.pocket import rows; print(rows('trace', 'valid', 9, start=3, seed=5))"
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(filter(None, sys.path))}
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert printed.stdout.strip() == str(rows("valid", 9, start=3, seed=5))


def test_a_row_depends_on_its_place_alone():
    whole = rows("train", 40, seed=3)
    assert rows("train", 15, seed=3) == whole[:15]
    assert rows("train", 15, start=25, seed=3) == whole[25:]
    assert whole == pocket.rows("trace", "train", 40, seed=3)
    assert len({row.prompt for row in whole} & {row.prompt for row in rows("train", 40, seed=4)}) < 10


# ---- no leakage


@pytest.mark.parametrize("name", SIZES)
def test_no_prompt_comes_twice(name):
    assert len({row.prompt for row in made(name)}) == SIZES[name]


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_rows_are_new_whatever_the_seed(name):
    train = {row.prompt for seed in (0, 1) for row in made("train", seed)}
    held = {row.prompt for seed in (0, 1) for row in made(name, seed)}
    assert not train & held
    assert {split_of(item) for seed in (0, 1) for item in items(name, seed)} == {name}


@pytest.mark.parametrize("name", ["valid", "test"])
def test_no_held_out_row_is_a_training_row_in_other_words(name):
    def told_apart(item):
        function, given = item
        return repr(results(function)), given

    learned = {told_apart(item) for item in items("train")}
    assert not learned & {told_apart(item) for item in items(name)}

    # The usual mistake, a split by the text of the prompt, does leak.
    train, held = [], []
    for item, row in zip(items("train"), made("train"), strict=True):
        (held if hashlib.sha256(row.prompt.encode()).digest()[0] < 20 else train).append(item)
    assert {told_apart(item) for item in train} & {told_apart(item) for item in held}


def test_longer_functions_have_one_operation_more():
    lengths = {name: {len(function) for function, _ in items(name)} for name in SIZES}
    assert lengths.pop("longer") == {LONGER} == {max(LENGTHS) + 1}
    assert all(found == set(LENGTHS) for found in lengths.values())
    assert len(INPUTS["value"]) > 10  # what tells functions apart


# ---- mistakes


def test_what_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(DataError, match=r"pocket/trace/train: .*name a number, such as `rows: 5000`"):
        rows("train", None)
    with pytest.raises(DataError, match="no split 'composition'; one of train, valid, test, longer"):
        pocket.rows("trace", "composition", 3)
    some = items("train")[:3]
    monkeypatch.setattr(pocket_trace, "_candidate", lambda draw, lengths: some[int(draw() * 3)])
    for _ in range(2):
        with pytest.raises(DataError, match="pocket/trace/train: 3 rows nearly exhaust it; ask for fewer"):
            rows("train", 4, seed=991)
    pocket_trace._stream.cache_clear()
