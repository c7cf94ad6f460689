"""The layers that losses name, against those that the models have, before a weight is read."""

from pathlib import Path
from typing import Any

from mlx_distill.errors import RecipeError
from mlx_distill.losses.exits import exit_weights
from mlx_distill.losses.menu import MENU, option
from mlx_distill.losses.relations import check_relation_heads
from mlx_distill.matching import pairs_of
from mlx_distill.models.headers import config_of
from mlx_distill.models.support import refuse_attention, refuse_exits, refuse_hidden
from mlx_distill.options import Term
from mlx_distill.recipe import Recipe


def check_objective(recipe: Recipe, folders: dict[str, Path], pruned: dict[str, Any] | None = None) -> None:
    """Compare the layers that losses name with the models' own, as their config.json tells.

    Args:
        pruned: config of the student, if it is to be cut out.

    Raises:
        RecipeError, ModelError: a layer beyond a model, or a model type that hides what a loss reads.
    """
    configs = {key: config_of(folder) for key, folder in folders.items()}
    shape = recipe.student.shape
    own = pruned if shape is None else shape.model_dump()
    if own is not None:
        configs |= dict.fromkeys(("student", *recipe.self_taught), own)
    layers = {key: layers_of(config) for key, config in configs.items()}
    for name, term in recipe.objective.items():
        family, key = MENU[name].family, f"objective.{name}"
        try:
            if family == "exit" and layers["student"] is not None:
                exit_weights(term.options["exits"], layers["student"], 1.0)
            if family in ("hidden", "attention"):
                for place in recipe.teachers:
                    ours, theirs = layers["student"], layers[place]
                    if ours is not None and theirs is not None:
                        pairs_of({name: term}, ours, theirs)
                    if name == "attention_relations" and term.options.get("heads") is not None:
                        both = (_widths_of(configs[side], term) for side in ("student", place))
                        check_relation_heads(term.options["heads"], *both)
        except ValueError as error:
            raise RecipeError(f"`{key}`: {error}") from None
        if family == "exit":
            refuse_exits(configs["student"]["model_type"], key)
        for config in configs.values():
            if family == "attention":
                refuse_attention(config["model_type"], key)
            elif family == "hidden":
                refuse_hidden(config["model_type"], key)


def layers_of(config: dict[str, Any]) -> int | None:
    """How many layers a config.json says there are; None where it says it in a way of its own."""
    found = config.get("num_hidden_layers", config.get("text_config", {}).get("num_hidden_layers"))
    return found if isinstance(found, int) else None


def _widths_of(config: dict[str, Any], term: Term) -> list[int]:
    """Widths of the relations of a term, all heads together; none where config.json tells them otherwise."""
    config = {**config, **config.get("text_config", {})}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return []
    if any(key.endswith(("_head_dim", "_lora_rank")) for key in config):  # heads of several sizes
        return []
    size = config.get("head_dim") or hidden // heads
    shared = config.get("num_key_value_heads") or heads
    relations = option("attention_relations", term.options, "relations")
    return [(heads if relation == "queries" else shared) * size for relation in relations]
