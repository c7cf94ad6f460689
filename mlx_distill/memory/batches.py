"""Which shapes of batches a run meets: each takes buffers of its own, which the allocator keeps."""

from collections.abc import Sequence
from typing import NamedTuple

from mlx_distill.data.batch import PAD_TO, PLACES_TO, Batches, Encoded, in_order, width_of
from mlx_distill.options import Train

LOOKED_AT = 256  # batches whose shapes are counted
MOST = 20_000  # rows that are put into batches for that: others are like them


class Shape(NamedTuple):
    """What makes one batch take other memory than another."""

    rows: int
    width: int
    places: int  # counted labels

    @property
    def tokens(self) -> int:
        return self.rows * self.width


def largest(options: Train, longest: int) -> Shape:
    """A batch of which no more is known than the options of a recipe say."""
    width = width_of(longest + 1)
    rows = max(1, options.batch_tokens // width)
    return Shape(rows, width, rows * width)


def of_training(rows: Sequence[Encoded], options: Train, seed: int) -> list[Shape]:
    """Shapes of the first batches, each once, in any order.

    Those of rows that come equally often: weights and curricula draw from the same widths.
    """
    rows = rows[:: 1 + len(rows) // MOST]
    batches = Batches(rows, options.batch_tokens, seed)
    count = min(options.steps * options.micro_batches, LOOKED_AT)
    return _shapes(rows, [batches.plan(index) for index in range(count)])


def of_answers(questions: Sequence[int], answer: int, longest: int, options: Train) -> list[Shape]:
    """Shapes of batches of answers that nobody has written yet.

    Args:
        questions: tokens of each. answer: most tokens of one. longest: most tokens of a row.
    """
    # Half of what it may have is taken for the usual answer, and any length for a possible one.
    short, long = min(questions), min(max(questions) + answer, longest)
    widths = range(width_of(short + answer // 4 + 1), width_of(long + 1) + 1, PAD_TO)
    found = []
    for width in widths:
        rows = max(1, options.batch_tokens // width)
        found.append(Shape(rows, width, _rounded(rows * min(answer, width) // 2)))
    return found[-options.steps * options.micro_batches :]


def of_own(questions: Sequence[int], answer: int, options: Train) -> list[Shape]:
    """Shapes of batches that the student writes itself: of so many answers one is as long as it may be."""
    found = set()
    for asked in questions:
        width = width_of(asked + answer + 1)
        rows = max(1, options.batch_tokens // width)
        found.add(Shape(rows, width, _rounded(rows * answer)))
    return sorted(found)[-options.steps * options.micro_batches :]


def of_measuring(rows: Sequence[Encoded], tokens: int, places_to: int = 1) -> list[Shape]:
    """Shapes of the batches in which a model is measured, each once."""
    rows = rows[:: 1 + len(rows) // MOST]
    plans = []
    for indices in in_order(rows, tokens):
        plans.append((width_of(max(len(rows[i].tokens) for i in indices)), indices))
    return _shapes(rows, plans, places_to)


def _shapes(
    rows: Sequence[Encoded], plans: Sequence[tuple[int, Sequence[int]]], places_to: int = PLACES_TO
) -> list[Shape]:
    found = set()
    for width, indices in plans:
        places = sum(len(rows[i].tokens) - rows[i].start for i in indices)
        found.add(Shape(len(indices), width, _rounded(places, places_to)))
    return sorted(found)


def _rounded(places: int, to: int = PLACES_TO) -> int:
    return to * -(-places // to)
