"""Batches in which every row comes at a rate of its own: a mixture of sources, a curriculum, or both.

`Batches` takes every row equally often, epoch by epoch. Here a run has parts, and each row a rate in each
of them. Draws are spread evenly instead of left to luck: after every part a row was drawn as often as its
rates add up to, rounded up or down, and so were all rows of a source together, where their rates are equal.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mlx_distill.data.batch import Batch, Encoded, make_batch, width_of
from mlx_distill.keys import generator

PARTS = 100  # of a run, at most
FEWEST = 8  # batches that rows of one width must fill in a run; fewer rows join the next wider ones

# From and to which share of the run -> how often each row is drawn in that part of it, (rows,) float64, up to
# a factor that is the same for all rows and parts.
Rates = Callable[[float, float], np.ndarray]


def steady(rates: np.ndarray) -> Rates:
    """The same rates in every part of a run."""
    return lambda start, stop: rates


class DrawnBatches:
    """The batches of one run, of about `batch_tokens` tokens each.

    Batch i is a function of the arguments and i alone, so a resumed run needs no more than i. Rows of like
    length share a batch of full size. A drawn row waits until its batch is full, so it may come some
    batches later than the part of the run that drew it.

    Args:
        total: batches of the run. There are no others.
        rates: of the rows in each part of the run; not all 0.
        sources: where each row comes from.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        batch_tokens: int,
        seed: int,
        *,
        total: int,
        rates: Rates,
        sources: Sequence[str],
    ):
        if not rows:
            raise ValueError("no rows to make batches of")
        self.rows, self.batch_tokens, self.seed = rows, batch_tokens, seed
        self._sources = [np.flatnonzero(np.array(sources) == source) for source in sorted(set(sources))]
        self._plan = self._planned(total, rates)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Batch:
        width, found = self._plan[index]
        indices = found.tolist()
        return make_batch([self.rows[i] for i in indices], pad_to=width)._replace(rows=tuple(indices))

    def size(self, width: int) -> int:
        """Rows in a batch of this width: at least one, however long it is."""
        return max(1, self.batch_tokens // width)

    def _planned(self, total: int, rates: Rates) -> list[tuple[int, np.ndarray]]:
        """Width and indices into `rows` of each batch."""
        parts = min(PARTS, total)
        spans = [(part / parts, (part + 1) / parts) for part in range(parts)]
        whole = np.sum([rates(*span) for span in spans], axis=0)
        widths = self._widths(whole, total)
        share = whole / np.array([self.size(width) for width in widths.tolist()])  # of a batch
        waiting = {width: np.zeros(0, dtype=np.int64) for width in sorted(set(widths.tolist()))}
        scale = (total + len(waiting) / 2) / share.sum()  # half a batch of each width still waits at the end
        due, drawn = np.zeros(len(self.rows)), np.zeros(len(self.rows), dtype=np.int64)
        plan: list[tuple[int, np.ndarray]] = []
        part = 0
        while len(plan) < total:
            due += scale * rates(*spans[min(part, parts - 1)])
            now, random = self._drawn(due), generator(self.seed, "drawn", part)
            new = random.permutation(np.repeat(np.arange(len(due)), now - drawn))
            batches: list[tuple[int, np.ndarray]] = []
            for width, before in waiting.items():
                queue, size = np.concatenate([before, new[widths[new] == width]]), self.size(width)
                full = len(queue) - len(queue) % size
                batches += [(width, queue[at : at + size]) for at in range(0, full, size)]
                waiting[width] = queue[full:]
            plan += [batches[place] for place in random.permutation(len(batches)).tolist()]
            drawn, part = now, part + 1
        return plan[:total]

    def _widths(self, often: np.ndarray, total: int) -> np.ndarray:
        """The width at which each row is read, when rows of the same width are drawn `often` enough."""
        widths = np.array([width_of(len(row.tokens)) for row in self.rows])
        there = np.unique(widths).tolist()
        filled = {width: often[widths == width].sum() / self.size(width) for width in there}
        scale = total / sum(filled.values())
        found, first = widths.copy(), 0
        for place, width in enumerate(there):
            if scale * sum(filled[one] for one in there[first : place + 1]) >= FEWEST:
                found[(widths >= there[first]) & (widths <= width)] = width
                first = place + 1
        if first < len(there):  # too few of the widest: the next narrower ones join them
            last = found[widths < there[first]].max(initial=0)
            found[(widths >= there[first]) | (found == last)] = there[-1]
        return found

    def _drawn(self, due: np.ndarray) -> np.ndarray:
        """How often each row was drawn when `due` are due, (rows,): each rounded up or down.

        Between two whole numbers of draws the rows of a source have their turns in an order that is another
        for each number.
        """
        drawn = np.floor(due).astype(np.int64)
        rest = due - drawn
        for number, indices in enumerate(self._sources):
            counts = drawn[indices]
            for count in np.unique(counts).tolist():
                order = generator(self.seed, f"turns of source {number}", count).permutation(len(indices))
                drawn[indices] += (counts == count) & (rest[indices] * len(indices) > order + 0.5)
        return drawn
