"""What quantization cannot do with a student, known from shapes and types before a weight is read."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import RecipeError
from mlx_distill.models.headers import config_of, stored_sizes
from mlx_distill.options import MODES, Grid, Quantize, Shape

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe

# `AWQ_MODEL_CONFIGS` of mlx_lm.quant.awq, which takes a second to import.
AWQ_TYPES = (
    "deepseek_v2",
    "gemma3",
    "gemma3_text",
    "llama",
    "llava",
    "ministral3",
    "mistral",
    "mistral3",
    "qwen2",
    "qwen3",
)
AFFINE_GROUPS = (32, 64, 128)
UNROUNDED = ("conv", "norm", "visual", "vision")  # in names of weights that mlx-lm never rounds


def check_groups(shapes: Mapping[str, Sequence[int]], grid: Grid, where: str) -> None:
    """Refuse a group size that does not divide the rows of every matrix.

    Args:
        shapes: of parameters, by path; the last number is the length of a row.
        where: the section of the recipe that holds the grid, such as `quantize`.

    Raises:
        RecipeError: naming the first layer that it does not divide, and the group sizes that divide all.
    """
    if mistake := wrong_groups(shapes, grid, where):
        raise RecipeError(mistake)


def wrong_groups(shapes: Mapping[str, Sequence[int]], grid: Grid, where: str) -> str | None:
    """The mistake that `check_groups` raises; None where there is none."""
    widths = {
        path.removesuffix(".weight"): shape[-1]
        for path, shape in shapes.items()
        if path.endswith(".weight") and len(shape) > 1 and not any(part in path for part in UNROUNDED)
    }
    size = grid.group_size
    layer = next((path for path, width in widths.items() if width % size), None)
    if layer is None:
        return None
    common = math.gcd(*widths.values())
    fitting = [str(group) for group in AFFINE_GROUPS if common % group == 0 and group != size]
    fitting += [f"mode {mode}" for mode, (_, group) in MODES.items() if common % group == 0 and group != size]
    key = f"{where}.mode` {grid.mode}: its group size" if grid.mode in MODES else f"{where}.group_size`:"
    return f"`{key} {size} does not divide the {widths[layer]} columns of {layer}" + (
        f"; {' or '.join(fitting)} would"
        if fitting
        else ", and no other divides all layers; sizes of the model that are multiples of 32 would help"
    )


def quantization(recipe: "Recipe") -> list[str]:
    """What the sections of a recipe say of each other here, one line a mistake."""
    options, student = recipe.quantize, recipe.student
    if options is None or student.shape is None:
        return []
    mistakes = [wrong_groups(shapes_of_new(student.shape), grid_of(options), "quantize")]
    mistakes.append(_wrong_type(options, student.shape.model_dump()))
    return [mistake for mistake in mistakes if mistake]


def check_loaded_student(recipe: "Recipe", folders: Mapping[str, Path]) -> None:
    """Refuse a student that the recipe loads and then cannot quantize, by its config and its files' headers.

    Args:
        folders: of the models that the recipe loads, by place; nothing is checked before `student` is there.

    Raises:
        RecipeError: a group size that does not divide a layer, a model type that the method does not know, or
            weights that are in few bits already.
    """
    if recipe.quantize is None or recipe.student.model is None or "student" not in folders:
        return
    check_type(recipe.quantize, config_of(folders["student"]))
    shapes = stored_sizes(folders["student"]).shapes
    if rounded := next((name for name in shapes if name.endswith(".scales")), None):
        raise RecipeError(
            f"`quantize`: `student.model` is quantized already ({rounded}), and rounding again would lose "
            "more; set `quantize` to null, or name the unquantized model"
        )
    check_groups(shapes, grid_of(recipe.quantize), "quantize")


def check_type(options: Quantize, config: Mapping[str, Any]) -> None:
    """Refuse a model type that the method does not know.

    Args:
        config: of config.json.

    Raises:
        RecipeError: naming it, and those that it knows.
    """
    if mistake := _wrong_type(options, config):
        raise RecipeError(mistake)


def grid_of(options: Quantize) -> Grid:
    """The grid of the first level; all have its mode and groups."""
    return Grid(mode=options.mode, bits=options.widths[0], group_size=options.group_size)


def shapes_of_new(shape: Shape) -> dict[str, tuple[int, int]]:
    """Shapes of the matrices of a new model's first layer, which all layers share, and of its embedding."""
    hidden, wide, heads = shape.hidden_size, shape.intermediate_size, shape.attention_size
    layer, forward = "model.layers.0", "mlp" if shape.num_experts is None else "mlp.switch_mlp"
    return {
        "model.embed_tokens.weight": (1, hidden),  # the rows are the tokenizer's
        f"{layer}.self_attn.o_proj.weight": (hidden, heads),
        f"{layer}.{forward}.down_proj.weight": (hidden, wide),
    }


def _wrong_type(options: Quantize, config: Mapping[str, Any]) -> str | None:
    model_type = config.get("model_type")
    if options.method != "awq" or (model_type in AWQ_TYPES and not config.get("q_lora_rank")):
        return None
    this = f"{model_type} with `q_lora_rank`" if model_type in AWQ_TYPES else model_type
    return (
        f"`quantize.method` awq: mlx-lm has it for {', '.join(AWQ_TYPES)}, not for model type {this}; "
        "use gptq, dwq or rtn"
    )
