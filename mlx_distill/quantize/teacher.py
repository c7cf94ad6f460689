"""A teacher whose weights are rounded as it is loaded: it teaches in few bits, to take less memory."""

import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.models import Loaded
from mlx_distill.models.headers import Stored, config_of, stored_sizes
from mlx_distill.options import Grid
from mlx_distill.quantize.checks import UNROUNDED, check_groups
from mlx_distill.quantize.rounding import leaves, quantized
from mlx_distill.recipe import Recipe


def in_few_bits(loaded: Loaded, grid: Grid) -> Loaded:
    """The model rounded to a grid, in place, one layer after the other.

    Args:
        loaded: read lazily, so that no more than a layer of it is ever there in full.
    """
    made = quantized(loaded, grid)
    for _, module in leaves(made.model):
        mx.eval(module.parameters())
    mx.eval(made.model.parameters())
    return made


def rounded_bytes(stored: Stored, grid: Grid) -> float:
    """What a model will take once it is rounded, estimated from the headers of its files.

    A group has a scale and, in mode affine, a bias, both in the type of the weights.
    """
    each = stored.bytes / stored.numbers
    group = 2 * each if grid.mode == "affine" else 1.0
    total = float(stored.bytes)
    for name, shape in stored.shapes.items():
        if name.endswith(".weight") and len(shape) > 1 and not any(part in name for part in UNROUNDED):
            total += math.prod(shape) * (grid.bits / 8 - each + group / grid.group_size)
    return total


def check_teachers(recipe: Recipe, folders: Mapping[str, Path]) -> None:
    """Refuse to round what cannot be rounded, by the configs and headers of the teachers in these folders.

    Raises:
        ModelError: a teacher that is in few bits already.
        RecipeError: a group size that does not divide a layer, which is named.
    """
    for place, teacher in recipe.teachers.items():
        if teacher.quantize is None or place not in folders:
            continue
        told = config_of(folders[place])
        told = told.get("quantization") or told.get("quantization_config")
        if told:
            bits = f" (bits {told['bits']})" if isinstance(told, dict) and "bits" in told else ""
            raise ModelError(
                f"`{place}.quantize`: {folders[place]} is quantized already{bits}; leave it out, or name the "
                "whole model"
            )
        check_groups(stored_sizes(folders[place]).shapes, teacher.quantize, f"{place}.quantize")
