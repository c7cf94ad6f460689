"""Which rows come when, by how difficult they are.

The rows of a source (all rows, where no source has a weight) stand in a line from the easiest to the most
difficult, and a pace says how often each is drawn in each part of the run. Only the order of difficulties
counts; equal ones are put in random order.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from mlx_distill.data.drawn import Rates
from mlx_distill.keys import generator
from mlx_distill.options import Curriculum


def ranks(difficulties: np.ndarray, seed: int, *, reverse: bool = False) -> np.ndarray:
    """Place of each row in the line, (rows,) of 0 to rows - 1; 0 is the easiest, or else the hardest."""
    lots = generator(seed, "equally difficult").permutation(len(difficulties))
    order = np.lexsort((lots, -difficulties if reverse else difficulties))
    found = np.empty(len(order), dtype=np.int64)
    found[order] = np.arange(len(order))
    return found


def paced(
    options: Curriculum,
    difficulties: np.ndarray,
    shares: np.ndarray,
    sources: Sequence[str],
    costs: np.ndarray,
    seed: int,
) -> Rates:
    """The rates of `DrawnBatches` under a curriculum. A source keeps its share throughout.

    Args:
        difficulties: of each row. shares: of all draws that its source has, divided by the source's rows.
        sources: of each row; each has a line of its own.
        costs: tokens that a row takes up in a batch.
    """
    lines = [np.flatnonzero(np.array(sources) == source) for source in sorted(set(sources))]
    placed = [(line, ranks(difficulties[line], seed, reverse=options.reverse)) for line in lines]

    def rates(start: float, stop: float) -> np.ndarray:
        found = np.zeros(len(shares))
        for line, places in placed:
            found[line] = shares[line] * _relative(options, places, start, stop)
        # Parts of a competence are equal numbers of batches, as steps are; of the others, of rows.
        return found / (found @ costs) if options.pace == "competence" else found

    return rates


def _relative(options: Curriculum, places: np.ndarray, start: float, stop: float) -> np.ndarray:
    """How often a row is drawn in a part of the run, beside the mean of 1, by its place in the line."""
    rows = len(places)
    match options.pace:
        case "sorted":
            begin, end = places / rows, (places + 1) / rows
            inside = np.clip(np.minimum(end, stop) - np.maximum(begin, start), 0, None)
            return inside * rows / (stop - start)
        case "competence":
            allowed = places < competence(start, options.start, options.until) * rows
            return allowed * (rows / allowed.sum())
        case "weighted":
            return 2 * (places + 1) / (rows + 1)


def competence(done: float, start: float, until: float) -> float:
    """Share of the rows, the easiest first, that is drawn from.

    The square root of Platanios et al. 2019, arXiv 1903.09848: new rows come at a rate that falls with the
    number of those that are there.

    Args:
        done: share of the steps. start: the competence at the first. until: share of the steps after
            which it is 1.
    """
    return min(1.0, sqrt(done * (1 - start**2) / until + start**2))
