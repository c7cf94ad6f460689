"""How much each channel, head and expert of a model counts, by what it does or by its weights.

`activation` takes forward passes alone, after Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section
2.2). Minitron compares how large channels are; here it is how much of what the next matrix makes comes from
each, `E[x_c^2] * |W[:, c]|^2`, the square of what Wanda takes of single weights (Sun et al. 2023, arXiv
2306.11695, section 3): a large channel that nothing listens to goes first.
"""

from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.keys import generator
from mlx_distill.models import Loaded
from mlx_distill.prune.axes import Parameter, everything, lengths_of, parameters_of
from mlx_distill.prune.importance import Statistics


class Scores:
    """Scores of a model's units, float64; the larger, the more a unit counts.

    - activation: what all that read a channel get of it. A head is the sum of its channels; a key and value
      head has no more than its query heads. An expert counts by `expert_norms`, and of equals by the tokens
      routed to it: their score is their place in that order.
    - magnitude: squares of all weights of a unit, those of the norms and biases aside.
    - random: drawn for each axis and layer.
    """

    def __init__(
        self,
        loaded: Loaded,
        by: Literal["activation", "magnitude", "random"],
        statistics: Statistics,
        seed: int,
    ):
        arrays: Any = tree_flatten(loaded.model.parameters())
        known = dict(arrays)
        self.by, self.statistics, self.seed = by, statistics, seed
        self.lengths, self.whole = lengths_of(loaded.config), everything(loaded.config)
        parameters = [p for p in parameters_of(loaded.config) if len(p.axes) > 1 and p.path in known]
        self.matrices = [(parameter, known[parameter.path]) for parameter in parameters]

    def hidden(self) -> np.ndarray:
        """(D,) over all layers and what stands outside of them."""
        return (
            self._random("hidden", 0, len(self.whole.hidden)) if self.by == "random" else self._sum("hidden")
        )

    def feed_forward(self, layer: int) -> np.ndarray:
        """(F,), or (E, F) for those of each expert."""
        experts = len(self.whole.experts[layer])
        if self.by == "random":
            width = len(self.whole.feed_forward[layer])
            return self._random("feed_forward", layer, (experts, width) if experts else width)
        return self._sum("feed_forward", layer)

    def heads(self, layer: int, axis: Literal["heads", "kv_heads"] = "heads") -> np.ndarray:
        """(H,) or (K,)."""
        count = len(getattr(self.whole, axis)[layer])
        if self.by == "random":
            return self._random(axis, layer, count)
        return self._sum(axis, layer).reshape(count, -1).sum(-1)

    def experts(self, layer: int) -> np.ndarray:
        """(E,)"""
        if self.by == "random":
            return self._random("experts", layer, len(self.whole.experts[layer]))
        if self.by == "magnitude":
            return self._sum("experts", layer)
        order = np.lexsort((self.statistics.routed[layer], self.statistics.expert_norms[layer]))
        return np.argsort(order).astype(np.float64)

    def _random(self, axis: str, layer: int, shape: int | tuple[int, int]) -> np.ndarray:
        return generator(self.seed, f"{axis} that stay", layer).random(shape)

    def _sum(self, axis: str, layer: int | None = None) -> np.ndarray:
        """Of each channel along an axis, added up over matrices; of a layer, or of all and those outside."""
        found = [
            one
            for parameter, array in self.matrices
            if layer is None or parameter.layer == layer
            for dimension, axes in enumerate(parameter.axes)
            if axis in axes
            for one in self._of_matrix(parameter, array, dimension, axis)
        ]
        return sum(found[1:], found[0]) if found else np.zeros(self.lengths[layer or 0][axis])

    def _of_matrix(
        self, parameter: Parameter, array: mx.array, dimension: int, axis: str
    ) -> list[np.ndarray]:
        of_experts = parameter.axes[0] == ("experts",) and array.ndim == 3
        if self.by == "activation":
            read = self.statistics.inputs.get(parameter.path.removesuffix(".weight"))
            if dimension < array.ndim - 1 or read is None:
                return []  # it makes these channels, or is an embedding that makes no logits
            got = read * _squares(array, {0, dimension} if of_experts else {dimension})
            if axis != "hidden":
                return [got]
            if of_experts:
                got = (self.statistics.routed[parameter.layer or 0][:, None] * got).sum(0)
            # All readers of the residual stream weigh alike, however large what they make is.
            return [got / max(got.sum(), 1e-300)]
        lengths = self.lengths[parameter.layer or 0]
        ends = np.cumsum([lengths[one] for one in parameter.axes[dimension]])[:-1]
        kept = {0, dimension} if of_experts and axis == "feed_forward" else {dimension}
        parts = np.split(_squares(array, kept), ends, axis=-1)
        return [part for part, one in zip(parts, parameter.axes[dimension], strict=True) if one == axis]


def _squares(array: mx.array, kept: set[int]) -> np.ndarray:
    """Squares of an array, added up along all dimensions but these; float64."""
    squares = mx.square(array.astype(mx.float32))
    for dimension in reversed(range(array.ndim)):  # the last first, for exact sums
        if dimension not in kept:
            squares = squares.sum(dimension)
    return np.array(squares).astype(np.float64)
