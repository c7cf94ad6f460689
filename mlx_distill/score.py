"""How likely a model finds what is written: the mean surprise of each row."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.data.batch import Encoded, at_places, counted_places, in_order, make_batch
from mlx_distill.losses.targets import log_softmax
from mlx_distill.progress import Progress, silent

NUMBERS = 2**24  # of logits made at once: 64 MiB in float32


def nll_of_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    title: str = "scores",
    progress: Progress = silent,
) -> np.ndarray:
    """Mean nats a counted token of each row, (rows,) float64, the model in eval mode.

    The batches depend on the rows alone, so the same rows give the same bits.

    Args:
        vocabulary: logits beyond it are cut.
    """
    model.eval()
    caller: Any = model
    means = np.zeros(len(rows))
    with progress(title, len(rows), "rows") as advance:
        for indices in in_order(rows, max(NUMBERS // vocabulary, 64)):
            batch = make_batch([rows[i] for i in indices])
            places = counted_places(batch)
            logits = at_places(caller(batch.tokens)[..., :vocabulary], places)
            labels = at_places(batch.labels, places)
            log_p = mx.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[0, :, 0]
            counts = [len(rows[i].tokens) - rows[i].start for i in indices]
            lost = -np.array(log_p, dtype=np.float64)[: sum(counts)]
            for i, part in zip(indices, np.split(lost, np.cumsum(counts)[:-1]), strict=True):
                means[i] = part.mean()
            advance(len(indices))
    return means
