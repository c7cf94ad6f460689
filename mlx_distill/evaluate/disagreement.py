"""Where model and teacher differ most: answers token by token, and what each would have written there."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import end_of_turn_ids
from mlx_distill.data.vocabularies import token_bytes
from mlx_distill.evaluate.fidelity import RowFidelity


class Stretch(NamedTuple):
    """The fewest tokens of a row that together end where a character does: mostly one."""

    start: int
    end: int
    text: str  # "" only of the end of the turn


def disagreements(
    name: str,
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    found: Sequence[RowFidelity],
    tokenizer: Any,
    most: int = 12,
) -> list[dict[str, Any]]:
    """The rows with the highest mean KL(teacher || model), the highest first.

    Args:
        name: of the model, as in `evaluation.json`.
        encoded, found: of each row; all without a KL where there is no teacher to differ from.
        most: at most so many rows.

    Returns:
        For each row {"model", "prompt", "kl", "tokens"}. `kl` is the mean in nats a counted token. `tokens`
        is a list of [text, kl, model's token, teacher's token]: the texts joined are the answer; the end of
        the turn, if it is counted, is the last one, with an empty text. A character that is split
        over tokens is one entry, whose KL is their sum and whose two choices are those where the KL is
        highest, with the bytes of the character before them. [] without a teacher, and where the bytes of
        the tokens are not known.
    """
    means = {i: float(one.kl.mean(dtype=np.float64)) for i, one in enumerate(found) if one.kl is not None}
    try:
        table = token_bytes(tokenizer) if means else []
    except ValueError:
        return []
    spelled = _Spelling(tokenizer, table)
    chosen = sorted((i for i in means if np.isfinite(means[i])), key=lambda i: -means[i])[:most]
    return [
        {
            "model": name,
            "prompt": "" if rows[i].text is not None else rows[i].question(),
            "kl": means[i],
            "tokens": _tokens(encoded[i], found[i], spelled),
        }
        for i in chosen
    ]


class _Spelling:
    """Ids as bytes and as text; special tokens by their names.

    Args:
        table: `token_bytes` of the tokenizer.
    """

    def __init__(self, tokenizer: Any, table: Sequence[bytes | None]):
        self.tokenizer, self.table = tokenizer, table
        self.ends = end_of_turn_ids(tokenizer)

    def bytes_of(self, token: int) -> bytes:
        known = self.table[token] if token < len(self.table) else None
        if known is not None:
            return known
        return (self.tokenizer.convert_ids_to_tokens(token) or f"<{token}>").encode()

    def stretches(self, tokens: Sequence[int]) -> Iterator[Stretch]:
        """The counted tokens of a row, in stretches without a gap; bytes that are no character become �."""
        ends_turn = bool(tokens) and tokens[-1] in self.ends
        last = len(tokens) - ends_turn
        decoder, start, text = codecs.getincrementaldecoder("utf-8")("replace"), 0, ""
        for place, token in enumerate(tokens[:last], start=1):
            text += decoder.decode(self.bytes_of(token), final=place == last)
            if text and not decoder.getstate()[0]:
                yield Stretch(start, place, text)
                start, text = place, ""
        if start < len(tokens):
            yield Stretch(start, len(tokens), text)

    def choice(self, before: bytes, token: int) -> str:
        """The text of a token, with what `before` leaves open of a character; � is never in it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(before)
        return (decoder.getstate()[0] + self.bytes_of(token)).decode("utf-8", "backslashreplace")


def _tokens(row: Encoded, found: RowFidelity, spelled: _Spelling) -> list[list[Any]]:
    assert found.kl is not None and found.theirs is not None
    counted, entries = row.tokens[row.start :], []
    for start, end, text in spelled.stretches(counted):
        worst = start + int(found.kl[start:end].argmax())
        before = b"".join(map(spelled.bytes_of, counted[start:worst]))
        kl = max(0.0, float(found.kl[start:end].sum(dtype=np.float64)))  # rounding may leave -1e-9
        choices = [spelled.choice(before, int(ids[worst])) for ids in (found.mine, found.theirs)]
        entries.append([text, round(kl, 6), *choices])
    return entries
