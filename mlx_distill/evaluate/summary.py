"""Summaries: ROUGE, how long they are, how much of them is copied, and what is in them that nobody said.

ROUGE is how much of a reference an answer shares with it (Lin 2004, without stemming): `rouge1` and
`rouge2` count the words and pairs of words in common, `rougeL` the longest common subsequence; each is
the F-measure of precision and recall, 0 to 1. The numbers are those of the `rouge_score` package, which
the tests compare with; as there a word is a run of a-z and 0-9, so an accent parts words and other
scripts have none. The other measures count words of any script.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate.faithfulness import unfaithful
from mlx_distill.filters.words import ngrams, plain_words

METRICS: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")


COPIED = 4  # words in a row that count as copied


def rouge(rows: Sequence[Row], answers: Sequence[str]) -> tuple[dict[str, Any], list[float]]:
    """Score each answer by the best of its row's references, for each metric on its own.

    Returns:
        the means `rouge1`, `rouge2` and `rougeL`, and `summaries`; the means of
        `length_ratio`, `copy_rate` and `unfaithful` over the rows where each is defined, or None with
        `NAME_why` where it is on none; and each row's rougeL.

    Raises:
        DataError: no rows, or a row with neither references nor a completion.
    """
    if not rows:
        raise DataError("ROUGE: no rows with references to score; give the test split some, or drop the task")
    scores = [score(answer, _references(row)) for row, answer in zip(rows, answers, strict=True)]
    number = len(scores)
    means = {name: sum(one[name] for one in scores) / number for name in METRICS}
    metrics = {**means, "summaries": number} | _beside(rows, answers)
    return metrics, [one["rougeL"] for one in scores]


def score(answer: str, references: Sequence[str]) -> dict[str, float]:
    """`rouge1`, `rouge2` and `rougeL` of one answer, each by the reference that suits it best."""
    words = tuple(_words(answer))
    unlike = {tuple(_words(reference)) for reference in references}
    if words in unlike:
        unlike = {words}  # nothing scores higher
    pairs, subsequence = Counter(pairwise(words)), _Subsequence(words)
    singles = Counter(words)
    best = dict.fromkeys(METRICS, 0.0)
    for reference in unlike:
        reference_pairs = Counter(pairwise(reference))
        for name, common, of_answer, of_reference in (
            ("rouge1", _common(singles, Counter(reference)), len(words), len(reference)),
            ("rouge2", _common(pairs, reference_pairs), len(words) - 1, len(reference) - 1),
            ("rougeL", subsequence.length(reference), len(words), len(reference)),
        ):
            if common:
                precision, recall = common / of_answer, common / of_reference
                best[name] = max(best[name], 2 * precision * recall / (precision + recall))
    return best


def length_ratio(answer: str, references: Sequence[str]) -> float | None:
    """Words of the answer, by those of the reference that is nearest in length, the shorter one of two.

    None: no reference has a word.
    """
    words = len(plain_words(answer))
    lengths = [length for length in map(len, map(plain_words, references)) if length]
    return words / min(lengths, key=lambda length: (abs(length - words), length)) if lengths else None


def copy_rate(answer: str, source: str) -> float | None:
    """The share of the answer's runs of four words that stand in the source: 1 - novel 4-grams, as See et
    al. 2017 (arXiv 1704.04368, figure 6) have it.

    None: the answer has fewer words.
    """
    runs = list(ngrams(plain_words(answer), COPIED))
    there = {*ngrams(plain_words(source), COPIED)}
    return sum(run in there for run in runs) / len(runs) if runs else None


def _beside(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Any]:
    """What ROUGE does not see, each a mean over the rows where it is defined."""
    pairs = list(zip(rows, answers, strict=True))
    found = {
        "length_ratio": ([length_ratio(a, _references(row)) for row, a in pairs], "no reference has a word"),
        "copy_rate": ([copy_rate(a, row.question()) for row, a in pairs], f"no answer has {COPIED} words"),
        "unfaithful": ([unfaithful(a, row.question()) for row, a in pairs], "no answer has a name or number"),
    }
    metrics: dict[str, Any] = {}
    for name, (values, why) in found.items():
        defined = [value for value in values if value is not None]
        metrics |= {name: fmean(defined)} if defined else {name: None, f"{name}_why": why}
    return metrics


def _references(row: Row) -> Sequence[str]:
    if row.references:
        return row.references
    if row.completion is None:
        raise DataError(f"{row.origin}: neither `references` nor a `completion` to judge by; add one")
    return (row.completion,)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _common(one: Counter, other: Counter) -> int:
    return (one & other).total()


class _Subsequence:
    """Longest common subsequence with one fixed sequence, a bit for each of its words (Hyyrö 2004).

    A clear bit in `rest` marks a place where the subsequence grows, and an addition moves all places at
    once: a reference costs as many steps as it has words, however long the answer.
    """

    def __init__(self, words: Sequence[str]):
        self.full = (1 << len(words)) - 1
        self.places: dict[str, int] = {}
        for index, word in enumerate(words):
            self.places[word] = self.places.get(word, 0) | 1 << index

    def length(self, other: Sequence[str]) -> int:
        rest = self.full
        for word in other:
            here = rest & self.places.get(word, 0)
            rest = (rest + here | rest - here) & self.full
        return (~rest & self.full).bit_count()
