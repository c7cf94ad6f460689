"""How a token is drawn: temperature, then top-k, then top-p, then one token of what is left.

The order matters. Tempered first, the cut follows what is drawn from; cut first, as mlx-lm's sampler does,
a high temperature never brings back what the untempered distribution had lost, and the share `top_p` is one
of another distribution than the one that is drawn from.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.losses.targets import log_softmax
from mlx_distill.models.divided import of_first, together_of
from mlx_distill.options import Sampling


def distribution(logits: mx.array, options: Sampling) -> mx.array:
    """Log-probabilities of what is drawn from, (..., V) float32; -inf for tokens that are cut.

    `top_k` keeps so many tokens of the tempered distribution, and `top_p` the fewest likeliest of these
    that hold at least its share of their mass. Among equally likely tokens the first ones stay, so exactly
    as many are kept as are asked for. At temperature 0 all mass is on the likeliest token.

    Args:
        logits: (..., V), any float type.
    """
    kept = cut(logits, options)
    return mx.where(kept == -mx.inf, -mx.inf, log_softmax(kept))


def cut(logits: mx.array, options: Sampling) -> mx.array:
    """`distribution` before it is normalised: tempered logits, -inf for tokens that are cut."""
    logits = logits.astype(mx.float32)
    if options.temperature == 0:
        return _likeliest(logits, mx.max(logits, axis=-1, keepdims=True), 1)
    logits = logits / options.temperature
    kept = min(options.top_k or logits.shape[-1], logits.shape[-1])
    if kept == logits.shape[-1] and options.top_p == 1:
        return logits
    # Values alone are sorted, not their tokens: of equal values any order is the same.
    values = -mx.sort(-(mx.topk(logits, kept, axis=-1) if kept < logits.shape[-1] else logits), axis=-1)
    if options.top_p == 1:
        return _likeliest(logits, values[..., -1:], kept)
    before = mx.cumsum(mx.softmax(values, axis=-1), axis=-1, inclusive=False)
    # The first one stays whatever `top_p` is: the mass before it is 0.
    fewest = (before < options.top_p).sum(axis=-1, keepdims=True)
    return _likeliest(logits, mx.take_along_axis(values, fewest - 1, axis=-1), fewest)


def _likeliest(logits: mx.array, least: mx.array, count: mx.array | int) -> mx.array:
    """The `count` largest logits, the least of which is `least`; -inf for all others.

    Of those that equal the least, the first ones stay.
    """
    above, equal = logits > least, logits == least
    room = count - above.sum(axis=-1, keepdims=True)
    first = mx.cumsum(equal.astype(mx.int32), axis=-1) <= room
    return mx.where(above | (equal & first), logits, -mx.inf)


def gumbel_noise(keys: mx.array, vocabulary: int) -> mx.array:
    """(B, V) float32 noise: the likeliest token of log-probabilities plus noise is one drawn from them.

    Row b is a function of keys[b] and V alone. Drawn this way, a rounding error of a logit changes a token
    with a chance of about its own size; with the inverse of the cumulated probabilities an error in one
    token would move the bounds of all behind it.

    Args:
        keys: (B, 2) uint32, an MLX key each.
    """
    return mx.vmap(lambda key: mx.random.gumbel((vocabulary,), key=key))(keys)


class Draws:
    """The random numbers of each row of a batch, for all of its answer, in the shape of a cache of mlx-lm's.

    mlx-lm merges, pads, filters and extends the caches of a batch as rows come and go. As one more cache
    beside those of keys and values, a row's random numbers come and go with it, whatever stands around it.

    Args:
        keys: (B,) uint64, of each row an MLX key for the first token that it reads; the next token has the
            next key.
    """

    def __init__(self, keys: np.ndarray):
        self._keys, self._padding = keys, np.zeros_like(keys)

    def advance(self, tokens: int) -> mx.array:
        """The keys of the last of so many tokens that each row reads, (B, 2) uint32."""
        self._keys = self._keys + np.uint64(tokens)
        last = self._keys - np.uint64(1)
        words: Any = np.stack([last >> np.uint64(32), last & np.uint64(0xFFFFFFFF)], axis=-1)
        return mx.array(words.astype(np.uint32))

    # What mlx-lm asks of a cache.

    state: tuple[()] = ()  # nothing here is still to be computed

    @staticmethod
    def merge(rows: Sequence["Draws"]) -> "Draws":
        return Draws(np.concatenate([row._keys for row in rows]))

    def prepare(self, *, lengths: Any = None, right_padding: Any = None) -> None:
        """Expect prompts that are padded to one length."""
        self._padding = np.array(right_padding, dtype=np.uint64)

    def finalize(self) -> None:
        """Forget the padding: it was read, but is no token."""
        self._keys, self._padding = self._keys - self._padding, np.zeros_like(self._keys)

    def filter(self, keep: Any) -> None:
        self._keys, self._padding = self._keys[keep], self._padding[keep]

    def extend(self, other: "Draws") -> None:
        self._keys = np.concatenate([self._keys, other._keys])
        self._padding = np.concatenate([self._padding, other._padding])


class Sampler:
    """A model whose likeliest next token is one drawn from its distribution.

    mlx-lm then decodes greedily, in one call for the whole batch.

    Args:
        vocabulary: tokens from it on are never written; None: there are none.
    """

    def __init__(self, model: nn.Module, options: Sampling, vocabulary: int | None = None):
        self.model, self.options, self.vocabulary = model, options, vocabulary

    def cache(self, key: int, length: int) -> list[Any]:
        """The cache of one row, its random numbers the last layer.

        Args:
            key: 64 bits; at place t of the answer the row draws with this MLX key plus t.
            length: of its prompt, in tokens. The last one is read in the step that draws the first of the
                answer.
        """
        from mlx_distill.row_cache import row_cache

        first = np.array([key], dtype=np.uint64) - np.uint64(length - 1)
        return [*row_cache(self.model), Draws(first)]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits (B, T, V) whose maximum at the last place is the drawn token."""
        caller: Any = self.model
        logits = caller(tokens, cache=cache[:-1])[..., : self.vocabulary]
        keys = cache[-1].advance(tokens.shape[1])
        if tokens.shape[1] > 1:  # of a prompt nothing is drawn
            return logits
        if self.options.temperature > 0:
            drawn = cut(logits[:, -1], self.options) + gumbel_noise(keys, logits.shape[-1])
            logits = drawn[:, None]
        together = together_of(self.model)
        if together is not None:
            taken = of_first(mx.argmax(logits, axis=-1, keepdims=True), together)
            logits = (mx.arange(logits.shape[-1]) == taken).astype(mx.float32)
        return logits
