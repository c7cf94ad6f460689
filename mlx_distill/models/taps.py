"""Hidden states and attention inside a model, without forking its architecture.

Layers are watched through a subclass that each of them becomes for the time of one call, which leaves
parameter paths alone; attention through `mx.fast.scaled_dot_product_attention`, which mlx-lm's models
look up when they call it. docs/models.md lists the model types for which this works.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.errors import ModelError
from mlx_distill.losses.attention_scores import attention_scores


class Attention(NamedTuple):
    """What one layer's attention was computed from, queries and keys behind their rotary positions."""

    queries: mx.array  # (B, H, T, d)
    keys: mx.array  # (B, K, T, d), H a multiple of K
    values: mx.array  # (B, K, T, dv)
    scale: float  # of the scores, queries times keys
    mask: mx.array | None  # (..., T, T), bool (True: may be seen) or added to scores; None: causal
    sinks: mx.array | None = None  # (H,) scores of a key without a value, which takes its share


@dataclass
class Taps:
    """What one call of a model showed; layers count from 1."""

    hidden: dict[int, mx.array] = field(default_factory=dict)  # 0: what the first layer reads
    attention: dict[int, Attention] = field(default_factory=dict)


@contextmanager
def tapped(model: Any, *, hidden: Collection[int] = (), attention: Collection[int] = ()) -> Iterator[Taps]:
    """Record hidden states and attention of the one call of `model` that is made inside.

    What is recorded is part of the traced graph: gradients flow through it, under `mx.compile` and
    with checkpointed layers too. Where a layer runs or attends several times in one call, the last
    time counts. On leaving, the model is as it was, whatever happened.

    Args:
        model: of mlx-lm; `model.layers` are its layers.
        hidden: layers n of 1..L whose output is asked for, (B, T, D) in the model's own type; 0 is
            what the first layer reads.
        attention: layers n of 1..L whose queries, keys and values are asked for.

    Raises:
        ModelError: there is no such layer, or the call did not show what was asked for.
    """
    layers = list(model.layers)
    _check_numbers(model, len(layers), hidden, first=0)
    _check_numbers(model, len(layers), attention, first=1)
    taps, running = Taps(), list[int]()  # numbers of the layers being executed, innermost last
    watched = {*hidden, *attention} | ({1} if 0 in hidden else set())
    plain = [(layers[n - 1], type(layers[n - 1])) for n in sorted(watched - {0})]
    fused = mx.fast.scaled_dot_product_attention
    for number in sorted(watched - {0}):
        layer = layers[number - 1]
        layer.__class__ = _recording(type(layer), number, taps.hidden, running)
    if attention:
        mx.fast.scaled_dot_product_attention = _noting(fused, set(attention), taps.attention, running)
    try:
        yield taps
    finally:
        mx.fast.scaled_dot_product_attention = fused
        for layer, layer_class in reversed(plain):
            layer.__class__ = layer_class
    taps.hidden = {n: _checked_hidden(model, n, taps.hidden) for n in hidden}
    taps.attention = {n: _checked_attention(model, n, taps.attention) for n in attention}


def attention_probabilities(attention: Attention) -> mx.array:
    """Softmax of `attention_scores`: what each place looks at; times the values, what attention gives.

    A row sums to one, or to less where the model has sinks (Xiao et al. 2024, section 3.3), which take
    the rest. A row that sees nothing, as of padding, is zero.

    Returns:
        (B, H, T, T) float32.
    """
    scores = attention_scores(attention)
    sinks = None if attention.sinks is None else attention.sinks.astype(mx.float32)[:, None, None]
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = mx.maximum(top, sinks)
    # A row of -inf alone would be nan, and its gradient too.
    top = mx.stop_gradient(mx.where(mx.isinf(top), 0.0, top))
    shares = mx.exp(scores - top)
    total = shares.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sinks - top)
    return shares / mx.where(total > 0, total, 1.0)


def _recording(
    layer_class: type[nn.Module], number: int, seen: dict[int, Any], running: list[int]
) -> type[nn.Module]:
    """A subclass of a layer's class, checkpointed or not, that notes what goes in and what comes out."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if number == 1:
            seen[0] = args[0] if args else next(iter(kwargs.values()))
        running.append(number)
        try:
            output = layer_class.__call__(self, *args, **kwargs)
        finally:
            running.pop()
        seen[number] = output[0] if isinstance(output, tuple) else output
        return output

    return type(f"Tapped{layer_class.__name__}", (layer_class,), {"__call__": call})


def _noting(
    fused: Callable[..., mx.array], asked: set[int], seen: dict[int, Attention], running: list[int]
) -> Callable[..., mx.array]:
    """The fused attention, which also notes what it was given inside one of the layers asked for."""

    def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, **options: Any) -> mx.array:
        if running and running[-1] in asked:
            mask = options.get("mask")
            if mask is None:
                mask = mx.ones((q.shape[-2], k.shape[-2]), dtype=mx.bool_)
            seen[running[-1]] = Attention(
                q, k, v, scale, None if isinstance(mask, str) else mask, options.get("sinks")
            )
        return fused(q, k, v, scale=scale, **options)

    return attend


def _check_numbers(model: Any, count: int, asked: Collection[int], first: int) -> None:
    wrong = [number for number in asked if not first <= number <= count]
    if wrong:
        raise ModelError(
            f"this {_type(model)} model has layers {first} to {count}; there is no layer {wrong[0]}"
        )


def _checked_hidden(model: Any, number: int, seen: dict[int, Any]) -> mx.array:
    found = seen.get(number)
    if isinstance(found, mx.array) and found.ndim == 3:
        return found
    why = "the layer gives no (B, T, D) array" if number in seen else "the layer is not called as one"
    raise ModelError(
        f"model type {_type(model)} hides the hidden state of layer {number} ({why}); use losses on "
        "logits, or another model (docs/models.md)"
    )


def _checked_attention(model: Any, number: int, seen: dict[int, Attention]) -> Attention:
    found = seen.get(number)
    if found is not None and found.queries.shape[-2] == found.keys.shape[-2]:
        return found
    why = "it looks at keys chosen for each query" if found else "it does not use the fused attention"
    raise ModelError(
        f"model type {_type(model)} hides the attention of layer {number} ({why}); choose other layers, "
        "losses on hidden states or logits, or another model (docs/models.md)"
    )


def _type(model: Any) -> str:
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))
