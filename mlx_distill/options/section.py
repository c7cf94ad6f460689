"""What all sections of a recipe are, and types that several of them use."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Bits = Literal[2, 3, 4, 5, 6, 8]


class Section(BaseModel):
    """A part of a recipe: frozen, typed strictly, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
