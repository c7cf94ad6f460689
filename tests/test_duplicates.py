"""Near duplicates: what the index finds is what comparing every pair finds, and nothing else."""

import itertools
import re

import numpy as np
import pytest

from mlx_distill import keys
from mlx_distill.data.rows import Row
from mlx_distill.filters import Material, reasons
from mlx_distill.filters.duplicates import bands_and_rows, jaccard, shingles
from mlx_distill.filters.words import words_and_signs
from mlx_distill.options import Filters
from mlx_distill.written import Written

WORDS = [f"{a}{b}" for a in "bcdfglmnprstvz" for b in ("a", "e", "i", "ol", "un", "art")]


def sift(written: list[Written], limit: float) -> list[str | None]:
    return reasons(written, Filters(duplicates=limit), Material())


def similarity(one: Written, other: Written) -> float:
    """By the definition, in full."""

    def of(first: str, second: str) -> float:
        sets = []
        for text in (first, second):
            words = words_and_signs(text)
            sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)} or {tuple(words)})
        return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    return min(of(one.row.question(), other.row.question()), of(one.text, other.text))


def judged(written: list[Written], found: list[str | None], limit: float) -> tuple[int, int]:
    """How many were dropped, and how many were missed: kept, though like an earlier one that is kept.

    A drop must name an earlier answer that is kept, and how alike the two are.
    """
    missed = 0
    for i, reason in enumerate(found):
        if reason is None:
            earlier = (j for j in range(i) if found[j] is None)
            missed += any(similarity(written[i], written[j]) >= limit for j in earlier)
            continue
        match = re.fullmatch(
            r"duplicates: (?:equals|similarity ([\d.]+) to) answer (\d+) of prompt (\d+)(, at least .*)?",
            reason,
        )
        assert match
        named = int(match[3])
        assert named < i
        assert found[named] is None
        assert written[named].sample == int(match[2])
        alike = similarity(written[i], written[named])
        assert alike >= limit
        assert alike == (1 if match[1] is None else pytest.approx(float(match[1]), abs=5e-4))
    return sum(reason is not None for reason in found), missed


def made_up(seed: int, count: int) -> list[Written]:
    """Answers in families: some words of a first one are replaced, of its question too, now and then."""
    random = keys.generator(seed, "made up")
    written: list[Written] = []
    while len(written) < count:
        question, text = (list(random.choice(WORDS, size)) for size in random.integers(6, 60, 2))
        for sample in range(random.integers(1, 6)):
            for words, share in (
                (question, random.choice([0, 0, 0.02])),
                (text, random.choice([0.01, 0.05, 0.3])),
            ):
                for place in np.flatnonzero(random.random(len(words)) < share):
                    words[place] = str(random.choice(WORDS))
            row = Row(prompt=" ".join(question))
            written.append(Written(len(written), sample, row, " ".join(text), [1], True))
    return written


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.8, 0.95])
def test_the_index_finds_what_comparing_all_pairs_finds(limit: float) -> None:
    """No false alarm at all, and next to none is missed, which the sketches promise of 999 in 1000."""
    dropped = missed = 0
    for seed in range(2):
        written = made_up(seed, 150)
        one, other = judged(written, sift(written, limit), limit)
        dropped, missed = dropped + one, missed + other
    assert dropped > 30
    assert missed <= 0.01 * dropped


def test_an_index_made_for_less_likeness_than_is_asked_for_misses_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The usual mistake, a threshold of the index that is taken for its recall."""
    monkeypatch.setattr("mlx_distill.filters.duplicates.bands_and_rows", lambda limit: (2, 16))
    written = made_up(0, 150)
    dropped, missed = judged(written, sift(written, 0.5), 0.5)
    assert missed > 0.2 * dropped


@pytest.mark.parametrize("limit", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_bands_miss_one_pair_in_a_thousand_at_the_limit(limit: float) -> None:
    bands, rows = bands_and_rows(limit)
    assert (1 - limit**rows) ** bands <= 1e-3
    assert rows % 2 == 0  # half of each band from the question, half from the answer
    assert bands * rows <= 150


def test_jaccard_by_hand() -> None:
    one, other = shingles("a b c d e f"), shingles("a b c d e g")
    assert one == {tuple("abcde"), tuple("bcdef")}
    assert jaccard(one, other) == pytest.approx(1 / 3)
    assert jaccard(one, one) == 1
    assert jaccard(one, shingles("x y z v w")) == 0
    assert shingles("a b") == {("a", "b")}
    assert jaccard(shingles(""), shingles(" ")) == 1


def test_both_sides_of_the_limit() -> None:
    """Two shingles of three are common: 2 / 4."""
    texts = "a b c d e f g", "a b c d e f h"
    written = [Written(0, i, Row(prompt="?"), text, [1], True) for i, text in enumerate(texts)]
    assert jaccard(*map(shingles, texts)) == 0.5
    assert sift(written, 0.5) == [
        None,
        "duplicates: similarity 0.500 to answer 0 of prompt 0, at least 0.5",
    ]
    assert sift(written, 0.51) == [None, None]


def answer(prompt: str, text: str, index: int = 0) -> Written:
    return Written(index, 0, Row(prompt=prompt), text, [1], True)


def test_exact_duplicates_differ_in_white_space_alone() -> None:
    written = [
        answer("How  many?", "four of\nthem"),
        answer("How many?\n", " four of them", 1),
        answer("How many?", "Four of them", 2),
        answer("How many birds?", "four of them", 3),
    ]
    assert sift(written, 1.0) == [None, "duplicates: equals answer 0 of prompt 0", None, None]
    split = [answer("a b", "c"), answer("a", "b c", 1)]
    assert sift(split, 1.0) == [None, None]


def test_the_same_answer_to_other_questions_is_no_duplicate() -> None:
    questions = ["What is two and two?", "How many legs has a dog?", "What is the square of two?"]
    assert sift([answer(one, "4", i) for i, one in enumerate(questions)], 0.3) == [None] * 3


def test_other_answers_to_one_long_question_are_no_duplicates() -> None:
    """The usual mistake, question and answer as one text, would drop both of the later ones."""
    question = " ".join(WORDS)
    texts = ["it is twenty two", "no, it is only seven", "nobody has ever counted them"]
    written = [answer(question, text) for text in texts]
    assert sift(written, 0.8) == [None] * 3
    both = [shingles(f"{question} {text}") for text in texts]
    assert min(jaccard(one, other) for one, other in itertools.combinations(both, 2)) > 0.8


def test_the_first_stays_and_a_chain_is_not_followed() -> None:
    """The third is like the second, which is dropped, but not like the first."""
    words = [str(i) for i in range(40)]
    second, third = words[:20] + words[21:], words[:20] + words[21:30] + words[31:]
    written = [answer("?", text, i) for i, text in enumerate(map(" ".join, (words, second, third)))]
    alike = [
        jaccard(shingles(one.text), shingles(other.text)) for one, other in itertools.combinations(written, 2)
    ]
    first_second, first_third, second_third = alike
    assert first_third < 0.75 < min(first_second, second_third)
    assert [one is None for one in sift(written, 0.75)] == [True, False, True]
    assert [one is None for one in sift(written[1:], 0.75)] == [True, False]


def test_the_same_answers_fall_every_time() -> None:
    written = made_up(5, 100)
    assert sift(written, 0.6) == sift(list(written), 0.6)
