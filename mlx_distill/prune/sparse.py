"""Weights set to zero inside matrices that keep their shape: which ones, and how they stay zero.

By magnitude the smallest weights of a whole matrix go. Wanda (Sun et al. 2023, arXiv 2306.11695, section 3)
weighs each by what it multiplies, |w_ij| * ||x_j||, and compares within a row, so that every output loses as
many. In the pattern 2:4 the two larger of each four weights in a row stay, by either score.
"""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.errors import Fault, RecipeError
from mlx_distill.models import Loaded
from mlx_distill.options import Sparsity
from mlx_distill.prune.axes import shapes_of
from mlx_distill.prune.importance import Statistics

# They choose among a few experts: they have few weights, and each decides much.
ROUTERS = ("gate", "router", "shared_expert_gate")


def is_pruned(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix of a layer, or those of its experts, and so gets zeros."""
    owner, _, name = path.rpartition(".")
    in_layers = re.search(r"(^|\.)layers\.\d+\.", owner) is not None
    return in_layers and name == "weight" and len(shape) > 1 and owner.rpartition(".")[2] not in ROUTERS


def check_pattern(config: Mapping[str, Any], options: Sparsity, where: str) -> None:
    """Refuse a pattern that the matrices of a model with this config.json cannot have.

    Raises:
        RecipeError: a width that is no multiple of four, naming the layer.
    """
    for path, shape in shapes_of(config).items():
        if options.pattern == "2:4" and is_pruned(path, shape) and shape[-1] % 4:
            raise RecipeError(
                f"`{where}.pattern` 2:4 takes inputs in fours, and {path.removesuffix('.weight')} has "
                f"{shape[-1]}; cut to a multiple of 4, or use unstructured"
            )


def sparsify(loaded: Loaded, options: Sparsity, statistics: Statistics | None) -> Loaded:
    """Set the least important weights of every matrix in the layers to zero, in place.

    `share` is exact: of each matrix by magnitude, of each row by wanda, rounded to whole weights. Of equal
    weights the first go.

    Args:
        statistics: of this very model, for wanda; magnitude needs none.

    Raises:
        Fault: the statistics are of another model.
    """
    weights: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    for path in list(weights):
        weight = weights.pop(path)  # or all of them would be kept beside the new ones
        if not is_pruned(path, weight.shape):
            continue
        scores, whole = mx.abs(weight.astype(mx.float32)), options.by == "magnitude"
        if not whole:
            scores = scores * _sizes_of_inputs(path, weight, statistics)
        if options.pattern == "2:4":
            scores, count = scores.reshape(-1, 4), 2
        else:
            scores = scores.reshape(1, -1) if whole else scores
            count = round(options.share * scores.shape[-1])
        goes = smallest(scores, count).reshape(weight.shape)
        kept = mx.where(goes, mx.array(0, weight.dtype), weight)
        mx.eval(kept)  # one matrix at a time: its scores take more memory than it does
        loaded.model.load_weights([(path, kept)], strict=False)
    return loaded


def _sizes_of_inputs(path: str, weight: mx.array, statistics: Statistics | None) -> mx.array:
    """Root mean square of each input of a matrix (..., out, in), as (..., 1, in) float32."""
    squares = None if statistics is None else statistics.inputs.get(path.removesuffix(".weight"))
    if squares is None or squares.shape != (*weight.shape[:-2], weight.shape[-1]):
        raise Fault(f"{path}: no statistics of what it reads, or of another width; measure this model first")
    # What an expert reads to whom no token came is unknown: its weights are compared by magnitude.
    known = squares.any(-1, keepdims=True)
    return mx.array(np.sqrt(np.where(known, squares, 1.0)).astype(np.float32))[..., None, :]


def smallest(scores: mx.array, count: int) -> mx.array:
    """Which are the `count` smallest along the last axis, as booleans; of equal ones the first."""
    if not count:
        return mx.zeros(scores.shape, mx.bool_)
    last = mx.partition(scores, count - 1, axis=-1)[..., count - 1 : count]
    below, equal = scores < last, scores == last
    left = count - below.astype(mx.int32).sum(-1, keepdims=True)
    return below | (equal & (equal.astype(mx.int32).cumsum(-1) <= left))


def masks_of(model: nn.Module) -> dict[str, mx.array]:
    """Where the matrices with zeros are not zero, as booleans by parameter; empty for a dense model."""
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    masks = {path: weight != 0 for path, weight in weights.items() if is_pruned(path, weight.shape)}
    masks = {path: mask for path, mask in masks.items() if not bool(mask.all())}
    mx.eval(masks)
    return masks


def masked(gradients: Any, masks: Mapping[str, mx.array]) -> Any:
    """A tree of gradients, zero where the weights are to stay zero."""
    return tree_map_with_path(lambda path, g: mx.where(masks[path], g, 0) if path in masks else g, gradients)


def sparsity_of(model: nn.Module) -> float:
    """The share of all weights that are exactly zero; of a quantized matrix, those it stands for."""
    quantized = {path: module for path, module in model.named_modules() if "scales" in module}
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    zeros = total = 0
    for path, array in arrays.items():
        owner, _, name = path.rpartition(".")
        if owner in quantized and name != "bias":
            if name != "weight":
                continue  # a part of how the weights are stored
            array = _dequantized(quantized[owner])
        # Whole numbers, whose sum is exact.
        zeros += int((array == 0).astype(mx.int32).sum())
        total += array.size
    return zeros / total


def _dequantized(module: Any) -> mx.array:
    parts = [module.get(key) for key in ("weight", "scales", "biases")]
    more = {"mode": module.mode, "global_scale": module.get("global_scale")}
    return mx.dequantize(*parts, group_size=module.group_size, bits=module.bits, **more)
