"""Hidden states and attention inside a model, without forking its architecture."""

from typing import NamedTuple

import mlx.core as mx


class Attention(NamedTuple):
    """What one layer's attention was computed from, queries and keys behind their rotary positions."""

    queries: mx.array  # (B, H, T, d)
    keys: mx.array  # (B, K, T, d), H a multiple of K
    values: mx.array  # (B, K, T, dv)
    scale: float  # of the scores, queries times keys
    mask: mx.array | None  # (..., T, T), bool (True: may be seen) or added to scores; None: causal
