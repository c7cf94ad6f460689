"""Multiple choice: which of the given answers a model finds likeliest. Nothing is generated.

A choice is read as any other answer is: behind the prompt, in the chat template, its ids joined to those
of the prompt. Tokenised together, letters of prompt and choice may merge, and then the choices of one row
would be measured behind prompts that differ, and not behind what the model is given when it answers. The
end of the turn is not counted, nor what a template writes before an answer (an empty block of thoughts).

`accuracy` takes the choice with the highest log-probability, `accuracy_normalised` that with the highest
one a UTF-8 byte, which is fair to long choices: `acc` and `acc_bytes` of lm-evaluation-harness, whose
`acc_norm` divides by characters. Of equals the first is taken.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.asked import answered
from mlx_distill.data.batch import Encoded, at_places, in_order, make_batch
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt
from mlx_distill.errors import DataError
from mlx_distill.evaluate.decoding import mean_stderr
from mlx_distill.evaluate.fidelity import LOGITS
from mlx_distill.losses.targets import log_softmax
from mlx_distill.models import Loaded
from mlx_distill.models.head import Head
from mlx_distill.progress import Progress, silent

TOKENS = 4096  # read at once


def choose(
    loaded: Loaded,
    rows: Sequence[Row],
    vocabulary: int,
    *,
    title: str = "choices",
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[tuple[float, str | None, str]]]:
    """Let a model choose one of the choices of each row.

    Args:
        vocabulary: real size of the tokenizer; logits beyond it are cut.

    Returns:
        the shares `accuracy` and `accuracy_normalised`, `accuracy_stderr` of two rows and more, and
        `choices`, the number of rows; and for each row 1 or 0 by `accuracy`, why it is 0, and the choice
        that was taken.

    Raises:
        DataError: no rows, or a row without choices, without the right one, or of plain text.
    """
    if not rows:
        raise DataError("choice: no rows with `choices`; give the test split some, or drop the task")
    encoded = [[encode_choice(row, choice, loaded.tokenizer) for choice in _choices(row)] for row in rows]
    flat = [choice for choices in encoded for choice in choices]
    summed = log_likelihoods(loaded.model, flat, vocabulary, title=title, progress=progress)
    by_row = np.split(summed, np.cumsum([len(choices) for choices in encoded])[:-1])
    verdicts = [_verdict(row, values) for row, values in zip(rows, by_row, strict=True)]
    normalised = [_right_by_bytes(row, values) for row, values in zip(rows, by_row, strict=True)]
    share = sum(score for score, _, _ in verdicts) / len(rows)
    metrics = {
        "accuracy": share,
        "accuracy_normalised": sum(normalised) / len(rows),
        "choices": len(rows),
    }
    stderr = mean_stderr([[score] for score, _, _ in verdicts])
    return metrics | ({} if stderr is None else {"accuracy_stderr": stderr}), verdicts


def encode_choice(row: Row, choice: str, tokenizer: Any) -> Encoded:
    """The ids of prompt and choice; counted are those of the choice, without the end of the turn.

    Raises:
        DataError: plain text, which asks nothing, or a chat that the template cannot write.
    """
    asked = encode_prompt(row, tokenizer, thinking=False)
    tokens, start, _ = encode(answered(row, choice), tokenizer)
    opened = tokens[: len(asked)] == asked  # with what the template writes before an answer
    return Encoded(tokens[:-1], max(start, len(asked)) if opened else start)


def log_likelihoods(
    model: nn.Module,
    choices: Sequence[Encoded],
    vocabulary: int,
    *,
    title: str = "choices",
    progress: Progress = silent,
) -> np.ndarray:
    """The log-probability of the counted tokens of each choice together, (choices,) float64 nats.

    Choices that differ in their last token alone, such as letters, are read once for all of them. Logits
    are made of counted tokens only, `LOGITS` numbers at a time.
    """
    model.eval()
    head = Head(model, vocabulary)
    alike: dict[tuple[int, ...], list[int]] = {}  # all that is read of a choice -> the choices
    for i, choice in enumerate(choices):
        alike.setdefault((choice.start, *choice.tokens[:-1]), []).append(i)
    groups = list(alike.values())
    rows = [choices[group[0]] for group in groups]
    at_once = max(1, LOGITS // vocabulary)
    summed = np.zeros(len(choices))
    with progress(title, len(choices), "choices") as advance:
        for indices in in_order(rows, min(TOKENS, at_once) if head.whole else TOKENS):
            batch = make_batch([rows[i] for i in indices])
            lengths = [len(rows[i].tokens) - rows[i].start for i in indices]
            counted = np.flatnonzero(np.array(batch.counted)).astype(np.int32)
            of_rows = np.split(counted, np.cumsum(lengths)[:-1])
            asked = [
                (choice, places) for places, i in zip(of_rows, indices, strict=True) for choice in groups[i]
            ]
            whose = np.repeat([choice for choice, _ in asked], [len(places) for _, places in asked])
            where = np.concatenate([places for _, places in asked])
            labels = np.concatenate([choices[i].tokens[choices[i].start :] for i, _ in asked])
            hidden = head.hidden(batch.tokens)
            for at in range(0, len(where), at_once):
                part = slice(at, at + at_once)
                logits = head.logits(at_places(hidden, mx.array(where[part])))
                chosen = mx.array(labels[part].astype(np.int32))[None, :, None]
                log_q = mx.take_along_axis(log_softmax(logits), chosen, axis=-1)[0, :, 0]
                np.add.at(summed, whose[part], np.array(log_q, dtype=np.float64))
            advance(len(asked))
    return summed


def _choices(row: Row) -> tuple[str, ...]:
    if row.right is None or not 0 <= row.right < len(row.choices):
        raise DataError(f"{row.origin}: no `choices` with an `answer`, the place of the right one; add them")
    return row.choices


def _verdict(row: Row, values: np.ndarray) -> tuple[float, str | None, str]:
    """1 or 0, why it is 0, and the choice taken."""
    assert row.right is not None
    taken, right = int(values.argmax()), row.choices[row.right]
    if not np.isfinite(values).all():
        return 0.0, "the model gives no numbers", row.choices[taken]
    if taken == row.right:
        return 1.0, None, right
    behind = values[taken] - values[row.right]
    return 0.0, f"right is {_short(right)}, {behind:.2f} nats less likely", row.choices[taken]


def _right_by_bytes(row: Row, values: np.ndarray) -> bool:
    lengths = [len(choice.encode()) for choice in row.choices]
    return bool(np.isfinite(values).all()) and int((values / lengths).argmax()) == row.right


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")
