"""What a loss sees of the teacher and of the labels."""

from typing import Any, NamedTuple

import mlx.core as mx

from mlx_distill.losses import sums


class Top(NamedTuple):
    """The teacher's k likeliest tokens and, as one more outcome, all others together.

    The log-probabilities are over the whole vocabulary and at the objective's temperature; they are
    never renormalised, so the k+1 outcomes add up to one. Without `log_tail` the k add up to less.
    """

    indices: mx.array  # (B, T, k) int32, distinct, in any order
    log_p: mx.array  # (B, T, k) float32
    log_tail: mx.array | None  # (B, T) float32, log of the mass of all others; None: left out


class Targets(NamedTuple):
    """What a batch should have been answered with, by one teacher.

    A loss sees it as (B, T); in training that is (1, N), the counted places of the batch alone, so
    that no loss is computed, and no logits are kept, where nothing is counted. The last three fields
    are for `objective`, which makes of them what a loss sees.
    """

    labels: mx.array  # (B, T) int32, the token that follows
    logits: mx.array | None = None  # (B, T, V) of the teacher, any float type
    top: Top | None = None  # in place of `logits`
    last: mx.array | None = None  # (1, N, D), of which the teacher's head makes logits, chunk by chunk
    hidden: dict[str, mx.array] | None = None  # number of a layer -> (1, N, D)
    attention: dict[str, Any] | None = None  # number of a layer -> Attention, over whole rows
    spans: Any = None  # which places of student and teacher read the same text, if tokenizers differ


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities over the last axis, in float32 whatever the model computes in."""
    return sums.log_softmax(logits.astype(mx.float32))
