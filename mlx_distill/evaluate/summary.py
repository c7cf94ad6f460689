"""ROUGE: how much of a reference summary an answer shares with it (Lin 2004, without stemming).

`rouge1` and `rouge2` count the words and pairs of words in common, `rougeL` the longest common
subsequence; each is the F-measure of precision and recall, 0 to 1. The numbers are those of the
`rouge_score` package, which the tests compare with.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError

METRICS: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")


def rouge(rows: Sequence[Row], answers: Sequence[str]) -> tuple[dict[str, float | int], list[float]]:
    """Score each answer by the best of its row's references, for each metric on its own.

    Returns:
        the means `rouge1`, `rouge2` and `rougeL`, `rougeL_stderr` and `summaries`; and each row's rougeL.

    Raises:
        DataError: no rows, or a row with neither references nor a completion.
    """
    if not rows:
        raise DataError("ROUGE: no rows with references to score; give the test split some, or drop the task")
    scores = [score(answer, _references(row)) for row, answer in zip(rows, answers, strict=True)]
    number = len(scores)
    means = {name: sum(one[name] for one in scores) / number for name in METRICS}
    spread = sum((one["rougeL"] - means["rougeL"]) ** 2 for one in scores) / number
    metrics = {**means, "rougeL_stderr": math.sqrt(spread / number), "summaries": number}
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
