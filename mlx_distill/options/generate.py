"""What is written, by the teacher, a server, or the student itself, and what of it is kept."""

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mlx_distill.options.data import Source
from mlx_distill.options.section import Section, Share


class Sampling(Section):
    """How tokens are drawn: temperature first, then top-k, then top-p, then one token."""

    temperature: NonNegativeFloat = 0.0  # 0: always the likeliest token
    top_k: PositiveInt | None = None  # likeliest tokens that stay; null: all
    top_p: float = Field(
        default=1.0, gt=0, le=1
    )  # fewest likeliest tokens that hold this share of what stayed

    @property
    def temperatures(self) -> list[float]:
        """All at which tokens are drawn."""
        return [self.temperature]

    @model_validator(mode="after")
    def check_sampling(self) -> Self:
        if not any(self.temperatures) and (self.top_k is not None or self.top_p < 1):
            raise ValueError("`top_k` and `top_p` cut what is drawn from; `temperature` 0 draws nothing")
        return self


class Filters(Section):
    """Which answers are dropped, each with its reason; empty and unfinished ones always are."""

    stubs: bool = False  # drop answers of one line with fewer than 10 characters
    min_tokens: PositiveInt | None = None  # of an answer (words, from an endpoint); null turns it off
    max_tokens: PositiveInt | None = None  # of an answer, likewise
    language: Annotated[str, Field(pattern="^[a-z]{2}$")] | None = None  # as in ISO 639-1: en, de, ...
    parses: bool = False  # the program in the answer is Python
    verified: bool = False  # it passes the tests of its row, or equals one of the row's references
    repetition: Share | None = None  # largest share of words in 4-grams that stood before
    perplexity: PositiveFloat | None = None  # largest, under the teacher
    duplicates: Share | None = None  # from this Jaccard similarity on; 0.3 to 1
    decontaminate: PositiveInt | None = None  # n of the n-grams (words) of `data.valid` and `data.test`


class Endpoint(Section):
    """An OpenAI-compatible server on your own network that answers `data.prompts` in place of the teacher."""

    url: str  # up to /v1, such as http://192.168.1.20:8080/v1
    model: str  # its name there
    key_variable: str | None = None  # environment variable that holds the key; null: none is sent
    chat: bool = True  # ask for a chat's next message; false: for the text that follows the prompt
    at_once: PositiveInt = 4  # requests under way
    per_minute: PositiveFloat | None = None  # most requests; null: no limit
    retries: NonNegativeInt = 5  # of a request that fails, after 1, 2, 4, ... seconds
    timeout: PositiveFloat = 120.0  # seconds for one answer

    # What stands in a wrong place may be a secret, and is not shown.
    @field_validator("url")
    @classmethod
    def check_url(cls, value: str) -> str:
        if "@" in value:
            raise ValueError("no name or password in it; a key stands in the environment, see `key_variable`")
        if "?" in value or "#" in value:
            raise ValueError("an address that ends with its path, such as .../v1; got one with `?` or `#`")
        wanted = f"an address such as http://192.168.1.20:8080/v1; got {value[:80]!r}"
        try:
            address = urlsplit(value)
            known = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:
            raise ValueError(wanted) from None
        if not known or not value.isprintable() or " " in value:
            raise ValueError(wanted)
        if address.path.rstrip("/").endswith("/completions"):
            raise ValueError(f"an address up to /v1, to which /chat/completions is added; got {value[:80]!r}")
        return value.rstrip("/")

    @field_validator("key_variable")
    @classmethod
    def check_key_variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "the name of an environment variable in capital letters, such as SERVER_KEY; never the key"
            )
        return value


class OnPolicy(Sampling):
    """The student learns from its own answers to all questions of the data, judged by the live teacher."""

    share: Share = 1.0  # chance that a step's rows are its own (lambda of GKD)
    temperature: NonNegativeFloat = 1.0  # at which it answers
    max_tokens: PositiveInt = 128  # of an answer
    buffer: NonNegativeInt = 0  # own rows kept to be learned again (DistiLLM); 0: each is fresh
    schedule: Literal["constant", "adaptive"] = "constant"  # adaptive: `share` is reached as validation asks


class Generate(Sampling):
    """How `data.prompts` are answered, and which answers are kept."""

    samples: PositiveInt = 1  # answers to each prompt
    keep: Literal["all", "first", "best"] = "all"  # of those that pass the filters; best: likeliest a token
    max_tokens: PositiveInt = 256  # of an answer; unfinished ones are dropped
    batch_size: PositiveInt = 64  # answers written at once
    system: str | None = None  # message that opens each chat, for the writer alone
    examples: Source | None = None  # rows with answers that stand before each prompt, for the writer alone
    thinking: bool | None = None  # `enable_thinking` of the chat template; null: as the template has it
    filters: Filters = Filters()
    endpoint: Endpoint | None = None  # null: the teacher answers
    on_policy: OnPolicy | None = None  # null: all rows are there before training

    @field_validator("examples", mode="before")
    @classmethod
    def from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def check_samples(self) -> Self:
        if self.temperature == 0 and self.samples > 1 and self.endpoint is None:
            raise ValueError(
                f"{self.samples} `samples` at `temperature` 0 are all the same; set a temperature"
            )
        return self
