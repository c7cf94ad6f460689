"""What several answers to each problem say of a model: means over problems, and pass@k."""

import math
from collections.abc import Sequence

import numpy as np

MOST = (5, 10)  # the k of pass@k beside 1, as far as there are as many answers


def mean_stderr(scores: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the mean over problems, each counted once, whatever the number of its answers.

    The answers to one problem are no independent problems: counted as such, the error would shrink with
    every further answer, while the problems stay as few as they are.

    Args:
        scores: a list of scores for each problem; with one answer of 0 or 1 each and share s of ones, the
            result is √(s (1-s) / (problems - 1)). One problem has none.
    """
    means = np.array([np.mean(one) for one in scores], dtype=np.float64)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def pass_at(k: int, scores: Sequence[Sequence[float]]) -> float:
    """The chance that at least one of k answers passes, the mean over problems.

    With n answers to a problem of which c pass it is 1 - C(n-c, k) / C(n, k), unbiased for k <= n (Chen et
    al. 2021, arXiv 2107.03374, equation 1). 1 - (1 - c/n)^k, the usual mistake, is too low.

    Args:
        scores: 1.0 for each answer that passes, 0.0 for another; a list for each problem.
    """
    found = []
    for one in scores:
        n, c = len(one), round(sum(one))
        found.append(1 - math.comb(n - c, k) / math.comb(n, k))
    return float(np.mean(found))
