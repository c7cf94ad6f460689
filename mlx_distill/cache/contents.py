"""What the cache of a recipe's teacher is made of, known before a weight is read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mlx_distill.cache.store import described, refuse_other
from mlx_distill.errors import RecipeError
from mlx_distill.losses.menu import MENU
from mlx_distill.matching import teacher_layers
from mlx_distill.recipe import Recipe


def contents_of(
    recipe: Recipe,
    place: str,
    *,
    weights: str,
    tokenizer: Any,
    vocabulary: int,
    layers: tuple[int | None, int | None],
) -> dict[str, Any]:
    """The manifest that the cache of a teacher must have.

    Args:
        place: the teacher's, in the recipe. weights: a digest of its files.
        tokenizer: with which rows are encoded. vocabulary: its real size.
        layers: how many student and teacher have; None where config.json tells it in a way of its own.

    Raises:
        RecipeError: hidden states are to be stored, and nobody knows of which layers.
    """
    options = recipe.teachers[place]
    hidden: list[int] = []
    depth = layers[1]
    if any(MENU[name].family == "hidden" for name in recipe.objective):
        if layers[0] is None or depth is None:
            raise RecipeError(
                f"`{place}.source` cache stores hidden states of layers that are counted beforehand, and a "
                "config.json has no `num_hidden_layers`; use live"
            )
        hidden = sorted(teacher_layers(recipe.objective, layers[0], depth).hidden)
    rounded = "" if options.quantize is None else f" {_digest(options.quantize.model_dump())}"
    return described(
        teacher=weights + rounded,
        tokenizer=_digest(sorted(tokenizer.get_vocab().items())),
        chat_template=_digest(getattr(tokenizer, "chat_template", None)),
        count=recipe.data.count,
        vocabulary=vocabulary,
        top_k=options.top_k,
        sampled=options.sampled,
        temperature=recipe.temperature,
        precision=options.precision,
        seed=recipe.seed,
        hidden=hidden,
        layers=depth,
    )


def refuse_others(recipe: Recipe, made_of: dict[str, dict[str, Any]]) -> None:
    """Compare the folders that recipes share with what this one's teachers make.

    Raises:
        DataError: the first field that differs.
    """
    for place, wanted in made_of.items():
        folder = recipe.teachers[place].cache
        if folder is not None:
            refuse_other(Path(os.path.expanduser(folder)), wanted, place)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
