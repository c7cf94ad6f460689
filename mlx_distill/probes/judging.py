"""What a teacher is worth, seen at once: does it repeat itself, and know more than the student?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode
from mlx_distill.errors import ModelError
from mlx_distill.models import Loaded
from mlx_distill.preflight import Prepared
from mlx_distill.score import nll_of_rows

ROWS = 32  # with answers, at most
LONGEST = 512  # tokens of a row that are read
BATCH = (4, 64)  # rows and tokens of the batch that is read twice


class Sample(NamedTuple):
    """Rows with answers, as a user gave them."""

    key: str  # of `data`
    rows: list[Row]
    encoded: list[Encoded]  # in the student's tokens, cut to `LONGEST`
    counted: str  # which of them, as `data.count` says


def sample(prepared: Prepared) -> Sample | None:
    """Rows spread over those to learn from, or else over those to validate with; None without an answer.

    Where a teacher has other tokens only whole rows will do: cut, they would not be the same text. So there
    they are no longer than `LONGEST`; all longer, it is the shortest.
    """
    whole = any(teacher.foreign for teacher in prepared.teachers.values())
    for key, rows, encoded in (
        ("train", prepared.train_rows, prepared.train),
        ("valid", prepared.valid_rows, prepared.valid),
    ):
        fits = [i for i, row in enumerate(encoded) if row.start < min(LONGEST, len(row.tokens))]
        if whole and fits:
            short = [i for i in fits if len(encoded[i].tokens) <= LONGEST]
            fits = short or [min(fits, key=lambda i: len(encoded[i].tokens))]
        if len(fits) > ROWS:
            fits = [fits[i * len(fits) // ROWS] for i in range(ROWS)]
        if fits:
            most = None if whole else LONGEST
            cut = [Encoded(encoded[i].tokens[:most], encoded[i].start) for i in fits]
            return Sample(key, [rows[i] for i in fits], cut, prepared.recipe.data.count)
    return None


def probe_batch(prepared: Prepared) -> mx.array:
    """Token ids (B, T) of the first rows there are, in the student's vocabulary."""
    rows, longest = BATCH
    tokens = [row.tokens for row in prepared.train] or [one.tokens for one in prepared.prompts]
    return make_batch([Encoded(some[: longest + 1], 1) for some in tokens[:rows]]).tokens


def largest_difference(model: Any, tokens: mx.array, key: str) -> float:
    """How far the logits of two readings of one batch are apart; 0.0 where they are the same to the last bit.

    Args:
        key: of the recipe, for messages.

    Raises:
        ModelError: logits that are no finite numbers.
    """
    first = model(tokens)
    mx.eval(first)  # apart, so that it is computed twice
    second = model(tokens)
    check_finite(first, key)
    if mx.array_equal(first, second):
        return 0.0
    return float(mx.abs(first.astype(mx.float32) - second.astype(mx.float32)).max())


def check_finite(logits: mx.array, key: str) -> None:
    """Refuse a model whose weights are damaged, or whose numbers leave their type.

    Raises:
        ModelError: some of the logits are not finite.
    """
    bad = int((~mx.isfinite(logits)).sum(-1).sum())
    if bad:
        raise ModelError(
            f"`{key}`: {bad} of {logits.size} logits on the first rows of the data are not finite, in "
            f"{str(logits.dtype).rpartition('.')[2]}; its weights are damaged, or too large for their type: "
            "fetch it again, or take it in bfloat16 or float32"
        )


def nll_of(loaded: Loaded, found: Sample, vocabulary: int, *, own: Any | None = None) -> float:
    """Nats of the answers in a sample, a token of the student's.

    Args:
        vocabulary: real size of the model's tokenizer.
        own: the model's tokenizer, where its tokens are not the student's.
    """
    encoded: Sequence[Encoded] = found.encoded
    if own is not None:
        encoded = [encode(row, own, count=found.counted) for row in found.rows]
    counts = np.array([len(row.tokens) - row.start for row in encoded])
    nats = nll_of_rows(loaded.model, encoded, vocabulary) * counts
    return float(nats.sum() / sum(len(row.tokens) - row.start for row in found.encoded))


def worth(key: str, teacher: float, student: float, found: Sample) -> str | None:
    """A line where a teacher knows no more of the answers than the student does before training."""
    if teacher < student:
        return None
    return (
        f"`{key}` finds the answers in `data.{found.key}` no likelier than the untrained student does "
        f"({teacher:.3g} against {student:.3g} nats a token, {len(found.rows)} rows): there may be nothing "
        "to distil; is it the right teacher, and does it know this template?"
    )
