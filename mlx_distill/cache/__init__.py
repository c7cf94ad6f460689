"""What a teacher said, stored: it runs once over all rows, is unloaded, and the student trains from this."""

from mlx_distill.cache.capture import fill, write_cache
from mlx_distill.cache.reader import CachedTeacher
from mlx_distill.cache.store import Store, described, refuse_other

__all__ = ["CachedTeacher", "Store", "described", "fill", "refuse_other", "write_cache"]
