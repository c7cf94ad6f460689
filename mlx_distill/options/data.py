"""What is read."""

from typing import Any, Literal, Self

from pydantic import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mlx_distill.options.section import Fraction, Section


class Source(Section):
    """Where rows come from. In a recipe a plain string stands for `{source: STRING}`."""

    source: str  # a .jsonl file, a folder, a Hub dataset, or a corpus: pocket, stdlib
    task: Literal["code", "summary", "both", "trace"] | None = None  # of a corpus; null there: code
    split: str | None = None  # null: the one that the key names; `train` for prompts and replay
    rows: PositiveInt | None = None  # at most so many; null: all (a corpus needs a number)
    start: NonNegativeInt = 0  # rows passed over first
    seed: NonNegativeInt = 0  # of a corpus: draws its functions, their order and their words
    weight: PositiveFloat | None = None  # share of the training rows drawn from it; null: as many as it has


class Reasoning(Section):
    """Worked steps that stand before an answer, between two marks."""

    open: str = "<think>"
    close: str = "</think>"
    learn: Literal["both", "answer", "two_tasks"] = "both"  # two_tasks: steps and answer as rows of their own
    alpha: Fraction = 0.5  # two_tasks: share of the answers in the loss

    @model_validator(mode="after")
    def check_marks(self) -> Self:
        if not self.open.strip() or not self.close.strip():
            raise ValueError("`open` and `close` are marks that can be seen, such as <think> and </think>")
        if self.open in self.close or self.close in self.open:
            raise ValueError(f"one mark holds the other: {self.open!r} and {self.close!r}; change one")
        if self.alpha != 0.5 and self.learn != "two_tasks":
            raise ValueError("`alpha` weighs steps against answers; it needs `learn` two_tasks")
        return self


class Data(Section):
    """What is read. `valid` and `test` default to those of a `train` that is a folder or dataset."""

    train: Source | None = None  # rows with answers: the user's labels
    prompts: Source | None = None  # rows whose answers the teacher writes
    valid: Source | None = None  # watched while training
    test: Source | None = None  # touched by `evaluate` alone
    replay: list[Source] = []  # more rows with answers, so that what they show is not forgotten
    reasoning: Reasoning | None = None  # null: what stands between marks is text like any other
    max_tokens: PositiveInt = 1024  # longer rows are left out, and counted in the log
    count: Literal["completion", "all"] = "completion"  # labels that the losses see

    @field_validator("train", "prompts", "valid", "test", mode="before")
    @classmethod
    def from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("replay", mode="before")
    @classmethod
    def from_strings(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{"source": one} if isinstance(one, str) else one for one in value]

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.train is None and self.prompts is None:
            raise ValueError("needs `train` (rows with answers), `prompts` (rows without), or both")
        return self
