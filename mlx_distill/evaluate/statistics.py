"""Whether one model is better than another on the same problems: a paired bootstrap and what it says.

The problems are what varies: they are drawn anew, each with the answers of both models to it (Efron &
Tibshirani 1993, chapters 8 and 13; Koehn 2004 and Berg-Kirkpatrick et al. 2012 on language). Of the
intervals that the bootstrap knows, and of what must be added to it for few problems, simulation chose:
`benchmarks/verdict_simulation.py` and docs/evaluation.md.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.keys import generator
from mlx_distill.metrics import METRICS, SCORES, ordered

LEVEL = 0.95
FEWEST = 6  # problems: of fewer, even all in favour of one model are no evidence (2 * 0.5**5 > 1 - LEVEL)
_HELD = 2**18  # numbers of resampling weights held at once, 2 MiB


class Interval(NamedTuple):
    """How far one model lies above another; `low` and `high` hold 0 unless the two were told apart."""

    problems: int  # that count, in the model in which fewer do
    difference: float  # one - other
    stderr: float | None  # of the difference; None with `low` and `high`: too few problems
    low: float | None
    high: float | None
    p: float  # of a difference so large, were the two models' answers swapped at random


def paired(
    one: np.ndarray, other: np.ndarray, *, seed: int, resamples: int = 10_000, passes: bool = False
) -> Interval | None:
    """The difference of two models' ratios of sums, with its 95 % interval; the same in every call.

    Args:
        one, other: (N, 2) float64, the sum and the count of each problem, in the same order. A mean over
            problems counts each once; a mean over tokens counts each problem's tokens.
        passes: the sums are shares of answers that pass, 0 to 1, see `intervals`.

    Returns:
        None where a model has nothing that counts, or a number that is not finite.

    Raises:
        ValueError: the two are not of the same shape (N, 2).
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.shape != other.shape or one.ndim != 2 or one.shape[1] != 2:
        raise ValueError(f"(N, 2) sums and counts of the same problems twice; got {one.shape}, {other.shape}")
    counts = (one[:, 1] > 0) | (other[:, 1] > 0)
    one, other = one[counts], other[counts]
    if not (one[:, 1].any() and other[:, 1].any() and np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    found = intervals(one[None], other[None], seed=seed, resamples=resamples, passes=passes)
    difference, stderr, low, high, p = (float(values[0]) for values in found)
    problems = int(min((one[:, 1] > 0).sum(), (other[:, 1] > 0).sum()))
    if problems < FEWEST:
        return Interval(problems, difference, None, None, None, p)
    return Interval(problems, difference, stderr, low, high, p)


def intervals(
    one: np.ndarray, other: np.ndarray, *, seed: int, resamples: int, passes: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `paired` says, of M pairs of models on N problems at once.

    The interval has the bootstrap's quantiles, moved outwards as Student's t is wider than the normal
    distribution (the expanded percentile interval of Hesterberg 2015, arXiv 1411.5279). Shares of answers
    that pass get two made-up problems, one that only this model passes and one that only the other does
    (after Agresti & Min 2005, Statistics in Medicine 24, 729): models that agree on all of 20 problems may
    differ on the 21st.

    An interval that leaves out 0 is stretched to it unless p < 5 %. Of models that are alike, each problem's
    answers could as well be the other's, so p is right however few or odd the numbers; on passes and fails it
    is the exact test of McNemar.

    Args:
        one, other: (M, N, 2), as in `paired`.

    Returns:
        difference, stderr, low, high and p, each (M,).
    """
    difference = _ratio(one.sum(1)) - _ratio(other.sum(1))
    drawn = [one, other]
    if passes:
        made_up = np.broadcast_to([[1.0, 1.0], [0.0, 1.0]], (len(one), 2, 2))
        drawn = [np.concatenate([one, made_up], 1), np.concatenate([other, made_up[:, ::-1]], 1)]
    first, second = np.split(_resampled(np.concatenate(drawn), seed, resamples), 2, axis=1)
    with np.errstate(invalid="ignore"):  # a resample in which nothing counts is left out
        found = _ratio(first) - _ratio(second)
    problems = one.shape[1]
    tail = NormalDist().cdf(-math.sqrt(problems / max(problems - 1, 1)) * _student(problems - 1))
    low, high = np.nanquantile(found, [tail, 1 - tail], axis=0)
    low, high = np.minimum(low, difference), np.maximum(high, difference)
    p = _swapped(one, other, difference, seed, resamples)
    unsure = p >= 1 - LEVEL
    low = np.where(unsure, np.minimum(low, 0.0), low)
    high = np.where(unsure, np.maximum(high, 0.0), high)
    return difference, np.nanstd(found, axis=0), low, high, p


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _resampled(problems: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums over N problems drawn from N with replacement: (M, N, 2) to (resamples, M, 2)."""
    number = problems.shape[1]
    columns = problems.transpose(1, 0, 2).reshape(number, -1)
    random = generator(seed, "bootstrap", number)
    sums = []
    for size in _chunks(resamples, number):
        chosen = random.integers(0, number, (size, number)) + number * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * number).reshape(size, number)
        sums.append(times.astype(np.float64) @ columns)
    return np.concatenate(sums).reshape(resamples, -1, 2)


def _swapped(
    one: np.ndarray, other: np.ndarray, difference: np.ndarray, seed: int, resamples: int
) -> np.ndarray:
    """How often the two lie as far apart when a coin swaps their answers to each problem: p, (M,)."""
    number = one.shape[1]
    total = (one + other).sum(1)
    columns = (one - other).transpose(1, 0, 2).reshape(number, -1)
    random = generator(seed, "swaps", number)
    as_far = np.zeros(len(one))
    for size in _chunks(resamples, number):
        signs = 1.0 - 2.0 * random.integers(0, 2, (size, number), dtype=np.int8)
        moved = (signs @ columns).reshape(size, -1, 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            apart = _ratio(total + moved) - _ratio(total - moved)
        # Not < but not >=: what cannot be computed counts against a difference.
        as_far += (~(np.abs(apart) < np.abs(difference) * (1 - 1e-9))).sum(0)
    return (1 + as_far) / (1 + resamples)


def _chunks(resamples: int, problems: int) -> list[int]:
    size = max(1, _HELD // problems)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _student(freedom: int) -> float:
    """The quantile of Student's t that leaves 2.5 % above it (Abramowitz & Stegun 1964, 26.7.5).

    Right to 0.1 % from 5 degrees of freedom on; `paired` uses no others.
    """
    z, v = NormalDist().inv_cdf((1 + LEVEL) / 2), max(freedom, 1)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def comparisons(scores: Mapping[str, Mapping[str, np.ndarray]], *, seed: int) -> list[dict[str, Any]]:
    """`comparisons` of evaluation.json: which models were told apart, and by how much.

    The student is compared with the teacher, the baseline and itself before training; every smaller
    model of it with the student; the teacher with the student before training.

    Args:
        scores: model -> metric -> (N, 2), as in `paired`. A metric without a better direction is not
            compared, nor one whose unit is a token where the tokens of the two differ.

    Returns:
        a dict each: `metric`, `model`, `other`, `problems`, `difference` (of the metric, model - other),
        `low`, `high` and `stderr` (null: too few problems), `level`, `p`, and the `verdict` on `model`.
    """
    pairs = [("student", other) for other in ("teacher", "baseline", "student_before")]
    pairs += [(name, "student") for name in ordered({name: {} for name in scores}) if _smaller(name)]
    pairs.append(("teacher", "student_before"))
    shares = {name for names in SCORES.values() for name in names if METRICS[name].unit == "%"}
    found = []
    for model, other in pairs:
        for name, one in scores.get(model, {}).items():
            metric, their = METRICS.get(name), scores.get(other, {}).get(name)
            if metric is None or not metric.better or their is None:
                continue
            same = one.shape == their.shape and np.array_equal(one[:, 1], their[:, 1])
            if metric.unit == "nats/token" and not same:
                continue
            passes = name in shares and bool((one[:, 1] == 1).all() and (their[:, 1] == 1).all())
            interval = paired(one, their, seed=seed, passes=passes)
            if interval is None:
                continue
            at = interval._asdict()
            verdict = _verdict(interval, 1 if metric.better == "higher" else -1)
            found.append({"metric": name, "model": model, "other": other, **at} | verdict)
    return found


def _smaller(model: str) -> bool:
    return model.startswith("student-")


def _verdict(interval: Interval, sign: int) -> dict[str, Any]:
    side = 0
    if interval.low is not None and interval.high is not None:
        side = sign * ((interval.low > 0) - (interval.high < 0))
    return {"level": LEVEL, "verdict": ("no difference seen", "better", "worse")[side]}
