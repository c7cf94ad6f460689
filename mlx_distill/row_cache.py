"""Keys and values of one row, whose memory grows in small pieces."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

STEP = 64  # places; mlx-lm's 256 are mostly empty for short answers, and are copied with each row that comes


class RowCache(KVCache):
    """mlx-lm's cache, for itself and merged with others into one of a batch."""

    step = STEP

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> BatchKVCache:
        batch = KVCache.merge(caches)
        batch.step = STEP
        return batch


def row_cache(model: Any) -> list[Any]:
    """The cache of a row, a layer each, as mlx-lm would make it; layers of other kinds keep their own."""
    return [RowCache() if type(cache) is KVCache else cache for cache in make_prompt_cache(model)]
