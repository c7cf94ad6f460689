"""Random numbers derived from (seed, purpose, step), so that nothing needs to be restored.

The same triple gives the same numbers in every process, whatever ran before; two purposes or two
steps never share a stream.
"""

import hashlib

import mlx.core as mx
import numpy as np


def _words(seed: int, purpose: str, step: int) -> int:
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def key_word(seed: int, purpose: str, step: int = 0) -> int:
    """64 bits for a key of MLX's, its two words in one number; `mx.random.key` makes the key of it."""
    return _words(seed, purpose, step)


def generator(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """A NumPy generator, for orders and choices made outside the models."""
    return np.random.default_rng(_words(seed, purpose, step))


def seed_global(seed: int, purpose: str, step: int = 0) -> None:
    """Set MLX's global state, for code that knows no keys: `nn.Dropout` and `nn.init`."""
    mx.random.seed(_words(seed, purpose, step))
