"""Two-layer models, tokenizers and recipes, small enough to build in every test."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill import models, recipe
from mlx_distill.data.batch import Encoded
from mlx_distill.models import Loaded
from mlx_distill.options import NewTokenizer, Shape
from mlx_distill.recipe import Recipe
from mlx_distill.tokenizer import train_tokenizer

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
TEXTS = [f"def solve(x):\n    return x + {i}\n" for i in range(100)]


def tiny_tokenizer() -> Any:
    return train_tokenizer(TEXTS, NewTokenizer(pieces=64, byte_fallback=False))


class Ids:
    """As much of a tokenizer as building a model takes."""

    eos_token_id, bos_token_id = 1, None

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}


def tiny_model(vocabulary: int = 50, seed: int = 0, **shape: Any) -> Loaded:
    return models.build(Shape(**{**SHAPE, **shape}), Ids(vocabulary), seed)


def tiny_recipe(**sections: Any) -> Recipe:
    """A recipe for `tiny_model`; sections are merged into it, key by key."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "student": {"shape": SHAPE},
        "teacher": {"model": "embedded"},
        "data": {"train": {"source": "pocket", "rows": 10}},
        "objective": {"forward_kl": {}, "cross_entropy": {"weight": 0.5}},
        "train": {"steps": 4, "learning_rate": 1e-2, "batch_tokens": 256, "save_every": 0, "log_every": 0},
        "evaluate": {"tasks": []},
    }
    for name, section in sections.items():
        replace = name == "objective" or not isinstance(section, dict) or not isinstance(tree.get(name), dict)
        tree[name] = section if replace else {**tree[name], **section}
    return recipe.decode(tree)


def rows_of(lengths: list[int], vocabulary: int = 50, seed: int = 0) -> list[Encoded]:
    """Random rows whose completions have these lengths, behind prompts of three tokens."""
    random = np.random.default_rng(seed)
    return [Encoded(random.integers(2, vocabulary, size=3 + n).tolist(), 3) for n in lengths]


def largest_gap(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference between two trees of one shape, relative to the largest value."""
    assert one.keys() == other.keys()
    scale = max(float(mx.abs(value).max()) for value in other.values())
    return max(float(mx.abs(one[name] - other[name]).max()) for name in one) / scale
