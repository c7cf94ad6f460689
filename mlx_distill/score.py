"""How likely a model finds what is written, row by row."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.data.batch import Encoded, at_places, counted_places, in_order, make_batch
from mlx_distill.losses.targets import log_softmax
from mlx_distill.progress import Progress, silent

NUMBERS = 2**24  # of logits made at once: 64 MiB in float32


class Read(NamedTuple):
    """What a model makes of the counted places of a batch; behind those of the rows come some that pad."""

    indices: list[int]  # of the rows
    counts: list[int]  # counted places of each
    logits: mx.array  # (N, V)
    labels: mx.array  # (N,) int32

    def log_likelihoods(self) -> mx.array:
        """Of each label, (N,) float32 nats."""
        return mx.take_along_axis(log_softmax(self.logits), self.labels[:, None], axis=-1)[:, 0]

    def by_row(self, values: mx.array) -> list[tuple[int, np.ndarray]]:
        """Values (N,) taken apart: the index of each row and what is its own."""
        own = np.array(values)[: sum(self.counts)]
        return list(zip(self.indices, np.split(own, np.cumsum(self.counts)[:-1]), strict=True))


def read_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    title: str = "scores",
    progress: Progress = silent,
) -> Iterator[Read]:
    """What a model in eval mode makes of rows with one counted token or more, a batch at a time.

    The batches depend on the rows alone, so the same rows give the same bits.

    Args:
        vocabulary: logits beyond it are cut.
    """
    model.eval()
    caller: Any = model
    with progress(title, len(rows), "rows") as advance:
        for indices in in_order(rows, max(NUMBERS // vocabulary, 64)):
            batch = make_batch([rows[i] for i in indices])
            places = counted_places(batch)
            logits = at_places(caller(batch.tokens)[..., :vocabulary], places)[0]
            counts = [len(rows[i].tokens) - rows[i].start for i in indices]
            yield Read(indices, counts, logits, at_places(batch.labels, places)[0])
            advance(len(indices))


def nll_of_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    title: str = "scores",
    progress: Progress = silent,
) -> np.ndarray:
    """Mean nats a counted token of each row, (rows,) float64. Arguments as of `read_rows`."""
    means = np.zeros(len(rows))
    for read in read_rows(model, rows, vocabulary, title=title, progress=progress):
        for i, found in read.by_row(read.log_likelihoods()):
            means[i] = -found.astype(np.float64).mean()
    return means


def log_likelihoods(
    model: nn.Module,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    title: str = "scores",
    progress: Progress = silent,
) -> list[tuple[float, bool]]:
    """Log-probability of each row's counted tokens together, in nats, and whether all were the likeliest."""
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for read in read_rows(model, rows, vocabulary, title=title, progress=progress):
        log_q, right = read.log_likelihoods(), mx.argmax(read.logits, axis=-1) == read.labels
        mx.eval(log_q, right)
        both = zip(read.by_row(log_q), read.by_row(right), strict=True)
        for (i, found), (_, likeliest) in both:
            results[i] = float(found.astype(np.float64).sum()), bool(likeliest.all())
    return results
