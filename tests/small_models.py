"""Tiny models of the types that can be pruned, what their norms read, and units made dead in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes
from tiny_configs import tiny_config

from mlx_distill.models import Loaded
from mlx_distill.prune.axes import parameters_of
from mlx_distill.prune.sizes import Kept
from mlx_distill.prune.types import TYPES

MODULES = {"mistral": "llama"}  # types that mlx-lm runs as others
SHOWN = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mistral", "qwen3_moe"]  # all layouts
TOKENS = mx.array([[1, 2, 3, 5, 8, 13, 21, 34, 55, 26], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])


def small_config(model_type: str, **keys: Any) -> dict[str, Any]:
    """A config of this type with four layers; keys go where the type reads them."""
    config = {**tiny_config(MODULES.get(model_type, model_type)), "model_type": model_type}
    config.setdefault("tie_word_embeddings", False)
    keys = {"rms_norm_eps": 1e-6, **keys}
    if "gemma3" in model_type:
        keys = {"query_pre_attn_scalar": 8, **keys}  # transformers wants no float
    if "text_config" in config:
        config["text_config"] |= {"tie_word_embeddings": False, **keys}
        return config
    return {**config, **keys}


def small_model(model_type: str, *, seed: int = 0, tokenizer: Any = None, **keys: Any) -> Loaded:
    """A model of `small_config`, with no weight at zero or one, where mistakes would not show."""
    config = small_config(model_type, **keys)
    model_class, arguments = _get_classes(config)
    mx.random.seed(seed)
    model: Any = model_class(arguments.from_dict(deepcopy(config)))
    inner = model.language_model if "text_config" in config else model
    if keys.get("tie_word_embeddings") and TYPES[model_type].tied_by_weights:  # as when mlx-lm loads it
        inner.tie_word_embeddings = True
        inner.pop("lm_head")
    offset = TYPES[model_type].norm_offset

    def moved(path: str, array: mx.array) -> mx.array:
        # New norms of Gemma have weights of 1, and so multiply by 2; trained ones by about 1.
        around = array - offset if path.endswith("norm.weight") else array
        return around + 0.1 * mx.random.normal(array.shape)

    model.update(tree_map_with_path(moved, model.parameters()))
    mx.eval(model.parameters())
    return Loaded(model, config, tokenizer)


def arrays_of(loaded: Loaded) -> dict[str, mx.array]:
    found: Any = tree_flatten(loaded.model.parameters())
    return dict(found)


def norm_inputs(loaded: Loaded, tokens: mx.array = TOKENS) -> dict[str, np.ndarray]:
    """Mean square of each channel that each norm reads of these tokens, float64."""
    read: dict[str, np.ndarray] = {}
    with _watched(loaded.model, read):
        mx.eval(loaded.model(tokens))
    return read


@contextmanager
def _watched(model: nn.Module, read: dict[str, np.ndarray]) -> Iterator[None]:
    norms = [(path, module) for path, module in model.named_modules() if path.endswith("norm")]
    plain = [type(module) for _, module in norms]

    def watch(path: str, module: nn.Module) -> None:
        call = type(module).__call__

        def noticed(self: nn.Module, x: mx.array) -> mx.array:
            values = np.array(x.astype(mx.float32), dtype=np.float64).reshape(-1, x.shape[-1])
            read[path] = (values**2).mean(0)
            return call(self, x)

        module.__class__ = type("Watched", (type(module),), {"__call__": noticed})

    for path, module in norms:
        watch(path, module)
    try:
        yield
    finally:
        for (_, module), before in zip(norms, plain, strict=True):
            module.__class__ = before


def zero(
    loaded: Loaded, names: tuple[str, ...], axis: str, places: list[int], layer: int | None = None
) -> None:
    """Set what these places of an axis hold to zero, in arrays whose path has one of these names."""
    arrays = arrays_of(loaded)
    changed = []
    for parameter in parameters_of(loaded.config):
        if not any(name in parameter.path for name in names) or layer not in (None, parameter.layer):
            continue
        array = np.array(arrays[parameter.path])
        for dimension, axes in enumerate(parameter.axes):
            if axes == (axis,):
                np.moveaxis(array, dimension, 0)[places] = 0.0
        changed.append((parameter.path, mx.array(array)))
    assert changed
    loaded.model.load_weights(changed, strict=False)


def gap(one: Loaded, other: Loaded, tokens: mx.array = TOKENS) -> float:
    """Difference between the logits of two models, relative to the logits (both in the 2-norm)."""
    logits, expected = (np.array(loaded.model(tokens), dtype=np.float64) for loaded in (one, other))
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


def without(count: int, *places: int) -> np.ndarray:
    """All places but these."""
    return np.delete(np.arange(count), places)


def only(kept: Kept, layers: list[int]) -> Kept:
    """A choice for all layers, for these alone."""
    lists = {
        axis: [getattr(kept, axis)[layer] for layer in layers]
        for axis in ("feed_forward", "heads", "kv_heads", "experts")
    }
    return kept._replace(layers=layers, **lists)
