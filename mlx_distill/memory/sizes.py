"""What of a model's config.json and files decides how much memory it takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx_distill.models.headers import Stored
from mlx_distill.options import Shape, Student


class Sizes(NamedTuple):
    """Widths of a model, as numbers a token, and what its weights take."""

    layers: int
    hidden: int
    wide: int  # of the feed-forwards that a token meets
    routed: int  # channels of what its experts give before they are summed up; 0 without experts
    queries: int  # channels of all query heads
    keys: int  # of all key heads, and as many of the value heads
    heads: int
    vocabulary: int  # rows of the last projection
    numbers: float  # of weights
    bytes: float  # of weights, as they are held
    each: float  # bytes of a number that it computes with

    @property
    def state(self) -> int:
        """Bytes of keys and values that a written token leaves behind."""
        return int(self.layers * 2 * self.keys * self.each)


def sizes_of(
    config: Mapping[str, Any], numbers: float, held: float, vocabulary: int, each: float = 4.0
) -> Sizes:
    """Sizes by the keys of Hugging Face; what a config tells in a way of its own counts as 0.

    Args:
        numbers: of weights. held: bytes that they take. each: bytes of a number in activations.
        vocabulary: of the tokenizer, where the config has none.
    """
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    size = number(config, "head_dim") or (hidden // heads if heads else 0)
    wide = number(config, "moe_intermediate_size") or number(config, "intermediate_size")
    chosen = number(config, "num_experts_per_tok")
    wide *= chosen or 1
    return Sizes(
        layers=number(config, "num_hidden_layers"),
        hidden=hidden,
        wide=wide,
        routed=chosen * hidden,
        queries=heads * size,
        keys=(number(config, "num_key_value_heads") or heads) * size,
        heads=heads,
        vocabulary=number(config, "vocab_size") or vocabulary,
        numbers=numbers,
        bytes=held,
        each=each,
    )


def numbers_of(shape: Shape, vocabulary: int) -> float:
    """Weights of a new model."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    size = shape.head_dim or hidden // heads
    attention = hidden * size * (2 * heads + 2 * (shape.num_key_value_heads or heads))
    feed_forward = 3 * hidden * shape.intermediate_size
    if shape.num_experts is not None:
        feed_forward = shape.num_experts * (feed_forward + hidden)  # and a row of the router each
    layer = attention + feed_forward + 2 * hidden
    return shape.num_hidden_layers * layer + vocabulary * hidden * (1 if shape.tie_word_embeddings else 2)


def adapter_numbers(options: Student, stored: Stored, config: Mapping[str, Any]) -> float:
    """Numbers in the LoRA matrices beside every matrix of the last layers."""
    layers = number(config, "num_hidden_layers") or 1
    share = min(1.0, (options.layers or layers) / layers)
    return share * options.rank * sum(rows + columns for rows, columns in stored.matrices)


def number(config: Mapping[str, Any], key: str) -> int:
    """A size in a config.json; 0 where it is told in a way of its own."""
    found = config.get(key, config.get("text_config", {}).get(key))
    return found if isinstance(found, int) else 0
