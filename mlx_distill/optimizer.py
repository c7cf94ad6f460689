"""AdamW with a warm-up and cosine schedule, and the norm of a gradient."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map

from mlx_distill.options import Train


def make_optimizer(train: Train) -> optimizers.Optimizer:
    """AdamW with bias correction. Weight decay acts on matrices, not on norms and biases."""
    schedule = learning_rate(train)
    common: dict[str, Any] = {"betas": [0.9, train.beta2], "bias_correction": True}
    return optimizers.MultiOptimizer(
        [
            optimizers.AdamW(schedule, weight_decay=train.weight_decay, **common),
            optimizers.AdamW(schedule, weight_decay=0.0, **common),
        ],
        [lambda _, parameter: parameter.ndim > 1],
    )


def learning_rate(train: Train) -> Callable[[mx.array], mx.array]:
    """The rate of update number `step` (from 0): linear up to the peak, then half a cosine down.

    The rate is above zero from the first update on, and ends at `final_learning_rate` times the peak.
    """
    peak, final = train.learning_rate, train.learning_rate * train.final_learning_rate

    def rate(step: mx.array) -> mx.array:
        rising = peak * (step + 1) / (train.warmup + 1)
        done = mx.clip((step - train.warmup) / max(1, train.steps - 1 - train.warmup), 0, 1)
        falling = final + 0.5 * (peak - final) * (1 + mx.cos(math.pi * done))
        return mx.where(step < train.warmup, rising, falling)

    return rate


def norm(gradients: Any) -> mx.array:
    """Euclidean norm over all arrays of a tree, in float32."""
    arrays: Any = tree_flatten(gradients)
    squares = [mx.square(g.astype(mx.float32)).sum(-1).sum() for _, g in arrays]
    return mx.sqrt(sum(squares, mx.array(0.0)))


def clip(gradients: Any, largest: float) -> tuple[Any, mx.array]:
    """Scale a tree of gradients down to a norm of at most `largest`; 0 leaves it as it is.

    Returns:
        the tree, and its norm before.
    """
    size = norm(gradients)
    if not largest:
        return gradients, size
    factor = mx.minimum(largest / (size + 1e-6), 1.0)
    return tree_map(lambda g: g * factor.astype(g.dtype), gradients), size
