"""Weights in few bits, rounded to the nearest value of MLX's grids.

In mode affine a group of weights along a row shares a scale s and a bias b and stands as integers q of `bits`
bits: w = s q + b. MLX takes the end of the group that is larger in magnitude for b, and moves s until zero is
on the grid; so zero stays zero, as nearly as s q + b is computed, and the other end may fall up to one step
beyond the grid.
"""

import copy
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distill.errors import ModelError
from mlx_distill.models import Loaded
from mlx_distill.options import Grid
from mlx_distill.quantize.checks import check_groups

LARGEST = 65504.0  # of float16


def quantized(
    loaded: Loaded, grid: Grid, bits: Mapping[str, int] | None = None, dtype: str | None = None
) -> Loaded:
    """Round every matrix that mlx-lm rounds, in place, and give a config that says how.

    Args:
        bits: width of single layers, by module path, where they differ from `grid.bits`.
        dtype: of scales, biases and all that is not rounded; None: as the model has it.

    Raises:
        RecipeError: the group size does not divide a layer.
        ModelError: a value is too large for float16.
    """
    if dtype is not None:
        loaded = cast(loaded, dtype)
    plan = layer_grids(loaded.model, grid, bits)
    nn.quantize(loaded.model, class_predicate=lambda path, _: plan.get(path, False))
    return described(loaded, grid)


def layer_grids(
    model: nn.Module, grid: Grid, bits: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """How each matrix that mlx-lm rounds is to be stored, by module path: group size, bits and mode.

    A layer for which the model type has a grid of its own, such as a router with 8 bits, takes that one. If
    its groups of 64 do not divide the layer, groups of 32 do, or it stays as it is.

    Raises:
        RecipeError: the group size does not divide one of the others.
        KeyError: `bits` names a layer that is not among the others.
    """
    plain = plain_layers(model)
    check_groups({f"{path}.weight": module.weight.shape for path, module in plain.items()}, grid, "quantize")
    if unknown := sorted((bits or {}).keys() - plain.keys()):
        raise KeyError(f"no layer {unknown[0]} to be stored in {(bits or {})[unknown[0]]} bits")
    grids: dict[str, dict[str, Any]] = {}
    for path, module in leaves(model):
        if path in plain:
            width = (bits or {}).get(path, grid.bits)
            grids[path] = {"group_size": grid.group_size, "bits": width, "mode": grid.mode}
        elif isinstance(own := _wanted(model, path, module), dict):
            fitting = [size for size in (own["group_size"], 32) if module.weight.shape[-1] % size == 0]
            if fitting:
                grids[path] = {"mode": "affine", **own, "group_size": fitting[0]}
    return grids


def plain_layers(model: nn.Module) -> dict[str, Any]:
    """The modules that take whatever grid is asked for, by path: no routers and the like."""
    return {path: module for path, module in leaves(model) if _wanted(model, path, module) is True}


def _wanted(model: nn.Module, path: str, module: Any) -> bool | dict[str, Any]:
    """What the model type says of a module: to be rounded, not to be, or a grid of its own."""
    if not hasattr(module, "to_quantized"):
        return False
    allowed = getattr(model, "quant_predicate", None)
    return True if allowed is None else allowed(path, module)


def stored_bytes(weights: int, grid: Mapping[str, Any], each: int) -> int:
    """Bytes of a matrix in few bits, with its scales and biases.

    Args:
        weights: their number. grid: as `layer_grids` tells it. each: bytes of a scale of mode affine.
    """
    beside = 2 * each if grid["mode"] == "affine" else 1
    return weights * grid["bits"] // 8 + weights // grid["group_size"] * beside


def leaves(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold no others, by path."""
    found: Any = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return found


def described(loaded: Loaded, grid: Grid) -> Loaded:
    """The model with a config that tells its grids as `mlx_lm.load` reads them.

    Layers that are stored otherwise than `grid` says have an entry each.
    """
    told = {"group_size": grid.group_size, "bits": grid.bits, "mode": grid.mode}
    layers = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in leaves(loaded.model)
        if hasattr(module, "bits")
    }
    own = {path: stored for path, stored in layers.items() if stored != told}
    config = copy.deepcopy(loaded.config)
    config["quantization"] = config["quantization_config"] = {**told, **own}
    return loaded._replace(config=config)


def cast(loaded: Loaded, dtype: str) -> Loaded:
    """The model with its floating-point parameters in `dtype`, in place, and a config that says so.

    What the model type needs in its own type, such as the corrections of some routers, keeps it.

    Raises:
        ModelError: a value is too large for float16.
    """
    target: mx.Dtype = getattr(mx, dtype)
    keeps = getattr(loaded.model, "cast_predicate", None) or (lambda path: True)

    def to_target(path: str, value: mx.array) -> mx.array:
        if not mx.issubdtype(value.dtype, mx.floating) or not keeps(path):
            return value
        largest = float(np.array(mx.abs(value).max().astype(mx.float32))) if target == mx.float16 else 0.0
        if not largest <= LARGEST:
            raise ModelError(
                f"`quantize.dtype` float16: {path} holds {largest:.6g}, and float16 ends at {LARGEST:g}; "
                "use bfloat16"
            )
        return value.astype(target)

    loaded.model.update(tree_map_with_path(to_target, loaded.model.parameters()))
    config = copy.deepcopy(loaded.config)
    for place in (config, config.get("text_config") or {}):
        place |= {key: dtype for key in ("dtype", "torch_dtype") if key in place}
    return loaded._replace(config=config)


def bits_per_weight(model: nn.Module) -> float:
    """All bits of a model's arrays, scales and biases among them, over the number of its weights."""
    from mlx_lm.utils import compute_bits_per_weight

    return float(compute_bits_per_weight(model))
