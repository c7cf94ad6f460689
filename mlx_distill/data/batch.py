"""From encoded rows to batches: the one place that shifts, pads, masks and orders.

Behind `make_batch`, tokens, labels and `counted` have one shape, and nobody shifts again.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_distill.keys import generator

PLACES_TO = 128  # numbers of counted places are multiples of this, for the same reason
PAD_TO = 16  # widths are multiples of this: few shapes, so few traces of a compiled step


class Encoded(NamedTuple):
    """A row as token ids."""

    tokens: list[int]  # prompt and completion together
    start: int  # index of the first counted token, >= 1
    weight: float = 1.0  # of each of its counted tokens in the loss


class Batch(NamedTuple):
    """What models read and losses count."""

    tokens: mx.array  # (B, T) int32
    labels: mx.array  # (B, T) int32, labels[:, t] follows tokens[:, t]
    counted: mx.array  # (B, T) bool, True where the label belongs to a completion
    weights: mx.array  # (B, T) float32, the weight of each counted label; 0 elsewhere
    rows: tuple[int, ...] = ()  # which rows of `Batches` these are, for what is stored row by row


def make_batch(rows: Sequence[Encoded], pad_to: int = PAD_TO) -> Batch:
    """Shift, pad and mask. Padding is known by its place, never by its token id.

    Args:
        rows: at least one, each of two tokens or more.
        pad_to: the width is rounded up to a multiple of this.
    """
    width = width_of(max(len(row.tokens) for row in rows), pad_to)
    padded = np.zeros((len(rows), width + 1), dtype=np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row.tokens)] = row.tokens
    index = np.arange(1, width + 1)[None]  # place in its row of each label
    starts = np.array([row.start for row in rows])[:, None]
    ends = np.array([len(row.tokens) for row in rows])[:, None]
    counted = (index >= starts) & (index < ends)
    arrays: list[Any] = [padded[:, :-1], padded[:, 1:], counted]
    tokens, labels, counts = (mx.array(array) for array in arrays)
    weights = counts * mx.array([row.weight for row in rows], dtype=mx.float32)[:, None]
    return Batch(tokens, labels, counts, weights)


def counted_places(batch: Batch) -> mx.array:
    """Where the counted labels are in the flattened batch, (N,) int32.

    N is rounded up to a multiple of `PLACES_TO`; the places that fill it up are -1.
    """
    places = np.flatnonzero(np.array(batch.counted)).astype(np.int32)
    return mx.array(np.pad(places, (0, -len(places) % PLACES_TO), constant_values=-1))


def at_places(values: mx.array, places: mx.array) -> mx.array:
    """What a (B, T, ...) array holds at the places, as (1, N, ...); a place of -1 holds anything."""
    return values.reshape(-1, *values.shape[2:])[mx.maximum(places, 0)][None]


def place_weights(batch: Batch, places: mx.array) -> mx.array:
    """The weight of each counted place, (1, N) float32; 0 where N was filled up."""
    return mx.where(places >= 0, at_places(batch.weights[..., None], places)[..., 0], 0)


class Batches:
    """An endless, indexable sequence of batches of about `batch_tokens` tokens each.

    Batch i is a function of the rows, the seed and i alone, so a resumed run needs no more than i.
    Rows of like length share a batch. What is left over in a width joins the next wider one, and the
    last batch is filled up with rows drawn again, so that every step is of full size and each width
    has one shape. Within an epoch each row comes once; or several times, equally often, where there
    are so few rows that leftovers would be much of it: a step then holds as many tokens, padding
    aside, as a step over many rows.
    """

    def __init__(self, rows: Sequence[Encoded], batch_tokens: int, seed: int, purpose: str = "order"):
        if not rows:
            raise ValueError("no rows to make batches of")
        self.rows, self.batch_tokens, self.seed, self.purpose = rows, batch_tokens, seed, purpose
        sizes = [self.size(width) for width in {width_of(len(row.tokens)) for row in rows}]
        self.passes = -(-8 * sum(sizes) // len(rows))
        self._epoch = -1
        self._order: list[tuple[int, list[int]]] = []
        self.per_epoch = len(self._plan(0))

    def __getitem__(self, index: int) -> Batch:
        width, indices = self.plan(index)
        return make_batch([self.rows[i] for i in indices], pad_to=width)._replace(rows=tuple(indices))

    def plan(self, index: int) -> tuple[int, list[int]]:
        """Width and indices into `rows` of a batch."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._plan(epoch)
        return self._order[place]

    def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        """Width and indices into `rows` of each batch of an epoch."""
        random = generator(self.seed, self.purpose, epoch)
        by_width: dict[int, list[int]] = defaultdict(list)
        for _ in range(self.passes):
            for i in random.permutation(len(self.rows)).tolist():
                by_width[width_of(len(self.rows[i].tokens))].append(i)
        batches: list[tuple[int, list[int]]] = []
        left: list[int] = []
        for width in sorted(by_width):
            pool, size = left + by_width[width], self.size(width)
            full = len(pool) - len(pool) % size
            batches += [(width, pool[at : at + size]) for at in range(0, full, size)]
            left = pool[full:]
        if left:
            widest = max(by_width)
            missing = self.size(widest) - len(left)
            batches.append((widest, left + random.integers(len(self.rows), size=missing).tolist()))
        return [batches[i] for i in random.permutation(len(batches)).tolist()]

    def size(self, width: int) -> int:
        """Rows in a batch of this width: at least one, however long it is."""
        return max(1, self.batch_tokens // width)


def in_order(rows: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
    """Indices of rows in batches for evaluation: every row once, by length, no row drawn again."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    batches: list[list[int]] = []
    for i in order:
        width = width_of(len(rows[i].tokens))
        if batches and (len(batches[-1]) + 1) * width <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def width_of(length: int, pad_to: int = PAD_TO) -> int:
    """Width of a batch for a row of `length` tokens; the last token is a label only."""
    return pad_to * -(-(length - 1) // pad_to)
