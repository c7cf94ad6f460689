"""What can be taken out of which of mlx-lm's model types, as measured on a tiny model of each.

support.json is written by `python tests/test_support.py`, and so is its table in docs/models.md. A type
that it does not know is allowed: what is looked for and not found then stops the run when it is needed.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from mlx_distill.errors import ModelError

FILE = Path(__file__).with_name("support.json")


class Support(NamedTuple):
    """What one model type shows; None where nobody has tried."""

    hidden: bool | None = None  # the output of every layer, with a gradient
    attention: Literal["all", "some", "none"] | None = None  # layers that show queries, keys and values
    head: Literal["exact", "whole"] | None = None  # whole: the last projection cannot be run in chunks
    exits: bool | None = None  # head(norm(last layer)) are the logits, so that other layers can answer
    early_answers: bool | None = None  # decoding can leave the model at a layer before the last
    why: Mapping[str, str] = MappingProxyType({})  # what does not work -> the reason
    not_tried: str | None = None  # the reason why the type could not be measured


@cache
def read_support() -> dict[str, Any]:
    """The content of support.json: `mlx_lm`, the version measured, and `types`."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def support(model_type: str) -> Support:
    """What is known of a `model_type` of config.json, also where mlx-lm runs it as another type."""
    from mlx_lm.utils import MODEL_REMAPPING

    return Support(**read_support()["types"].get(MODEL_REMAPPING.get(model_type, model_type), {}))


def refuse_hidden(model_type: str, key: str) -> None:
    """Stop a recipe that needs hidden states of a model type that does not show them.

    Args:
        key: the recipe key that asks for them, for the message.

    Raises:
        ModelError: known not to work. An unknown type passes.
    """
    found = support(model_type)
    if found.hidden is False:
        raise ModelError(
            f"`{key}`: model type {model_type} does not show its hidden states ({found.why['hidden']}); "
            "use losses on logits, or another model (docs/models.md)"
        )


def refuse_attention(model_type: str, key: str) -> None:
    """Stop a recipe that needs attention of a model type that shows it in no layer.

    Raises:
        ModelError: known not to work. An unknown type passes, and so does one that shows some layers.
    """
    found = support(model_type)
    if found.attention == "none":
        instead = "hidden states or logits" if found.hidden else "logits"
        raise ModelError(
            f"`{key}`: model type {model_type} does not show its attention ({found.why['attention']}); "
            f"use losses on {instead}, or another model (docs/models.md)"
        )


def refuse_exits(model_type: str, key: str) -> None:
    """Stop a recipe that lets earlier layers of a model answer, where norm and head cannot be shared.

    Raises:
        ModelError: known not to work. An unknown type passes.
    """
    found = support(model_type)
    if found.exits is False:
        raise ModelError(
            f"`{key}`: earlier layers of model type {model_type} cannot answer ({found.why['exits']}); "
            "use losses on its last logits, or another model (docs/models.md)"
        )
