"""A smaller model cut out of a bigger one of the same type.

Along each dimension of each array, the places that stay of its axis are taken, as types.py says. Where the
hidden width is cut, a norm divides by the mean over fewer channels, so its weight is corrected for that.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.errors import ModelError
from mlx_distill.models import Loaded
from mlx_distill.prune.axes import lengths_of, parameters_of, resized, shapes_of
from mlx_distill.prune.kept import kept_sizes
from mlx_distill.prune.reading import check_supported, read, type_of, written
from mlx_distill.prune.rescaling import Rescaling
from mlx_distill.prune.sizes import Kept
from mlx_distill.prune.taking import places_of, taken


def cut(loaded: Loaded, kept: Kept, inputs: Mapping[str, np.ndarray] | None = None) -> Loaded:
    """A new, smaller model of the same type, with its config, and the tokenizer as it is.

    Weights keep their type. What stays whole is shared with the big model and the rest is copied, so that
    the big one can be let go. Ids of tokens in the config do not move with the vocabulary.

    Args:
        kept: what stays; `axes.everything` is a choice to start from.
        inputs: `Statistics.inputs`. With it, what a norm over a cut width gives is in the mean as before:
            its weight is multiplied by sqrt((m' + e') / (m + e)), where m is the mean square of what it
            reads, e its epsilon, and m' and e' are those in the cut model. That is exact where what goes
            was 0. Without it, weights of norms stay: right if what goes is as large as what stays.

    Raises:
        ModelError: the model cannot be cut: its type, quantized weights, adapters, unknown parameters.
        RecipeError: a model of this type cannot have these sizes or layers.
        Fault: `kept` contradicts itself or the model.
    """
    arrays = _arrays(loaded)
    config = _true_config(loaded.config, arrays)
    _check_known(config, arrays)
    small = resized(config, kept_sizes(config, kept), kept.layers)
    head_dim, lengths = read(config)["head_dim"], lengths_of(config)
    new_places = {layer: n for n, layer in enumerate(kept.layers)}
    rescaling = Rescaling(config, small, inputs)
    weights: dict[str, mx.array] = {}
    for parameter in parameters_of(config):
        n = 0 if parameter.layer is None else new_places.get(parameter.layer)
        if n is None:
            continue  # its layer goes
        places = places_of(kept, n, head_dim)
        array = taken(arrays[parameter.path], parameter.axes, places, lengths[kept.layers[n]])
        array = rescaling(array, parameter, places)
        mx.eval(array)  # one by one, so that nothing holds on to the big model
        path = parameter.path.replace(f".layers.{parameter.layer}.", f".layers.{n}.")
        weights[path] = array
    return Loaded(built(small, weights, loaded.model.training), small, loaded.tokenizer)


def _arrays(loaded: Loaded) -> dict[str, mx.array]:
    check_supported(loaded.config, "model")
    for name, module in loaded.model.named_modules():
        if "scales" in module:
            raise ModelError(
                f"{name} is quantized, and packed weights cannot be cut; prune the unquantized model it was "
                "made from, and quantize what comes out"
            )
        if "lora_a" in module:
            raise ModelError(f"{name} has LoRA or DoRA matrices, which cannot be cut; merge them first")
    found: Any = tree_flatten(loaded.model.parameters())
    return dict(found)


def _true_config(config: dict[str, Any], arrays: Mapping[str, mx.array]) -> dict[str, Any]:
    """The config, saying what the model does where mlx-lm goes by the stored weights."""
    if not type_of(config).tied_by_weights:
        return config
    return written(config, {"tie_word_embeddings": not any("lm_head" in path for path in arrays)})


def _check_known(config: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> None:
    """The table and the model agree about every array, so that none is left as it was by mistake."""
    shapes = shapes_of(config)
    for path in sorted(arrays.keys() | shapes.keys()):
        expected, found = shapes.get(path), arrays[path].shape if path in arrays else None
        if expected != found:
            raise ModelError(
                f"{path}: {found or 'nothing'} in the model, {expected or 'nothing'} after its config.json; "
                f"this {config['model_type']} is not laid out as those that can be pruned"
            )


def built(config: dict[str, Any], weights: dict[str, mx.array], training: bool) -> nn.Module:
    """A model of this config with these weights, as mlx-lm builds it when it loads one."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    model: Any = model_class(arguments.from_dict(deepcopy(config)))  # gemma3 writes into what it is given
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)  # drops the head of a gemma3 without one
    model.load_weights(list(weights.items()), strict=True)
    return model.train(training)
