"""What a loss sees of the teacher and of the labels."""

from typing import NamedTuple

import mlx.core as mx


class Targets(NamedTuple):
    """One batch's answers, at every position of `Batch.tokens`."""

    labels: mx.array  # (B, T) int32, the token that follows
    logits: mx.array | None = None  # (B, T, V) of the teacher, any float type; None without one


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities over the last axis, in float32 whatever the model computes in."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
