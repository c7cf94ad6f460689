"""Tokens drawn from the teacher's distribution: what is stored in place of its likeliest ones.

Source: Sparse Logit Sampling (arXiv 2503.16870). The share of the draws that fell on a token is an unbiased
estimate of its probability, so a gradient that is linear in the teacher's probabilities, as forward KL's, is
right on average; that of the top k is not, which leaves a student too sure of itself.
"""

import mlx.core as mx
import numpy as np

from mlx_distill.keys import generator
from mlx_distill.losses.outcomes import LOWEST_LOG_P, soften

BLOCK = 512  # tokens: first a block is drawn, then a token in it


def uniforms(seed: int, key: bytes, places: int, draws: int) -> np.ndarray:
    """(places, draws) float64 in 0..1, a function of the seed and of the row that `key` names."""
    return generator(seed, f"sampled {key.hex()}").random((places, draws))


def draw(logits: mx.array, temperature: float, random: np.ndarray) -> np.ndarray:
    """Token ids (N, n) int32, drawn with replacement from the softmax of `logits` (N, V) at `temperature`.

    Sums run in float64, where a vocabulary of any size adds up right.

    Args:
        random: (N, n) in 0..1, one number a draw.
    """
    places, vocabulary = logits.shape
    p = mx.softmax(soften(logits, temperature), axis=-1, precise=True)
    blocks = mx.pad(p, [(0, 0), (0, -vocabulary % BLOCK)]).reshape(places, -1, BLOCK)
    mass = np.array(blocks.sum(-1), dtype=np.float64)
    block, rest = _drawn(mass, random)
    within = mx.take_along_axis(blocks, mx.array(block[..., None].astype(np.int32)), axis=1)
    token, _ = _drawn(np.array(within, dtype=np.float64).reshape(-1, BLOCK), rest.reshape(-1, 1))
    return (block * BLOCK + token.reshape(block.shape)).astype(np.int32)


def _drawn(mass: np.ndarray, random: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes (N, n) of masses (N, M), and how far into its own mass each draw fell, from 0 to below 1."""
    ends = np.cumsum(mass, axis=-1)
    reached = random * ends[:, -1:]
    # Never past the last outcome that has a mass: rounding must not draw what cannot be.
    last = mass.shape[-1] - 1 - np.argmax(mass[:, ::-1] > 0, axis=-1)
    found = np.stack([np.searchsorted(e, r, side="right") for e, r in zip(ends, reached, strict=True)])
    found = np.minimum(found, last[:, None])
    own = np.take_along_axis(mass, found, axis=-1)
    begin = np.take_along_axis(ends, found, axis=-1) - own
    return found, np.clip((reached - begin) / own, 0, np.nextafter(1, 0))


def shares(draws: np.ndarray) -> np.ndarray:
    """Log of the share of the draws that fell on each token, (N, n) float32.

    Args:
        draws: (N, n) token ids, equal ones side by side. The first of them counts for all; the others have
            the log-probability that stands for 0.
    """
    places, number = draws.shape
    fresh = np.ones((places, number), dtype=bool)
    fresh[:, 1:] = draws[:, 1:] != draws[:, :-1]
    first = np.flatnonzero(fresh)
    counts = np.diff(first, append=fresh.size)  # each place begins with True, so none reaches into the next
    log_p = np.full(fresh.size, LOWEST_LOG_P, dtype=np.float32)
    log_p[first] = np.log(counts / number)
    return log_p.reshape(places, number)
