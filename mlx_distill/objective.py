"""The objective: a weighted sum of losses over the counted positions, in nats."""

from collections.abc import Mapping

import mlx.core as mx

from mlx_distill.losses import LOSSES, Targets
from mlx_distill.recipe import Term


def objective(
    terms: Mapping[str, Term], student_logits: mx.array, targets: Targets, counted: mx.array
) -> tuple[mx.array, dict[str, mx.array]]:
    """Sum the losses where labels are counted.

    A sum, not a mean: sums of micro-batches and machines add up, and `train` divides once, by the
    number of counted tokens. A mean of means would weigh a token of a short row more.

    Args:
        student_logits: (B, T, V), already cut to the tokenizer's vocabulary; in training (1, N, V).
        counted: (B, T) bool; in training (1, N), false where N was filled up.

    Returns:
        total: scalar, nats. parts: loss name -> its own sum before the weight, for the log.
    """
    parts = {}
    for name, term in terms.items():
        nats = LOSSES[name](student_logits, targets, **term.options)
        # Last axis first: float32 sums of a whole array are wrong on some backends.
        parts[name] = mx.where(counted, nats, 0).sum(-1).sum()
    return sum((term.weight * parts[name] for name, term in terms.items()), mx.array(0.0)), parts
