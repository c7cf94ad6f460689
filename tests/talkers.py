"""Model folders for tests of `chat` and `compare`: with a chat template, without, with a long context."""

from pathlib import Path
from typing import Any

from mlx.utils import tree_map
from tiny import SHAPE

from mlx_distill import models
from mlx_distill.options import NewTokenizer, Shape
from mlx_distill.tokenizer import train_tokenizer

TEXTS = [f"def add(x, {i}):\n    return x + {i}\n<user>Größe</user> quick zebras jump" for i in range(60)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}=={% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


def make(folder: Path) -> Path:
    """Fill `folder` with `plain`, `chatty` and others."""
    save(folder / "plain", seed=1)
    save(folder / "chatty", template=TEMPLATE, seed=2, max_position_embeddings=600)
    save(folder / "endless", seed=3, ends=False, max_position_embeddings=1_000_000)
    save(folder / "strict", template=NO_SYSTEM, seed=4)
    return folder


def tokenizer(template: str | None = None) -> Any:
    made = train_tokenizer(TEXTS, NewTokenizer(pieces=330))
    made.chat_template = template
    return made


def save(folder: Path, *, seed: int, template: str | None = None, ends: bool = True, **shape: Any) -> None:
    """Save a model whose next token depends on all before it; small new weights say one over and over.

    Args:
        ends: whether it ever ends its turn.
    """
    shape = {**SHAPE, "tie_word_embeddings": False, **shape}
    loaded = models.build(Shape(**shape), tokenizer(template), seed)
    larger = tree_map(lambda array: 6 * array if array.ndim == 2 else array, loaded.model.parameters())
    loaded.model.update(larger)
    if not ends:
        head: Any = loaded.model
        head.lm_head.weight[loaded.tokenizer.eos_token_id] = 0  # of 330 tokens the best is likelier than this
    models.save(folder, loaded)
