"""Where the answer of one model leaves another's."""

from typing import Any, NamedTuple

from mlx_distill.data.template import decode_answer
from mlx_distill.speaker import Said, common


class Difference(NamedTuple):
    """Of an answer to the first model's."""

    told: str
    token: int | None  # the first that is another, from 0; None: none is, or the tokenizers are others
    character: int | None  # of the texts, likewise


def difference(first: Said, other: Said, tokenizer: Any, same_tokens: bool) -> Difference:
    """Compare two answers to one prompt.

    Args:
        tokenizer: of the first one. same_tokens: whether the other's has the same tokens.
    """
    character = _parting(first.text, other.text)
    if not same_tokens:
        told = "the same text" if character is None else f"another text from character {character + 1} on"
        return Difference(told, None, character)
    token = _parting(first.tokens, other.tokens)
    if token is None:
        return Difference("the same answer", None, None)
    if token == len(other.tokens):
        told = f"the same {token} tokens, where the first goes on"
    elif token == len(first.tokens):
        told = f"the same {token} tokens, then goes on"
    else:
        mine, its = (decode_answer([said.tokens[token]], tokenizer) for said in (other, first))
        told = f"differs from token {token + 1} on: {mine!r} for {its!r}"
    return Difference(told, token, character)


def _parting(one: Any, other: Any) -> int | None:
    """The first place where two texts or lists differ; None where they are equal."""
    return None if one == other else common(one, other)
