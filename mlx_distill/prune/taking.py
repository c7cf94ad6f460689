"""Taking out of an array, along each dimension, the places that stay of its axes."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_distill.prune.sizes import Kept


def places_of(kept: Kept, n: int, head_dim: int) -> dict[str, np.ndarray]:
    """Of each axis in types.py, the indices that stay in the n-th layer that does."""
    channels = np.arange(head_dim)
    return {
        "hidden": kept.hidden,
        "feed_forward": kept.feed_forward[n],
        "heads": (kept.heads[n][:, None] * head_dim + channels).reshape(-1),
        "kv_heads": (kept.kv_heads[n][:, None] * head_dim + channels).reshape(-1),
        "head_dim": channels,
        "experts": kept.experts[n],
        "vocabulary": kept.vocabulary,
    }


def taken(
    array: mx.array,
    axes: Sequence[Sequence[str]],
    places: Mapping[str, np.ndarray],
    lengths: Mapping[str, int],
) -> mx.array:
    """What stays of an array, in its type; the array itself where that is all.

    Args:
        axes: of each dimension, the axes that stand in it one behind the other; experts before what
            differs between them.
        lengths: of each axis in the array.
    """
    for dimension, joined in enumerate(axes):
        starts = np.cumsum([0, *(lengths[axis] for axis in joined)])[:-1]
        rows = [start + places[axis] for start, axis in zip(starts, joined, strict=True)]
        index = np.concatenate(rows, axis=-1)
        if index.shape[-1] == array.shape[dimension]:
            continue  # indices rise, so these are all of them
        if index.ndim == 1:
            array = mx.take(array, mx.array(index), axis=dimension)
        else:
            array = _taken_by_expert(array, mx.array(index), dimension)
    return array


def _taken_by_expert(array: mx.array, index: mx.array, dimension: int) -> mx.array:
    """Other indices (E, F') in each of the experts that the first dimension runs over."""
    shape = [1] * array.ndim
    shape[0], shape[dimension] = index.shape
    wanted = list(array.shape)
    wanted[dimension] = index.shape[1]
    return mx.take_along_axis(array, mx.broadcast_to(index.reshape(shape), wanted), axis=dimension)
