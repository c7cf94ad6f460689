"""The toy of simple self-distillation (arXiv 2604.01193), in closed form: nothing in it is random.

A program of four decisions, each a distribution over 16 tokens: a root, of which two tokens lead to a fork,
one of whose tokens leads to three locks, each with one right token. Locks want a low temperature, which cuts
their long tail; the fork wants a high one, because its right token is not the likeliest; the model has one
temperature for all. A student that learned the model's own samples, drawn after truncation, has no tails any
more, and can afford the high one.

The paper prints the heads of the distributions and not their tails; geometric tails of ratio 0.75 (locks)
and 0.5 (root, fork) have the entropies that it states (1.61 bits at a lock, 2.81 at the fork).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TOKENS = 16
TRAIN_TEMPERATURE, TRAIN_TOP_P, TOP_P = 0.9, 0.85, 0.8
TEMPERATURES = np.round(np.arange(0.05, 3.0005, 0.001), 3)  # swept in evaluation

Decode = Callable[[np.ndarray, float, float], np.ndarray]  # (p, temperature, top_p) -> what is drawn from


class States(NamedTuple):
    """A model: what it draws from in each state, (16,) float64 each."""

    root: np.ndarray  # the first two tokens lead on
    fork: np.ndarray  # the first token leads on
    lock: np.ndarray  # the first token is right; passed three times


def state(head: list[float], ratio: float) -> np.ndarray:
    """A head as printed, and the rest of the mass on a geometric tail."""
    tail = ratio ** np.arange(TOKENS - len(head))
    return np.array([*head, *((1 - sum(head)) * tail / tail.sum())])


BASE = States(
    root=state([0.200, 0.190, 0.329, 0.126], 0.5),
    fork=state([0.148, 0.280, 0.140, 0.144], 0.5),
    lock=state([0.750, 0.055, 0.050, 0.037], 0.75),
)


def temper(p: np.ndarray, temperature: float) -> np.ndarray:
    """p to the power of 1/temperature, normalised; a token that had no mass gets none."""
    q = np.where(p > 0, p, 0.0) ** (1 / temperature)
    return q / q.sum()


def cut(p: np.ndarray, top_p: float) -> np.ndarray:
    """Top-p: the fewest likeliest tokens that hold this share, normalised."""
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]  # mass of all likelier tokens
    q = np.zeros_like(p)
    kept = order[before < top_p]
    q[kept] = p[kept]
    return q / q.sum()


def temper_first(p: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The paper's order, vLLM's, Hugging Face's and ours."""
    return cut(temper(p, temperature), top_p)


def truncate_first(p: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The order of mlx-lm's sampler: what is cut depends on the model alone, not on the temperature."""
    return temper(cut(p, top_p), temperature)


def distilled(temperature: float, top_p: float, decode: Decode = temper_first) -> States:
    """A student that has learned, perfectly, the base model's own samples at these settings."""
    return States(*(decode(p, temperature, top_p) for p in BASE))


def success(model: States, temperature: float, top_p: float, decode: Decode = temper_first) -> float:
    """The chance that the program is right."""
    root, fork, lock = (decode(p, temperature, top_p) for p in model)
    return float((root[0] + root[1]) * fork[0] * lock[0] ** 3)


class Best(NamedTuple):
    """The highest point of a sweep over temperatures."""

    success: float
    temperature: float


def best(model: States, top_p: float = TOP_P, decode: Decode = temper_first) -> Best:
    """The best temperature of a model by itself: the fair comparison, and the paper's decode-only control."""
    return max(Best(success(model, t, top_p, decode), t) for t in TEMPERATURES.tolist())
