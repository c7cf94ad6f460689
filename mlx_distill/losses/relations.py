"""Relation heads of MiniLMv2: how many there can be, and the scores between positions that they give."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_distill.models.taps import Attention

Relation = Literal["queries", "keys", "values"]


def widths(attention: "Attention", relations: Sequence[Relation]) -> list[int]:
    """Width of each of `relations`, all heads together: heads times their size."""
    arrays = [getattr(attention, relation) for relation in relations]
    return [array.shape[1] * array.shape[3] for array in arrays]


def relation_heads(widths: Sequence[int], most: int) -> int:
    """The largest number of relation heads, up to `most`, that divides all widths."""
    common = math.gcd(*widths)
    return next(heads for heads in range(min(most, common), 0, -1) if common % heads == 0)


def check_relation_heads(heads: int, student_widths: Sequence[int], teacher_widths: Sequence[int]) -> None:
    """Raise a ValueError unless `heads` divides the widths of queries, keys and values on both sides."""
    for side, all_widths in (("student", student_widths), ("teacher", teacher_widths)):
        for width in all_widths:
            if width % heads:
                fitting = relation_heads([*student_widths, *teacher_widths], most=heads)
                raise ValueError(
                    f"{heads} relation heads cannot share the width {width} in the {side}'s attention; "
                    f"take {fitting}, or null"
                )


def relation_scores(vectors: mx.array, heads: int) -> mx.array:
    """x x^T / sqrt(width of a relation head), of queries, keys or values: Wang et al. 2021, section 3.

    Args:
        vectors: (B, H, T, d), any float type and any H; `heads` divides H * d.

    Returns:
        (B, heads, T, T) float32.
    """
    batch, _, length, _ = vectors.shape
    together = vectors.astype(mx.float32).swapaxes(1, 2).reshape(batch, length, heads, -1)
    vectors = together.swapaxes(1, 2)
    return (vectors / math.sqrt(vectors.shape[-1])) @ vectors.swapaxes(-1, -2)
