"""Which rank computes which micro-batches of a step.

A step is the same step on any number of ranks: the same rows, the same order, one update. Its micro-batches
are dealt out in turn; where there are fewer of them than ranks, each is cut into parts by rows first.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx

from mlx_distill.data.batch import Batch

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe


class HasBatches(Protocol):
    """Batches by number."""

    def __getitem__(self, index: int, /) -> Batch: ...


class Piece(NamedTuple):
    """Rows of a micro-batch that one rank computes."""

    number: int  # of this rank's pieces, over all steps
    micro_batch: int  # over all steps
    part: int = 0
    parts: int = 1
    idle: bool = False  # there are fewer pieces than ranks to take one

    def of(self, batch: Batch) -> Batch:
        """These rows of the micro-batch. Where there are none, one row without weight, for its shapes."""
        idle = self.idle or self.part >= len(batch.tokens)
        if not idle and self.parts == 1:
            return batch
        rows = slice(0, 1) if idle else slice(self.part, None, self.parts)
        tokens, labels, counted, weights, places = batch
        weights = mx.zeros_like(weights[rows]) if idle else weights[rows]
        return Batch(tokens[rows], labels[rows], counted[rows], weights, places[rows])


def adds_nothing(batch: Batch) -> bool:
    """Whether a batch is there for its shapes alone."""
    return not batch.weights.any().item()


class Deal:
    """How the steps of a training run are shared.

    Args:
        micro_batches: of a step.
        whole: micro-batches cannot be cut, since a loss depends on all of their rows together.
    """

    def __init__(self, rank: int, size: int, micro_batches: int, *, whole: bool = False):
        self.rank, self.size, self.micro_batches = rank, size, micro_batches
        self.parts = 1 if whole else -(-size // micro_batches)
        self.each = -(-micro_batches * self.parts // size)  # pieces of a rank in a step, idle ones included

    def pieces(self, step: int) -> Iterator[Piece]:
        """This rank's, in order."""
        first = (step - 1) * self.each
        for number in range(first, first + self.each):
            yield self.piece(number)

    def piece(self, number: int) -> Piece:
        step, turn = divmod(number, self.each)
        place = turn * self.size + self.rank  # among all pieces of the step
        idle = place >= self.micro_batches * self.parts
        index, part = divmod(0 if idle else place, self.parts)
        return Piece(number, step * self.micro_batches + index, part, self.parts, idle)

    def batches(self, batches: HasBatches) -> "Dealt":
        return Dealt(batches, self)


class Dealt:
    """The batches of this rank by the number of its pieces."""

    def __init__(self, batches: HasBatches, deal: Deal):
        self._batches, self._deal = batches, deal

    def __getitem__(self, number: int) -> Batch:
        piece = self._deal.piece(number)
        return piece.of(self._batches[piece.micro_batch])


def deal_of(recipe: "Recipe", rank: int, size: int) -> Deal:
    """How a recipe's training is shared."""
    # A loss that is weighed against the others of its batch is no sum over rows.
    whole = any(term.options.get("balanced") for term in recipe.objective.values())
    return Deal(rank, size, recipe.train.micro_batches, whole=whole)
