"""How likely a model finds continuations, and whether it would write them itself."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.data.batch import Encoded, at_places, counted_places, in_order, make_batch
from mlx_distill.losses.targets import log_softmax
from mlx_distill.progress import Progress, silent
from mlx_distill.score import NUMBERS


def log_likelihoods(
    model: nn.Module, rows: Sequence[Encoded], vocabulary: int, progress: Progress = silent
) -> list[tuple[float, bool]]:
    """Log-probability of each row's counted tokens together, in nats, and whether all were the likeliest.

    Args:
        rows: with at least one counted token each.
        vocabulary: logits beyond it are cut.
    """
    model.eval()
    caller: Any = model
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    with progress("harness: log-likelihoods", len(rows), "rows") as advance:
        for indices in in_order(rows, max(NUMBERS // vocabulary, 64)):
            batch = make_batch([rows[i] for i in indices])
            places = counted_places(batch)
            logits = at_places(caller(batch.tokens)[..., :vocabulary], places)
            labels = at_places(batch.labels, places)
            log_q = mx.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[0, :, 0]
            right = mx.argmax(logits, axis=-1)[0] == labels[0]
            mx.eval(log_q, right)
            counts = [len(rows[i].tokens) - rows[i].start for i in indices]
            ends = np.cumsum(counts)
            values = np.split(np.array(log_q, dtype=np.float64)[: ends[-1]], ends[:-1])
            likeliest = np.split(np.array(right)[: ends[-1]], ends[:-1])
            for i, value, greedy in zip(indices, values, likeliest, strict=True):
                results[i] = float(value.sum()), bool(greedy.all())
            advance(len(indices))
    return results
