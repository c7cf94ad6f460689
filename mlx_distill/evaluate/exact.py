"""Exact match: the share of answers that equal a reference.

White space at both ends is dropped and every other run of it counts as one space; nothing else is forgiven,
neither case nor punctuation. Worked steps are no part of an answer: `reasoning.split` takes them off before.
"""

from collections.abc import Sequence

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError


def exact_match(rows: Sequence[Row], answers: Sequence[str]) -> tuple[dict[str, float], list[float]]:
    """Compare each answer with the references of its row, any of which is right.

    Returns:
        `exact_match`, the share that is right; and 1 or 0 for each row.

    Raises:
        DataError: no rows, or a row without `references`.
    """
    if not rows:
        raise DataError("exact match: no rows with `references`; give the test split some, or drop the task")
    scores = [score(row, answer) for row, answer in zip(rows, answers, strict=True)]
    return {"exact_match": sum(scores) / len(scores)}, scores


def score(row: Row, answer: str) -> float:
    if not row.references:
        raise DataError(f"{row.origin}: no `references` to compare an answer with; add one")
    return float(any(equal(answer, reference) for reference in row.references))


def equal(answer: str, reference: str) -> bool:
    """Whether two texts differ at most in how much white space there is, and not in where."""
    return answer.split() == reference.split()
