"""Layers that compute with weights in few bits while what these are made of learns.

Each layer becomes, in place, an instance of a subclass of its own class, which reads other values for its
weight: those of the quantized layer that is saved in the end.

- dwq: codes of `mx.quantize`, which stay, times scales plus biases, which learn.
- qad: weights that learn, rounded to the nearest on the way. Rounding has no gradient, so the
  straight-through one stands in for it (Bengio et al. 2013, arXiv 1308.3432, section 4): that of the rounded
  weight is taken for that of the weight.

What learns is counted in steps of the grid, in float32 and from zero on. So one learning rate means the same
in every model, layer and width of bits: how much of a step a weight may move in one update.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.keys import key_word

Values = Callable[[Any, mx.array | None], mx.array]  # of a layer: its weight, or some rows of it


class Stored(NamedTuple):
    """How a layer's weight is saved in the end."""

    grid: dict[str, Any]  # bits, group_size and mode
    dtype: mx.Dtype  # of what is rounded, and so of scales and biases


def learn_scales(model: nn.Module, grids: Mapping[str, dict[str, Any]]) -> None:
    """Quantize layers, in place, so that the two ends of each group's grid learn, and nothing else.

    They give its scale and its bias: code 0 stands for `low` and the last code for `high`, each in steps from
    where `mx.quantize` put it.

    Args:
        grids: of each layer by path: bits, group size, and mode affine.
    """
    model.freeze()
    for layer, stored in _stored(model, grids):
        layer.weight, layer.scales, layer.biases = mx.quantize(layer.weight, **stored.grid)
        layer.freeze()
        layer.low = layer.high = mx.zeros(layer.scales.shape)
        _swap(layer, stored, of_codes)
    mx.eval(model.parameters())


def learn_weights(
    model: nn.Module, grids: Mapping[str, dict[str, Any]], *, rank: int | None = None, seed: int = 0
) -> None:
    """Let layers compute with their weights rounded, in place, while the weights learn, and nothing else.

    Args:
        grids: of each layer by path: bits, group size and mode.
        rank: of LoRA matrices that learn in place of the weights; their product is what is added to them.
        seed: of these matrices.
    """
    model.freeze()
    for place, (layer, stored) in enumerate(_stored(model, grids)):
        layer.unit = step_of(layer.weight, stored.grid)
        layer.freeze()
        if rank is None:
            layer.moves = mx.zeros(layer.weight.shape)
        else:
            *experts, outputs, inputs = layer.weight.shape
            key = mx.random.key(key_word(seed, "rounded adapters", place))
            limit = math.sqrt(3 / rank)  # an update of `lora_b` then moves a weight by about as much
            layer.lora_a = mx.random.uniform(-limit, limit, (*experts, rank, inputs), key=key)
            layer.lora_b = mx.zeros((*experts, outputs, rank))
        _swap(layer, stored, nearest)
    mx.eval(model.parameters())


def learned(model: nn.Module) -> dict[str, mx.array]:
    """What was learned, by the parameter of the saved model that it becomes, in the type that this has."""
    found: dict[str, mx.array] = {}
    for path, layer in model.named_modules():
        if "low" in layer:
            found[f"{path}.scales"], found[f"{path}.biases"] = scales_of(layer)
        elif "unit" in layer:
            found[f"{path}.weight"] = moved(layer).astype(layer.stored.dtype)
    return found


def step_of(weight: mx.array, grid: dict[str, Any]) -> mx.array:
    """How far apart the values of a grid are, in the mean over a matrix: a scalar, by what rounding changes.

    Errors that are alike from 0 to half a step are 1 / sqrt(12) steps in the root of their mean square.
    """
    rounded = mx.dequantize(*mx.quantize(weight, **grid), dtype=mx.float32, **grid)
    return mx.sqrt(12 * mx.square(rounded - weight.astype(mx.float32)).mean(-1).mean())


def scales_of(layer: Any, rows: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Scales and biases of a layer whose ends learn, in the type in which they are saved."""
    step, bias, low, high = (
        _of(layer, name, rows).astype(mx.float32) for name in ("scales", "biases", "low", "high")
    )
    codes = 2 ** layer.stored.grid["bits"] - 1
    scale, bias = step * (1 + (high - low) / codes), bias + step * low
    return scale.astype(layer.stored.dtype), bias.astype(layer.stored.dtype)


def of_codes(layer: Any, rows: mx.array | None = None) -> mx.array:
    """Codes times scales plus biases."""
    return mx.dequantize(_of(layer, "weight", rows), *scales_of(layer, rows), **layer.stored.grid)


def nearest(layer: Any, rows: mx.array | None = None) -> mx.array:
    """The weights rounded to the nearest on MLX's grid; the gradient passes as if they were not."""
    weight, (grid, dtype) = moved(layer, rows), layer.stored
    whole = mx.stop_gradient(weight).astype(dtype)
    # Where `mx.compile` fuses rounding with what comes before it, MLX 0.32.4 raises an IndexError.
    [whole] = mx.depends([whole], [whole])
    rounded = mx.dequantize(*mx.quantize(whole, **grid), dtype=dtype, **grid).astype(mx.float32)
    # Not weight + (rounded - weight), which is off by a rounding of its own.
    return (mx.stop_gradient(rounded) + (weight - mx.stop_gradient(weight))).astype(dtype)


def moved(layer: Any, rows: mx.array | None = None) -> mx.array:
    """The weights as they have been learned, in float32, not rounded."""
    if "moves" in layer:
        moves = _of(layer, "moves", rows)
    else:
        moves = _of(layer, "lora_b", rows) @ layer["lora_a"]
    return _of(layer, "weight", rows).astype(mx.float32) + layer["unit"] * moves


def _of(layer: Any, name: str, rows: mx.array | None) -> mx.array:
    return layer[name] if rows is None else layer[name][rows]


def _stored(model: nn.Module, grids: Mapping[str, dict[str, Any]]) -> list[tuple[Any, Stored]]:
    modules: dict[str, Any] = dict(model.named_modules())
    return [(modules[path], Stored(grid, modules[path].weight.dtype)) for path, grid in grids.items()]


def _swap(layer: Any, stored: Stored, values: Values) -> None:
    object.__setattr__(layer, "stored", stored)  # `Module` would put a tuple among its arrays
    layer.__class__ = _learning(type(layer), values)


def _learning(plain: type[nn.Module], values: Values) -> type[nn.Module]:
    """A subclass of a layer's class that computes with `values` in place of its weight."""

    def over(method: str) -> Callable[..., mx.array]:
        def call(self: Any, x: mx.array, *others: Any, **how: Any) -> mx.array:
            def compute(parameters: Any, x: mx.array) -> mx.array:
                own = self.parameters()
                self.update(parameters)
                self["weight"] = values(self, None)
                try:
                    return getattr(plain, method)(self, x, *others, **how)
                finally:
                    self.update(own)

            # A product keeps its factors for the backward pass: all weights as floats, were they not made
            # again there.
            return mx.checkpoint(compute)(self.trainable_parameters(), x)

        return call

    methods = {"__call__": over("__call__")}
    if issubclass(plain, nn.Embedding):  # only the rows that are looked up
        methods = {"__call__": values, "as_linear": over("as_linear")}
    made: Any = type(f"Learning{plain.__name__}", (plain,), methods)
    return made
