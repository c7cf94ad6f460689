"""The sizes of a model that pruning can change, and what stays of each."""

from typing import NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """How large a model is along the axes that pruning cuts.

    `feed_forward` is that of an expert where there are experts. Layers without experts beside such layers
    keep a width of their own, which stays as it is.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int  # of queries
    kv_heads: int
    experts: int  # 0: none
    vocabulary: int  # rows of the embedding


class Kept(NamedTuple):
    """What stays of a model: places along each axis of the model that is cut, each in rising order.

    The lists hold one entry for each layer that stays, in its order. As many stay in each of them, and of
    each key and value head as many of the query heads that read it. A layer without experts beside such
    layers keeps its whole feed-forward layer. `axes.everything` is the choice that cuts nothing.
    """

    layers: list[int]  # from 0
    hidden: np.ndarray  # (D',)
    feed_forward: list[np.ndarray]  # (F',), or (E', F'), others in each expert that stays
    heads: list[np.ndarray]  # (H',) query heads
    kv_heads: list[np.ndarray]  # (K',)
    experts: list[np.ndarray]  # (E',); empty arrays without experts
    vocabulary: np.ndarray  # (V',)
