"""Answers that were given before, word for word or nearly.

Two answers are duplicates if their questions are alike and their answers are alike. Answers alone would
not do: "4" is right for many questions. Nor would both as one text: a long question would make all of its
answers alike.

How alike is Jaccard's similarity of two sets of shingles, 5 words that follow each other. To compare each
answer with all before it would take days, so candidates come from MinHash values (Broder 1997) that fall
into the same bucket of an index, half of the values made from the question and half from the answer. What
the index finds is compared exactly, so no answer falls to a false alarm; 1 pair in 1000 at the very limit
is missed, and far fewer above it.
"""

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlx_distill.errors import MissingExtra
from mlx_distill.filters.material import Material
from mlx_distill.filters.words import asked, ngrams, words_and_signs
from mlx_distill.written import Written

N = 5  # words of a shingle
MISSED = 1e-3  # of the pairs that are as alike as the limit
LEAST = 0.3  # smallest limit: below it the index would hold hundreds of buckets for each answer
_VALUES = 128  # MinHash values of an answer that are worth their memory

Shingles = frozenset[tuple[str, ...]]


def duplicates(written: Sequence[Written], limit: float, material: Material) -> list[str | None]:
    """Answers like an earlier one that is kept, from this similarity on, questions included.

    At 1 only those are dropped that differ in white space alone.

    Raises:
        MissingExtra: datasketch, which finds near duplicates, is not installed.
    """
    seen: dict[bytes, int] = {}
    first = [seen.setdefault(_digest(one), i) for i, one in enumerate(written)]
    different = list(seen.values())
    near: dict[int, str] = {}
    if limit < 1:
        with material.progress("near duplicates", len(different), "answers") as advance:
            for i, earlier, alike in _near([written[i] for i in different], limit, advance):
                like = _name(written[different[earlier]])
                near[different[i]] = f"similarity {alike:.3f} to answer {like}, at least {limit:g}"
    equal = (None if i == one else f"equals answer {_name(written[one])}" for i, one in enumerate(first))
    # A copy of an answer that is dropped itself is like whatever that one is like.
    return [near.get(one, reason) for one, reason in zip(first, equal, strict=True)]


def shingles(text: str) -> Shingles:
    """Every 5 words that follow each other, signs included; of a shorter text, the whole."""
    words = words_and_signs(text)
    return frozenset(ngrams(words, N)) if len(words) >= N else frozenset([tuple(words)])


def jaccard(one: Shingles, other: Shingles) -> float:
    """Size of the intersection, as a share of the union's."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _near(
    written: Sequence[Written], limit: float, advance: Callable[..., None]
) -> Iterable[tuple[int, int, float]]:
    """(answer, the earlier one that it is like, how alike), for each that is dropped, in order."""
    bands, rows = bands_and_rows(limit)
    datasketch = load_datasketch()
    index = datasketch.MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    empty = datasketch.MinHash(num_perm=bands * rows, seed=1, hashfunc=zlib.crc32)

    # The texts stay in memory, their shingles take ten times the room: only those of the latest few do.
    @functools.lru_cache(maxsize=4096)
    def question(prompt: int) -> Shingles:
        return shingles("\n".join(asked(row_of[prompt])))

    @functools.lru_cache(maxsize=4096)
    def answer(i: int) -> Shingles:
        return shingles(written[i].text)

    @functools.lru_cache(maxsize=4096)
    def sketch_of_question(prompt: int) -> Any:
        return _sketch(empty, question(prompt))

    row_of = {one.prompt: one.row for one in written}
    for i, one in enumerate(written):
        mixed = _sketch(empty, answer(i))
        mixed.hashvalues[::2] = sketch_of_question(one.prompt).hashvalues[::2]
        for earlier in sorted(index.query(mixed)):
            alike = min(
                jaccard(question(one.prompt), question(written[earlier].prompt)),
                jaccard(answer(i), answer(earlier)),
            )
            if alike >= limit:
                yield i, earlier, alike
                break
        else:
            index.insert(i, mixed, check_duplication=False)
        advance(1)


def bands_and_rows(limit: float) -> tuple[int, int]:
    """How the index cuts MinHash values into bands, each of so many values.

    Two answers meet if all values of a band agree, which is as likely as they are alike, to the power of
    the values. The most values a band that miss no more than `MISSED` within `_VALUES` values in all.
    """

    def bands(rows: int) -> int:
        return math.ceil(math.log(MISSED) / math.log1p(-(limit**rows)))

    rows = max([rows for rows in range(2, 17, 2) if rows * bands(rows) <= _VALUES], default=2)
    return max(bands(rows), 2), rows


def load_datasketch() -> Any:
    """The package.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import datasketch
    except ImportError:
        raise MissingExtra(
            "`generate.filters.duplicates` below 1 needs a package that is missing: "
            "pip install 'mlx-distill[filters]'"
        ) from None
    return datasketch


def _sketch(empty: Any, parts: Shingles) -> Any:
    sketch = empty.copy()
    sketch.update_batch(" ".join(part).encode("utf-8", "surrogatepass") for part in parts)
    return sketch


def _digest(one: Written) -> bytes:
    """Of question and answer, white space made alike."""
    parts = [" ".join(text.split()) for text in (*asked(one.row), one.text)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()


def _name(one: Written) -> str:
    return f"{one.sample} of prompt {one.prompt}"
