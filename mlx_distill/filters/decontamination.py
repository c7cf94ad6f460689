"""Answers that give away what the student will be measured on."""

import functools
from collections.abc import Iterable, Sequence

from mlx_distill.data.rows import Row
from mlx_distill.filters.material import Material
from mlx_distill.filters.words import asked, ngrams, plain_words
from mlx_distill.written import Written


def decontaminate(written: Sequence[Written], n: int, material: Material) -> list[str | None]:
    """Answers that share n words in a row with a held-out text, or whose prompts do.

    Memory goes with the held-out texts: each of their n-grams is held once.
    """
    held = ngrams_of(material.held_out, n)

    def first(text: str) -> str | None:
        return next((ngram for ngram in map(" ".join, ngrams(plain_words(text), n)) if ngram in held), None)

    @functools.cache
    def of_prompt(prompt: int) -> str | None:
        return next(filter(None, map(first, asked(row_of[prompt]))), None)

    def reason(one: Written) -> str | None:
        shared, place = of_prompt(one.prompt), "prompt"
        if shared is None:
            shared, place = first(one.text), "answer"
        return None if shared is None else f'the {place} has {n} words of {held[shared]}: "{shared}"'

    row_of = {one.prompt: one.row for one in written}
    return [reason(one) for one in written]


def ngrams_of(rows: Sequence[Row], n: int) -> dict[str, str]:
    """Every n words in a row of the held-out texts, joined by spaces -> where they first stand."""
    held: dict[str, str] = {}
    for row in rows:
        for text in texts_of(row):
            for ngram in ngrams(plain_words(text), n):
                held.setdefault(" ".join(ngram), row.origin)
    return held


def texts_of(row: Row) -> Iterable[str]:
    """All that a held-out row asks and all that says what is right, a text each: n-grams end with it."""
    return filter(None, [*asked(row), row.answer(), *row.references, *row.tests])
