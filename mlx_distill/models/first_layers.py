"""The first layers of a model as an ordinary smaller model, with the same norm and head."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.errors import ModelError
from mlx_distill.models.early_exit import Stack
from mlx_distill.models.loading import Loaded

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # one entry a layer
_PROBE = [[0, 1, 2, 1]]


def first_layers(loaded: Loaded, layers: int) -> Loaded:
    """The model that answers from layer `layers`: a depth cut, and what an exit is when it stands alone.

    Its logits are `head(norm(hidden after that layer))` of the whole model, bit for bit, which is
    checked. It holds the very arrays of the whole model, quantized ones too, in modules of its own:
    training one does not move the other. `models.save` writes it as a folder that `mlx_lm.load` opens.

    Args:
        layers: 1 to L; L gives the whole model again.

    Raises:
        ModelError: no such layer; adapters that are not merged yet; a model type that `Stack` refuses,
            or whose config does not say how many layers there are.
    """
    from mlx_lm.utils import _get_classes

    stack = Stack(loaded.model)
    total = len(stack.layers)
    if not 1 <= layers <= total:
        raise ModelError(f"first layers: {layers} of {total}; give 1 to {total}")
    if any(hasattr(module, "fuse") for _, module in loaded.model.named_modules()):
        raise ModelError("first layers: merge the adapters first, with `models.fused`")
    config = _cut(loaded.config, total, layers)
    model_class, arguments = _get_classes(config)
    small = model_class(arguments.from_dict(config))
    if len(small.layers) != layers:
        raise ModelError(f"first layers: the config of {_name(loaded)} does not set how many layers it has")
    try:
        _share(loaded.model, small)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"first layers: {_name(loaded)} changes its modules with its depth ({error})"
        ) from None
    small.eval()
    tokens, caches = mx.array(_PROBE), stack.caches()
    expected = stack.logits(stack.run(stack.embed(tokens, caches), caches, 0, layers))
    if not mx.array_equal(small(tokens), expected).item():
        raise ModelError(f"first layers: {layers} layers of {_name(loaded)} alone give other logits")
    return Loaded(small, config, loaded.tokenizer)


def _cut(config: dict[str, Any], total: int, layers: int) -> dict[str, Any]:
    cut = {key: layers for key in _COUNTS if config.get(key) == total}
    lists = {key: config[key][:layers] for key in _LISTS if isinstance(config.get(key), list)}
    return copy.deepcopy({**config, **cut, **lists})


def _share(whole: nn.Module, small: nn.Module) -> None:
    """Put the arrays of `whole` where `small` has the same name; quantized modules replace plain ones."""
    modules = dict(small.named_modules())
    leaves = tree_flatten(whole.leaf_modules(), is_leaf=nn.Module.is_module)
    other = [
        (name, leaf) for name, leaf in leaves if name in modules and type(leaf) is not type(modules[name])
    ]
    small.update_modules(tree_unflatten([(name, copy.copy(leaf)) for name, leaf in other]))
    arrays = dict(tree_flatten(whole.parameters()))
    small.update(tree_unflatten([(name, arrays[name]) for name, _ in tree_flatten(small.parameters())]))


def _name(loaded: Loaded) -> str:
    return f"model type {loaded.config.get('model_type')!r}"
