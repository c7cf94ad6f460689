"""What a `config.json` says of a model that can be pruned, with mlx-lm's defaults, and how to change it."""

from collections.abc import Mapping
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.prune.types import TYPES, ModelType

USUAL = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "feed_forward": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "experts": "num_experts",
    "vocabulary": "vocab_size",
}  # field of `Sizes` -> config key


def check_supported(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model that cannot be pruned, from its config alone.

    Raises:
        ModelError: of an unknown type, quantized, or without a key that its sizes need.
    """
    name = config.get("model_type")
    if name not in TYPES:
        raise ModelError(f"`{where}`: model type {name} cannot be pruned; use one of {', '.join(TYPES)}")
    text = config.get(TYPES[name].inside, {}) if TYPES[name].inside else {}
    if any(part.get("quantization") or part.get("quantization_config") for part in (config, text)):
        raise ModelError(
            f"`{where}`: the model is quantized, and its packed weights cannot be cut; "
            "prune the unquantized model it was made from, and quantize what comes out"
        )
    try:
        read(config)
    except KeyError as error:
        raise ModelError(
            f"`{where}`: config.json of this {name} lacks {error}; download the model again"
        ) from None


def type_of(config: Mapping[str, Any]) -> ModelType:
    """The entry of a config's `model_type` in the table.

    Raises:
        ModelError: there is none.
    """
    if config.get("model_type") not in TYPES:
        check_supported(config, "model")
    return TYPES[config["model_type"]]


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model, with what mlx-lm puts where a key is missing.

    Always there: the keys of all sizes (`num_experts` 0 without experts), `head_dim`, `rms_norm_eps` and
    `tie_word_embeddings`.

    Raises:
        KeyError: a key is missing that has no default.
    """
    kind = type_of(config)
    given = {**config, **config[kind.inside]} if kind.inside else dict(config)
    for key in kind.outermost:
        given[key] = config.get(key)
    values = {**kind.defaults, **{key: value for key, value in given.items() if value is not None}}
    heads = values["num_attention_heads"]
    values.setdefault("num_key_value_heads", heads)
    if not kind.reads_head_dim or not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // heads
    if kind.tied is not None:
        values["tie_word_embeddings"] = kind.tied
    if not kind.sparse:
        values["num_experts"] = 0
    for key in (
        *(key_of(kind, field) for field in USUAL),
        "intermediate_size",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        values[key]  # a KeyError names what is missing
    return values


def key_of(kind: ModelType, field: str) -> str:
    """The config key of a field of `Sizes`."""
    return kind.keys.get(field, USUAL[field])


def sparse_layers(kind: ModelType, values: Mapping[str, Any]) -> list[bool]:
    """Of each layer, whether it has experts. `values` are `read`'s."""
    if not kind.sparse or not values[key_of(kind, "experts")]:
        return [False] * values["num_hidden_layers"]
    step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers", [])
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(values["num_hidden_layers"])]


def written(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which these keys read so, one after the other; those that do already are left alone."""
    kind = type_of(config)
    new = dict(config)
    text = new[kind.inside] = dict(config[kind.inside]) if kind.inside else {}
    for key, value in changes.items():
        # Read anew for each: what stands for a missing key may follow from one that was just written.
        if read(new).get(key) == value:
            continue
        places = [place for place in (new, text) if key in place]
        for place in places or [new if not kind.inside or key in kind.outermost else text]:
            place[key] = value
    if not kind.inside:
        del new[""]
    return new
