"""AWQ and GPTQ: rounding that looks at what a layer reads, as mlx-lm has it.

AWQ (Lin et al. 2023, arXiv 2306.00978, section 3) moves the scale of input channels that matter into the
layer before, and clips what is best clipped. GPTQ (Frantar et al. 2022, arXiv 2210.17323, section 3) rounds
column by column and lets the later ones make up for the error. Both take every layer at one width here,
embedding and head among them, so that all methods make models of the same size.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_distill.data.batch import Encoded
from mlx_distill.errors import Fault
from mlx_distill.models import Loaded
from mlx_distill.options import Grid
from mlx_distill.quantize.levels import Level
from mlx_distill.quantize.rounding import cast, described, layer_grids, leaves, plain_layers

LONGEST = 512  # tokens of a row that layers are measured on
LOGITS = 2**25  # numbers of the logits of a batch


def packed(rows: Sequence[Encoded]) -> mx.array:
    """The tokens of the rows one after the other, (N, T) int32, without padding; the last few are dropped.

    T is the length of the longest row, at most `LONGEST`: places that the model knows.
    """
    tokens = np.concatenate([np.array(row.tokens, dtype=np.int32) for row in rows])
    width = min(LONGEST, max(len(row.tokens) for row in rows))
    return mx.array(tokens[: len(tokens) // width * width].reshape(-1, width))


def awq_quantized(loaded: Loaded, level: Level, tokens: mx.array) -> Loaded:
    """Round by AWQ, in place.

    Args:
        tokens: (N, T) int32, T > 1, whose activations are measured; they are held at once, a layer at a time.
    """
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    grid = level.grid
    if level.options.dtype is not None:
        loaded = cast(loaded, level.options.dtype)
    wanted = layer_grids(loaded.model, grid)
    with _silenced():
        awq_quantize(
            loaded.model,
            tokens,
            AWQ_MODEL_CONFIGS[loaded.config["model_type"]],
            group_size=grid.group_size,
            bits=grid.bits,
            embed_group_size=grid.group_size,
            embed_bits=grid.bits,
        )
    return _checked(loaded, grid, wanted)


def gptq_quantized(loaded: Loaded, level: Level, tokens: mx.array) -> Loaded:
    """Round by GPTQ, in place; embeddings, which it does not treat, are rounded to the nearest.

    Args:
        tokens: (N, T) int32, over which the products of each layer's inputs are summed, in float32.
    """
    from mlx_lm.quant.gptq import gptq_quantize

    grid, model = level.grid, loaded.model
    wanted, plain = layer_grids(model, grid), plain_layers(model)
    own = {path: how for path, how in wanted.items() if path not in plain}
    batch = max(1, min(8, LOGITS // (tokens.shape[1] * _vocabulary(model, tokens))))
    with _silenced(), _in_float32(model), _left_out(model, plain):
        gptq_quantize(model, tokens, grid.bits, grid.group_size, grid.bits, grid.group_size, batch)
    if level.options.dtype is not None:
        loaded = cast(loaded, level.options.dtype)
    nn.quantize(model, class_predicate=lambda path, _: own.get(path, False))
    return _checked(loaded, grid, wanted)


def _vocabulary(model: Any, tokens: mx.array) -> int:
    """Width of the logits, of which none are computed."""
    return model(tokens[:1, :1]).shape[-1]


def _checked(loaded: Loaded, grid: Grid, wanted: Mapping[str, Mapping[str, Any]]) -> Loaded:
    """The model with its config, once every layer is found to be stored as it should be, and nothing beside.

    Raises:
        Fault: mlx-lm left a layer as it was, took another grid, or left calibration data on it.
    """
    for path, module in leaves(loaded.model):
        found = {key: getattr(module, key, None) for key in ("group_size", "bits", "mode")}
        if path in wanted and found != wanted[path]:
            raise Fault(f"{path} was to be stored as {dict(wanted[path])}, and is as {found}")
        if left := {"input_feat", "indices", "H"} & module.keys():
            raise Fault(f"mlx-lm left {min(left)} on {path}, which would be saved with the weights")
    return described(loaded, grid)


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32, in place; at the end what stands in the place of a parameter has its type again.

    Sums of squares over many tokens would overflow float16 and be coarse in bfloat16.
    """
    parameters: Any = tree_flatten(model.parameters())
    types = {path: value.dtype for path, value in parameters}
    model.update(tree_map(_widened, model.parameters()))
    yield

    def narrowed(path: str, value: mx.array) -> mx.array:
        stem, _, name = path.rpartition(".")
        before = types.get(f"{stem}.weight" if name in ("scales", "biases") else path, value.dtype)
        return value.astype(before) if mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(narrowed, model.parameters()))


def _widened(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


@contextlib.contextmanager
def _left_out(model: nn.Module, plain: Mapping[str, Any]) -> Iterator[None]:
    """Hide from mlx-lm what is not to be rounded as all else is.

    It goes by the class, and by whether a module has `to_quantized`; so the others are of a class without it.
    """
    hidden = [(module, type(module)) for path, module in leaves(model) if path not in plain]
    for module, kind in hidden:
        module.__class__ = type(kind.__name__, (kind,), {"to_quantized": property(_nothing)})
    try:
        yield
    finally:
        for module, kind in hidden:
            module.__class__ = kind


def _nothing(module: Any) -> None:
    raise AttributeError("to_quantized")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Let mlx-lm print and draw its bars to nowhere."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
