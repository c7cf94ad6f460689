"""An answer as it was written, before it is kept or dropped."""

from typing import NamedTuple

from mlx_distill.data.rows import Row


class Written(NamedTuple):
    """One answer to one prompt, from a model here or from a server."""

    prompt: int  # index into `Prepared.prompts`
    sample: int  # which of the answers to it, from 0
    row: Row  # the question
    text: str  # decoded; reasoning and its marks included
    tokens: list[int]  # as the writer wrote them, without the end of its turn; [] from a server
    finished: bool  # the writer ended its turn itself
    mean_nll: float | None = None  # nats a token under the writer, where a server gave it
    end: int | None = None  # the end-of-turn token that it wrote; None: unfinished, or from a server
    refused: str | None = None  # why a server did not answer; then `text` is empty
