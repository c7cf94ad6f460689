"""Answers that the teacher itself finds unlikely."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlx_distill.errors import DataError
from mlx_distill.filters.material import Material
from mlx_distill.written import Written

Nll = Callable[[Sequence[Written]], np.ndarray]


def perplexity(written: Sequence[Written], limit: float, material: Material) -> list[str | None]:
    """Answers whose perplexity under the teacher, e to the mean nats a token, is larger.

    Raises:
        DataError: there is neither a teacher to measure with nor what a server measured.
    """
    nats = mean_nll(written, material.nll)
    found = [math.exp(min(value, 700.0)) if not math.isnan(value) else math.nan for value in nats]
    # not (<=): an answer without a number was not found likely
    return [None if value <= limit else f"{value:.4g}, more than {limit:g}" for value in found]


def mean_nll(written: Sequence[Written], nll: Nll | None) -> np.ndarray:
    """Mean nats a token of each answer, (answers,) float64: the teacher's, else what the server gave.

    Raises:
        DataError: neither is there.
    """
    if nll is not None:
        return np.asarray(nll(written), dtype=np.float64)
    if any(one.mean_nll is None for one in written):
        raise DataError(
            "`generate.endpoint`: the server gave no log-probabilities; `generate.filters.perplexity` and "
            "`generate.keep` 'best' need them: leave those out, or let a teacher on this machine answer"
        )
    return np.array([one.mean_nll for one in written], dtype=np.float64)


def remembered(nll: Nll) -> Nll:
    """The same function, which measures each answer once: `perplexity` and `keep` ask for the same ones."""
    known: dict[tuple[int, int], float] = {}

    def measured(written: Sequence[Written]) -> np.ndarray:
        new = [one for one in written if (one.prompt, one.sample) not in known]
        if new:
            places = [(one.prompt, one.sample) for one in new]
            known.update(zip(places, map(float, nll(new)), strict=True))
        return np.array([known[one.prompt, one.sample] for one in written])

    return measured
