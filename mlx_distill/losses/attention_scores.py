"""Scores of one layer's attention, and which keys a query may see.

Duck-typed: `attention` is a `models.taps.Attention`. Importing it here would close a circle, since
loading a model reads a recipe, and a recipe knows the losses.
"""

from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_distill.models.taps import Attention

# An added mask at or below this hides a key: exp(-10000) is 0 in every float type. What models add to
# hide one is -inf, the lowest number of their type (-65504 in float16), -1e9 or -1e4.
_HIDDEN = -1e4


def attention_scores(attention: "Attention") -> mx.array:
    """Scores before the softmax: scale * queries @ keys^T, plus the mask where that is one to add.

    Vaswani et al. 2017, section 3.2.1. Each of the K key heads serves H / K query heads, as in
    grouped-query attention (Ainslie et al. 2023, section 2.2). A mask to add may hold scores itself (the
    rotary part in multi-head latent attention), so gradients flow into it. Sinks are no keys and have
    no score here.

    Returns:
        (B, H, T, T) float32, -inf at keys that may not be seen: cover them with `mx.where` before any
        arithmetic that has a gradient.
    """
    queries, keys = attention.queries.astype(mx.float32), attention.keys.astype(mx.float32)
    batch, heads, length, size = queries.shape
    grouped = (queries * attention.scale).reshape(batch, keys.shape[1], -1, length, size)
    scores = (grouped @ keys[:, :, None].swapaxes(-1, -2)).reshape(batch, heads, length, -1)
    mask = attention.mask
    if mask is not None and mask.dtype != mx.bool_:
        scores = scores + mask.astype(mx.float32)
    return mx.where(_seen(attention), scores, -mx.inf)


def visible_keys(attention: "Attention") -> mx.array:
    """(B or 1, 1, T, T) bool: the keys that a query may see in every head."""
    seen = _seen(attention)
    while seen.ndim < 4:
        seen = seen[None]
    return seen.all(axis=1, keepdims=True)


def _seen(attention: "Attention") -> mx.array:
    """(..., T, T) bool, False where a head may not look."""
    mask = attention.mask
    if mask is None:
        rows, columns = attention.queries.shape[-2], attention.keys.shape[-2]
        return mx.arange(columns)[None] <= mx.arange(columns - rows, columns)[:, None]
    return mask if mask.dtype == mx.bool_ else mask > _HIDDEN
