"""Which share of the rows that a student sees comes from each source."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mlx_distill.options import Data, Source


def learned_from(data: Data) -> dict[str, Source]:
    """The sources of rows to learn from, by their key in `data`."""
    named = {"train": data.train, "prompts": data.prompts}
    named |= {f"replay.{place}": source for place, source in enumerate(data.replay)}
    return {key: source for key, source in named.items() if source is not None}


def shares(sources: Sequence[str], weights: Mapping[str, float | None]) -> np.ndarray:
    """Share of all draws that each row gets, (rows,) float64, adding up to 1; alike within a source.

    The weight of a source is its share of the draws. Sources without one divide what is left by their
    numbers of rows. Where every source that is there has a weight, only their ratios count.

    Args:
        sources: of each row.
    """
    counts = Counter(sources)
    given = {source: weight for source in counts if (weight := weights.get(source)) is not None}
    open_rows = sum(count for source, count in counts.items() if source not in given)
    whole = sum(given.values()) if not open_rows else 1.0
    each = {source: weight / whole / counts[source] for source, weight in given.items()}
    left = (1.0 - sum(given.values())) / open_rows if open_rows else 0.0
    return np.array([each.get(source, left) for source in sources])
