"""Whether the matrices of the models hold the vocabulary of their tokenizers, and how far they are padded."""

from collections.abc import Iterable, Mapping
from typing import Any

from mlx_distill.errors import ModelError


def rows_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens the matrices of a model hold, by its config.json; None where that does not say."""
    found = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return found if type(found) is int else None


def check_widths(widths: Mapping[str, int | None], vocabulary: int, tokens: Iterable[int]) -> list[str]:
    """A line on matrices that are wider or narrower than the vocabulary of the run.

    Args:
        widths: `rows_of` each model of that vocabulary, by its key in the recipe.
        vocabulary: the real size of the tokenizer.
        tokens: ids that the models will read.

    Raises:
        ModelError: ids of the data that a matrix lacks (MLX would read what lies behind it), or logits of
            models that cannot be compared.
    """
    known = {key: width for key, width in widths.items() if width is not None}
    narrow = {key: width for key, width in known.items() if width < vocabulary}
    if narrow:
        key, width = min(narrow.items(), key=lambda one: one[1])
        told = (
            f"`{key}`: its tokenizer has {vocabulary} tokens, and its matrices {width} rows (`vocab_size` of "
            "config.json)"
        )
        highest = max(tokens, default=0)
        if highest >= width:
            raise ModelError(f"{told}, but the data holds token {highest}; choose a model whose files fit")
        cut = {min(width, vocabulary) for width in known.values()}
        if len(cut) > 1:
            raise ModelError(
                f"{told}, where another model has more, so their logits cannot be compared; choose models of "
                "one family"
            )
        return [f"{told}; no row holds one of the others"]
    padded = [f"`{key}` {width}" for key, width in known.items() if width > vocabulary]
    if not padded:
        return []
    return [
        f"padding: matrices have more rows ({', '.join(padded)}) than the tokenizer has tokens "
        f"({vocabulary}), and are cut before any softmax"
    ]
