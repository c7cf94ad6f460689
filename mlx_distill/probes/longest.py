"""The largest batch that training can meet, made before the answers are written that will be in it."""

from itertools import cycle, islice
from typing import NamedTuple

from mlx_distill.asked import answered
from mlx_distill.data.batch import Batch, Encoded, make_batch, width_of
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode
from mlx_distill.learning import own_rows
from mlx_distill.lessons import Lessons, labels, lessons
from mlx_distill.work import Work

STATES = 1024  # positions of attention that take about the memory of all else that a layer keeps of a token


class Largest(NamedTuple):
    """A batch, and the rows that it is made of, as a training run would hold them."""

    batch: Batch
    learned: Lessons
    own: bool  # such rows are written by the student

    def told(self) -> str:
        rows, width = self.batch.tokens.shape
        return f"{rows} x {width} tokens"


def largest_batch(work: Work) -> Largest:
    """The batch that takes most memory: of the costliest shape that occurs, and of the longest rows in it.

    A question that is to be answered counts with an answer as long as one may be.
    """
    size, found = work.recipe.train.batch_tokens, list[tuple[int, Row, Encoded, bool]]()  # width, row, own
    if not work.recipe.all_own:
        known = known_lessons(work)
        rows = [*zip(known.rows, known.encoded, strict=True), *_longest_answer(work)]
        found = [(width_of(len(encoded.tokens)), row, encoded, False) for row, encoded in rows]
    if (own := own_rows(work, work.recipe)) is not None:
        width, encoded = own.largest()
        found.append((width, Row(), encoded, True))

    def cost(width: int) -> int:
        return max(1, size // width) * width * (STATES + width)

    widest = max((width for width, *_ in found), key=lambda width: (cost(width), width))
    count = max(1, size // widest)
    there = [one for one in found if one[0] == widest]
    there.sort(key=lambda one: (one[3], len(one[2].tokens)), reverse=True)
    there = there[:count]
    indices = tuple(islice(cycle(range(len(there))), count))
    batch = make_batch([there[i][2] for i in indices], pad_to=widest)._replace(rows=indices)
    nobody: list[int | None] = [None] * len(there)
    learned = Lessons([one[1] for one in there], [one[2] for one in there], ["train"] * len(there), nobody)
    return Largest(batch, learned, there[0][3])


def known_lessons(work: Work) -> Lessons:
    """The rows to learn from, without answers that nobody has written yet."""
    return lessons(work) if "generate" in work.run.stages() else labels(work)


def _longest_answer(work: Work) -> list[tuple[Row, Encoded]]:
    """The longest question of `data.prompts`, behind which it is repeated until no more is allowed."""
    prepared, recipe = work.prepared, work.recipe
    if not prepared.prompts or "generate" in work.run.stages():
        return []
    asked = max(prepared.prompts, key=lambda one: len(one.tokens))
    limit = min(recipe.data.max_tokens, len(asked.tokens) + recipe.generate.max_tokens + 1)
    text = asked.row.question() or "answer"
    each = len(encode(answered(asked.row, text), prepared.tokenizer).tokens) - len(asked.tokens)
    times, rest = divmod(limit - len(asked.tokens), max(1, each))
    foreign = bool(prepared.teachers) and prepared.teachers["teacher"].foreign
    # Two tokenizers have to read the same text, so there nothing can be cut off.
    row = answered(asked.row, " ".join([text] * max(1, times + (rest > 0 and not foreign))))
    encoded = encode(row, prepared.tokenizer, count=recipe.data.count)
    return [(row, encoded if foreign else encoded._replace(tokens=encoded.tokens[:limit]))]
