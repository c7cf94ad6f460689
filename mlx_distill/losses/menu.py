"""Every loss that a recipe can name, by family: what it reads, and what options it takes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveInt

from mlx_distill import losses
from mlx_distill.losses.cross_tokenizer import cross_tokenizer
from mlx_distill.losses.exits import exit_cross_entropy, exit_kl
from mlx_distill.losses.features import attention_relations, attention_transfer, hidden_cosine, hidden_mse
from mlx_distill.losses.layer_maps import Layers

Family = Literal["token", "hidden", "attention", "exit", "spans"]

# Options that a family's losses share, beside those in the signature of each: type and default.
# They say where a loss is taken and how much it counts, which is `objective`'s business.
_MATCHING: dict[str, tuple[Any, Any]] = {"layers": (Layers, "last"), "balanced": (bool, False)}
_EXITS: dict[str, tuple[Any, Any]] = {
    "exits": (Annotated[list[PositiveInt], Field(min_length=1)], ...),
    "scale": (NonNegativeFloat, 1.0),
    "curriculum": (Literal["none", "rotational", "gradual"], "none"),
}
SHARED: dict[Family, dict[str, tuple[Any, Any]]] = {
    "token": {},
    "hidden": _MATCHING,
    "attention": _MATCHING,
    "exit": _EXITS,
    "spans": {},
}


class Entry(NamedTuple):
    """A loss of the menu."""

    function: Callable[..., Any]
    family: Family

    @property
    def on_labels(self) -> bool:
        """Whether it takes the labels for right, which on the student's own rows would teach it nothing."""
        return self.function in (losses.cross_entropy, exit_cross_entropy)

    @property
    def needs_teacher(self) -> bool:
        return self.family != "exit" and not self.on_labels

    @property
    def own_options(self) -> dict[str, tuple[Any, Any]]:
        """Type and default of each option in the signature."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


MENU: dict[str, Entry] = {
    **{name: Entry(function, "token") for name, function in losses.LOSSES.items()},
    "policy_gradient": Entry(losses.policy_gradient, "token"),
    **{f.__name__: Entry(f, "hidden") for f in (hidden_mse, hidden_cosine)},
    **{f.__name__: Entry(f, "attention") for f in (attention_transfer, attention_relations)},
    **{f.__name__: Entry(f, "exit") for f in (exit_kl, exit_cross_entropy)},
    "cross_tokenizer": Entry(cross_tokenizer, "spans"),
}


def options_of(loss: str) -> dict[str, tuple[Any, Any]]:
    """Type and default of each option of a loss; `...` where a recipe must give it."""
    return {**SHARED[MENU[loss].family], **MENU[loss].own_options}


def option(loss: str, given: Mapping[str, Any], name: str) -> Any:
    """The value of an option: as given in the recipe, or its default."""
    return given.get(name, options_of(loss)[name][1])
