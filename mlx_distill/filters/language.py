"""Answers in another language, found by py3langid's model of letter groups (140 languages)."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.errors import MissingExtra
from mlx_distill.evaluate.programs import FENCED
from mlx_distill.filters.material import Material
from mlx_distill.written import Written

SURE = 0.5  # probability from which on one language is likelier than all others together
NO_LANGUAGE = "zxx"  # numbers, formulas, code

_INLINE = re.compile(r"`[^`\n]+`")


def language(written: Sequence[Written], wanted: str, material: Material) -> list[str | None]:
    """Answers whose text outside code is, with a probability of one half or more, in another language.

    Where no language reaches that, the text is too short or too mixed to be judged, and passes.
    """
    detector = load_detector()
    parts = [material.split(one) for one in written]
    texts = [f"{steps} {prose(one.row, text)}" for one, (steps, text) in zip(written, parts, strict=True)]
    found = [detector.classify(text) for text in texts]
    return [
        f"{code} ({share:.0%} sure), not {wanted}"
        if share >= SURE and code not in (wanted, NO_LANGUAGE)
        else None
        for code, share in found
    ]


def prose(row: Row, text: str) -> str:
    """What stands outside of code. Without a fence, an answer to a row with tests is code as a whole."""
    if row.task == "code" and not FENCED.search(text):
        return ""
    return _INLINE.sub(" ", FENCED.sub(" ", text))


@functools.cache
def load_detector() -> Any:
    """py3langid's classifier, with probabilities; `labels` are the languages that it tells apart.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingExtra(
            "`generate.filters.language` needs a package that is missing: pip install 'mlx-distill[filters]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
