"""Filters on the size of an answer."""

from collections.abc import Sequence

from mlx_distill.filters.material import Material
from mlx_distill.written import Written

STUB = 10  # characters


def stubs(written: Sequence[Written], on: bool, material: Material) -> list[str | None]:
    """Answers of one line with fewer than 10 characters, white space around them left out.

    The filter of simple self-distillation (arXiv 2604.01193), which has no other.
    """

    def reason(one: Written) -> str | None:
        text = one.text.strip()
        stub = "\n" not in text and len(text) < STUB
        return f"one line of {len(text)} characters, fewer than {STUB}" if stub else None

    return [reason(one) for one in written]


def min_tokens(written: Sequence[Written], limit: int, material: Material) -> list[str | None]:
    """Answers with fewer tokens; worked steps count, the end of the turn does not."""
    sizes = [_size(one) for one in written]
    return [f"{size} {unit}, fewer than {limit}" if size < limit else None for size, unit in sizes]


def max_tokens(written: Sequence[Written], limit: int, material: Material) -> list[str | None]:
    """Answers with more tokens."""
    sizes = [_size(one) for one in written]
    return [f"{size} {unit}, more than {limit}" if size > limit else None for size, unit in sizes]


def _size(one: Written) -> tuple[int, str]:
    """How long an answer is, and in what: a server sends no tokens, so its answers count words."""
    if one.tokens:
        return len(one.tokens), "tokens"
    return len(one.text.split()), "words"
