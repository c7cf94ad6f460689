"""What a loss sees of the teacher and of the labels."""

from typing import NamedTuple

import mlx.core as mx


class Targets(NamedTuple):
    """What a batch should have been answered with.

    A loss sees it as (B, T); in training that is (1, N), the counted places of the batch alone, so
    that no loss is computed, and no logits are kept, where nothing is counted.
    """

    labels: mx.array  # (B, T) int32, the token that follows
    logits: mx.array | None = None  # (B, T, V) of the teacher, any float type; None without one


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities over the last axis, in float32 whatever the model computes in."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
