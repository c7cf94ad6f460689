"""Factors on weights that make up for a smaller width: of norms, and of embeddings that a type scales."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.errors import Fault
from mlx_distill.prune.axes import Parameter
from mlx_distill.prune.reading import read, type_of


class Rescaling:
    """Rescales what was taken out of a model of `config` for one of `small`; see `surgery.cut`."""

    def __init__(
        self, config: Mapping[str, Any], small: Mapping[str, Any], inputs: Mapping[str, np.ndarray] | None
    ):
        self.inputs, self.offset = inputs, type_of(config).norm_offset
        self.tied = read(config)["tie_word_embeddings"]
        self.eps, self.new_eps = read(config)["rms_norm_eps"], read(small)["rms_norm_eps"]
        self.embedding = _embedding_scale(config) / _embedding_scale(small)

    def __call__(self, array: mx.array, parameter: Parameter, places: Mapping[str, np.ndarray]) -> mx.array:
        """The array times its factor, in its own type; the array itself where the factor is 1."""
        module = parameter.path.removesuffix(".weight")
        if module.endswith("embed_tokens"):
            return _times(array, self.embedding, 0.0)
        if not module.endswith("norm"):
            return array
        factor = self._of_norm(module, places[parameter.axes[0][0]])
        if module.endswith("model.norm") and self.tied:
            factor /= self.embedding  # the logits are made with the embedding too
        return _times(array, factor, self.offset)

    def _of_norm(self, module: str, places: np.ndarray) -> float:
        if self.inputs is None:
            return 1.0
        if module not in self.inputs:
            raise Fault(f"no statistics of what {module} reads, which has to be rescaled")
        before = self.inputs[module]
        return sqrt((before[places].mean() + self.new_eps) / (before.mean() + self.eps))


def _times(array: mx.array, factor: float, offset: float) -> mx.array:
    if factor == 1:
        return array
    return (factor * (offset + array.astype(mx.float32)) - offset).astype(array.dtype)


def _embedding_scale(config: Mapping[str, Any]) -> float:
    """What the model multiplies its embeddings with, exactly as it rounds it."""
    rounded = type_of(config).embedding_scale
    scale = read(config)["hidden_size"] ** 0.5
    if rounded is None:
        return 1.0
    return scale if rounded == "exact" else float(np.array(mx.array(scale, mx.bfloat16).astype(mx.float32)))
