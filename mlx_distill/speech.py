"""How an answer is asked for on the command line; no model is needed to check it."""

import re
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from mlx_distill.errors import RecipeError
from mlx_distill.mistakes import explain
from mlx_distill.options import Sampling


class Speech(Sampling):
    """How `chat` and `compare` ask for an answer: their options of the command line."""

    min_p: float = Field(
        default=0.0, ge=0, le=1
    )  # tokens stay that have this share of the likeliest's chance
    max_tokens: PositiveInt = 1024  # of an answer
    seed: NonNegativeInt = 0
    system: str | None = None  # message that opens each chat
    thinking: bool | None = None  # `enable_thinking` of the chat template; null: as the template has it
    raw: bool = False  # the text goes on, without the chat template
    trust_remote_code: bool = False  # the model's tokenizer may be Python code

    @model_validator(mode="after")
    def check_speech(self) -> Self:
        if self.min_p and self.temperature == 0:
            raise ValueError("`min_p` cuts what is drawn from; `temperature` 0 draws nothing")
        if self.system is not None and not self.system.strip():
            raise ValueError("`system` is empty; leave it out")
        for key in ("system", "thinking"):
            if self.raw and getattr(self, key) is not None:
                raise ValueError(f"`{key}` is for the chat template, and `raw` leaves that out")
        return self


def speech(**given: Any) -> Speech:
    """Options from a command line, checked.

    Raises:
        RecipeError: every mistake, one a line, in the words of the command line.
    """
    try:
        return Speech(**given)
    except ValidationError as error:
        lines = "\n".join(explain(error, Speech))
        raise RecipeError(re.sub(r"`(\w+)`", lambda m: "--" + m[1].replace("_", "-"), lines)) from None
