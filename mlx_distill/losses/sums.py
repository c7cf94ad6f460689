"""Sums over a vocabulary, in float32 and right.

MLX adds up a row in one float32 accumulator on some backends. Over 150,000 tokens what is added is then
small beside what is there already: a KL between two nearly flat distributions over 70,000 tokens came out
wrong by 0.5 %. Here a row is added up in blocks, and then its blocks.

The gradients are written out, so that the blocks stay views, and each needs one pass of exp at most.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx

BLOCK = 1024  # tokens

# A probability of zero has no logarithm that one can calculate with: 0 * -inf is not a number. This is
# as good: exp of it is 0, and what it is multiplied by or added to stays finite.
LOWEST = -1e30


Function = Callable[[mx.array], mx.array]
Gradient = Callable[[mx.array, mx.array, mx.array], mx.array]  # of (x, cotangent, output)


def with_gradient(gradient: Gradient) -> Callable[[Function], Function]:
    """A function of one array, with this gradient in place of the one that MLX derives."""

    def decorate(function: Function) -> Function:
        differentiable = mx.custom_function(function)
        differentiable.vjp(gradient)
        return cast(Function, differentiable)

    return decorate


@with_gradient(lambda x, cotangent, output: mx.broadcast_to(cotangent[..., None], x.shape))
def sum_last(x: mx.array) -> mx.array:
    """Sum over the last axis: (..., V) float32 to (...)."""
    return _in_blocks(x, lambda part: part.sum(-1))


@with_gradient(lambda x, cotangent, output: cotangent[..., None] * mx.exp(x - output[..., None]))
def logsumexp(x: mx.array) -> mx.array:
    """log of the sum of exp over the last axis: (..., V) float32 to (...)."""
    return _in_blocks(x, lambda part: mx.logsumexp(part, axis=-1))


@with_gradient(lambda x, cotangent, output: cotangent - mx.exp(output) * sum_last(cotangent)[..., None])
def log_softmax(x: mx.array) -> mx.array:
    """Log-probabilities over the last axis: (..., V) float32 to the same, finite for logits of -inf too."""
    normalizer = _in_blocks(x, lambda part: mx.logsumexp(part, axis=-1))
    return mx.maximum(x - normalizer[..., None], LOWEST)


class Odds(NamedTuple):
    """A distribution as one pass of exp leaves it: its probabilities are odds / total."""

    odds: mx.array  # (..., V), against the likeliest
    total: mx.array  # (..., 1), their sum
    largest: mx.array  # (..., 1), of the logits


def odds(x: mx.array) -> Odds:
    """Of logits (..., V) float32. For use inside a function whose gradient is written out."""
    largest = x.max(-1, keepdims=True)
    against = mx.exp(x - largest)
    return Odds(against, sum_last(against)[..., None], largest)


def _in_blocks(x: mx.array, reduce: Function) -> mx.array:
    """`reduce` over the last axis, block by block and then over the blocks."""
    *rows, size = x.shape
    blocks = size // BLOCK
    if blocks < 2:
        return reduce(x)
    strides = [size * math.prod(rows[axis + 1 :]) for axis in range(len(rows))]
    parts = reduce(mx.as_strided(x, (*rows, blocks, BLOCK), (*strides, BLOCK, 1)))
    if size % BLOCK:
        left_over = reduce(x[..., blocks * BLOCK :])
        parts = mx.concatenate([parts, left_over[..., None]], axis=-1)
    return reduce(parts)
