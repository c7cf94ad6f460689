"""The sizes of a model and of a smaller one of its type, from `config.json` alone.

Everything follows from the table in types.py: the shapes of all parameters, their number, and which sizes
a type can have at all.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.errors import Fault, RecipeError
from mlx_distill.prune.layers import best_layers, check_layers, layer_changes, possible_layers
from mlx_distill.prune.reading import (
    USUAL,
    check_supported,
    key_of,
    read,
    sparse_layers,
    type_of,
    written,
)
from mlx_distill.prune.sizes import Kept, Sizes
from mlx_distill.prune.types import HEAD, Rows

__all__ = [
    "Parameter",
    "best_layers",
    "check_sizes",
    "check_supported",
    "count_of",
    "everything",
    "fits",
    "opens",
    "parameters_of",
    "possible_layers",
    "resized",
    "shapes_of",
    "sizes_of",
]


class Parameter(NamedTuple):
    """One array of a model."""

    path: str  # as in tree_flatten(model.parameters())
    layer: int | None  # None: outside of layers
    axes: tuple[tuple[str, ...], ...]  # of each dimension, the axes that stand in it one behind the other


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """How large a model is. `feed_forward` is that of an expert where any layer has experts."""
    kind, values = type_of(config), read(config)
    found = {field: values[key_of(kind, field)] for field in USUAL}
    if not any(sparse_layers(kind, values)):
        found |= {"experts": 0, "feed_forward": values["intermediate_size"]}
    return Sizes(**found)


def parameters_of(config: Mapping[str, Any]) -> list[Parameter]:
    """Every array of the model, with the axes of its dimensions."""
    kind, values = type_of(config), read(config)
    prefix = "language_model." if kind.inside else ""

    def parameters(rows: Rows, layer: int | None, start: str) -> list[Parameter]:
        return [
            Parameter(prefix + start + name, layer, tuple(tuple(one.split("+")) for one in axes.split(", ")))
            for name, axes in rows.items()
        ]

    found = parameters(kind.outside, None, "")
    if not values["tie_word_embeddings"]:
        found += parameters(HEAD, None, "")
    optional = [rows for key, rows in kind.optional.items() if values.get(key)]
    for layer, sparse in enumerate(sparse_layers(kind, values)):
        for rows in (kind.layer, kind.sparse if sparse else kind.dense, *optional):
            found += parameters(rows, layer, f"model.layers.{layer}.")
    return found


def lengths_of(config: Mapping[str, Any]) -> list[dict[str, int]]:
    """Of each layer, how many places each axis has; they differ in feed-forward layers beside experts."""
    kind, values, sizes = type_of(config), read(config), sizes_of(config)
    head_dim = values["head_dim"]
    lengths = {
        **sizes._asdict(),
        "heads": sizes.heads * head_dim,
        "kv_heads": sizes.kv_heads * head_dim,
        "head_dim": head_dim,
    }
    return [
        {**lengths, "feed_forward": sizes.feed_forward if sparse else values["intermediate_size"]}
        for sparse in sparse_layers(kind, values)
    ]


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path, as in tree_flatten(model.parameters()), and shape of every parameter."""
    lengths = lengths_of(config)
    return {
        path: tuple(sum(lengths[layer or 0][axis] for axis in axes) for axes in dimensions)
        for path, layer, dimensions in parameters_of(config)
    }


def count_of(config: Mapping[str, Any]) -> int:
    """Weights of the model, as `models.parameter_count` counts them."""
    return sum(prod(shape) for shape in shapes_of(config).values())


def everything(config: Mapping[str, Any]) -> Kept:
    """The choice that leaves a model as it is: what others replace parts of."""
    sizes = sizes_of(config)
    layers = list(range(sizes.layers))
    sparse = sparse_layers(type_of(config), read(config))
    return Kept(
        layers=layers,
        hidden=np.arange(sizes.hidden),
        feed_forward=[np.arange(lengths["feed_forward"]) for lengths in lengths_of(config)],
        heads=[np.arange(sizes.heads) for _ in layers],
        kv_heads=[np.arange(sizes.kv_heads) for _ in layers],
        experts=[np.arange(sizes.experts if sparse[layer] else 0) for layer in layers],
        vocabulary=np.arange(sizes.vocabulary),
    )


def resized(config: Mapping[str, Any], sizes: Sizes, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """The `config.json` of a model of the same type with these sizes.

    Only keys that would read wrong are written, such as `head_dim` where it followed from the hidden width.
    `rms_norm_eps` times the hidden width stays, as the sum of squares does where what goes was 0.

    Args:
        layers: which stay, `sizes.layers` of them. None: the first, or the first that may stay.

    Raises:
        RecipeError: the type cannot have these sizes, or not these layers.
        Fault: these are not `sizes.layers` layers.
    """
    _check_parts(config, sizes, "sizes")
    kind, values, old = type_of(config), read(config), sizes_of(config)
    if layers is None:
        layers = best_layers(config, [float(old.layers - n) for n in range(old.layers)], sizes.layers)
    check_layers(config, layers, "layers")
    if len(layers) != sizes.layers:
        raise Fault(f"{len(layers)} layers for sizes of {sizes.layers} layers")
    changes = layer_changes(config, layers) or {}
    for field in USUAL:
        if field == "experts" and not old.experts:
            continue
        key = key_of(kind, field) if field != "feed_forward" or old.experts else "intermediate_size"
        changes[key] = getattr(sizes, field)
    if sizes.hidden != old.hidden:
        changes["rms_norm_eps"] = values["rms_norm_eps"] * old.hidden / sizes.hidden
    return written(config, changes | ({"head_dim": values["head_dim"]} if kind.reads_head_dim else {}))


def check_sizes(config: Mapping[str, Any], sizes: Sizes, where: str) -> None:
    """Refuse sizes that a model of this type cannot have, or that are not a part of this model's.

    Raises:
        RecipeError: names the size by its key in config.json, and what would fit.
    """
    _check_parts(config, sizes, where)
    if not opens(config, sizes):
        near = [n for n in range(1, sizes_of(config).heads + 1) if sizes.hidden % n == 0]
        raise RecipeError(
            f"`{where}`: {sizes.heads} num_attention_heads do not divide hidden_size {sizes.hidden}, and "
            f"transformers opens no such {config['model_type']}; with this hidden_size take "
            + ", ".join(map(str, near))
        )


def opens(config: Mapping[str, Any], sizes: Sizes) -> bool:
    """Whether transformers, which loads the tokenizer, accepts these sizes, if it accepts the model's own."""
    own = sizes_of(config)
    bound = type_of(config).heads_divide and own.hidden % own.heads == 0
    return not bound or sizes.hidden % sizes.heads == 0


def _check_parts(config: Mapping[str, Any], sizes: Sizes, where: str) -> None:
    kind, values, old = type_of(config), read(config), sizes_of(config)
    for field, now in sizes._asdict().items():
        key, most = key_of(kind, field), getattr(old, field)
        if field == "experts" and not most:
            if now:
                raise RecipeError(f"`{where}`: {now} {key}, and this {config['model_type']} has no experts")
        elif not 1 <= now <= most:
            raise RecipeError(f"`{where}`: {key} {now} is not within 1 to {most}, which the model has")
    group = old.heads // old.kv_heads
    if sizes.heads % sizes.kv_heads or sizes.heads // sizes.kv_heads > group:
        pairs = [(n * k, k) for k in range(1, old.kv_heads + 1) for n in range(1, group + 1)]
        near = sorted(pairs, key=lambda pair: (abs(pair[0] - sizes.heads), abs(pair[1] - sizes.kv_heads)))
        raise RecipeError(
            f"`{where}`: {sizes.heads} num_attention_heads and {sizes.kv_heads} num_key_value_heads do not "
            f"divide: each key and value head keeps equally many of its {group} query heads; nearest are "
            + " or ".join(f"{heads} and {kv_heads}" for heads, kv_heads in near[:2])
        )
    head_dim = values["head_dim"]
    if not kind.reads_head_dim and sizes.hidden != sizes.heads * head_dim:
        raise RecipeError(
            f"`{where}`: in a {config['model_type']} a head has hidden_size / num_attention_heads channels, "
            f"and must keep its {head_dim}: {sizes.heads} heads need hidden_size {sizes.heads * head_dim}, "
            f"got {sizes.hidden}"
        )
    active = values.get("num_experts_per_tok", 1)
    if old.experts and sizes.experts < active:
        raise RecipeError(
            f"`{where}`: {sizes.experts} {key_of(kind, 'experts')}, but each token goes to {active} "
            f"(num_experts_per_tok); keep at least {active}"
        )


def fits(config: Mapping[str, Any], sizes: Sizes) -> bool:
    """Whether a model of this type can be cut to these sizes; `opens` asks more of them."""
    try:
        _check_parts(config, sizes, "sizes")
    except RecipeError:
        return False
    return True
