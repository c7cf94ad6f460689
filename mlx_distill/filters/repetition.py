"""Answers that say the same again and again, found without a reference."""

from collections.abc import Sequence

from mlx_distill.filters.material import Material
from mlx_distill.filters.words import ngrams, words_and_signs
from mlx_distill.written import Written

N = 4


def repetition(written: Sequence[Written], limit: float, material: Material) -> list[str | None]:
    """Answers of which a larger share of words repeats what stood before."""
    shares = [repeated_share(one.text) for one in written]
    return [
        f"{share:.1%} of the words repeat, more than {limit:.1%}" if share > limit else None
        for share in shares
    ]


def repeated_share(text: str) -> float:
    """Share of words that lie in a 4-gram which stood before in the text; 0 for fewer than 5 words.

    A text said twice has 1/2, one said k times (k - 1) / k. Signs are words here: a model that runs away
    may do so in brackets. Near to it are the shares of characters in duplicate n-grams, n from 5 on, that
    Rae et al. 2021 (Gopher, table A1) limit for web pages.
    """
    words = words_and_signs(text)
    before: set[tuple[str, ...]] = set()
    repeated = bytearray(len(words))
    for i, ngram in enumerate(ngrams(words, N)):
        if ngram in before:
            repeated[i : i + N] = b"\1" * N
        before.add(ngram)
    return sum(repeated) / max(len(words), 1)
