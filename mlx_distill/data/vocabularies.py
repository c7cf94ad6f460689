"""What the tokens of two vocabularies say, in bytes, and which of them say the same."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

Ids = np.ndarray | mx.array  # int32; arrays of MLX spare a compiled step a copy for each chunk


class Side(NamedTuple):
    """The ids of one vocabulary, each in `paired`, `longer` or `others`, once."""

    paired: Ids  # (K,), paired[k] stands for the same string on both sides
    longer: Ids  # (L,), ids without a partner that begin with a string of `paired`
    begins: Ids  # (L,), the k of the longest such string
    others: Ids  # (U,), ids that have neither
    outcome: Ids  # (V,), of each id the k that it is or begins with; K for others


class Shared(NamedTuple):
    """What two vocabularies have in common."""

    ours: Side
    theirs: Side


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each id stands for inside a text.

    Behind one another, those of the ids of a text are its UTF-8 bytes: with the space that some
    sentencepiece tokenizers open every string with, and after the tokenizer's own normalisation.

    Args:
        tokenizer: of transformers with a tokenizers backend, or mlx-lm's wrapper of one.

    Returns:
        One entry an id, up to the largest. None for ids that stand for no bytes that are known: special
        tokens, the unknown token, tokens that swallow the blanks beside them, unused ids, and byte pieces
        of characters that have a piece of their own, because no text is ever encoded with these.

    Raises:
        ValueError: the tokenizer is of another kind (WordPiece, or without a tokenizers backend).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = set() if backend is None or backend.decoder is None else _kinds(backend.decoder)
    byte_level = "ByteLevel" in kinds
    if backend is None or not (byte_level or kinds & {"ByteFallback", "Metaspace", "Replace"}):
        name = type(getattr(tokenizer, "_tokenizer", tokenizer)).__name__
        raise ValueError(
            f"the bytes of the tokens of {name} are not known: only byte-level BPE and sentencepiece "
            f"vocabularies can be aligned; its decoder is of {', '.join(sorted(kinds)) or 'no kind'}"
        )
    hidden = {*tokenizer.all_special_ids}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special or token.lstrip or token.rstrip:
            hidden.add(index)
    vocabulary: dict[str, int] = {
        piece: index
        for piece, index in backend.get_vocab(with_added_tokens=True).items()
        if index not in hidden and piece != getattr(backend.model, "unk_token", None)
    }
    table: list[bytes | None] = [None] * (max(backend.get_vocab(with_added_tokens=True).values()) + 1)
    byte_pieces: list[tuple[int, bytes]] = []
    printable = {character: byte for byte, character in enumerate(_printable())}
    for piece, index in vocabulary.items():
        byte_piece = re.fullmatch("<0x([0-9A-F]{2})>", piece) if "ByteFallback" in kinds else None
        if byte_piece:
            byte_pieces.append((index, bytes.fromhex(byte_piece[1])))
        elif byte_level:
            plain = any(character not in printable for character in piece)  # some added tokens are
            table[index] = piece.encode() if plain else bytes(printable[c] for c in piece)
        else:
            table[index] = piece.replace("▁", " ").encode()
    characters = set(table)
    for index, byte in byte_pieces:
        table[index] = None if byte in characters else byte
    return table


def shared_tokens(
    ours: Sequence[bytes | None], theirs: Sequence[bytes | None], our_end: int, their_end: int
) -> Shared:
    """The strings that both vocabularies have, and the end of the turn, whatever it is called.

    Args:
        ours, theirs: `token_bytes` of both, cut or filled up with None to the width of the logits.
        our_end, their_end: the ids that rows end with. Other ids that may end a turn have no partner.

    Returns:
        Pairs in the order of our ids, in arrays of NumPy. Of several ids of one string the first has the
        partner; the others count as beginning with it.
    """
    partners: dict[bytes, int] = {}
    for index, string in enumerate(theirs):
        if string and index != their_end:
            partners.setdefault(string, index)
    pairs = [(our_end, their_end, b"")]
    for index, string in enumerate(ours):
        if string and string in partners and index != our_end:
            pairs.append((index, partners.pop(string), string))
    pairs.sort()
    strings = {string: k for k, (_, _, string) in enumerate(pairs) if string}
    return Shared(
        _side(ours, [pair[0] for pair in pairs], strings), _side(theirs, [pair[1] for pair in pairs], strings)
    )


def _side(table: Sequence[bytes | None], paired: list[int], strings: dict[bytes, int]) -> Side:
    outcome = np.full(len(table), len(paired), dtype=np.int32)
    outcome[paired] = np.arange(len(paired))
    alone = np.setdiff1d(np.arange(len(table), dtype=np.int32), paired)
    for index in alone.tolist():
        string = table[index] or b""
        beginnings = (string[:length] for length in range(len(string), 0, -1))
        outcome[index] = next((strings[begin] for begin in beginnings if begin in strings), len(paired))
    longer = alone[outcome[alone] < len(paired)]
    others = alone[outcome[alone] == len(paired)]
    return Side(np.array(paired, dtype=np.int32), longer, outcome[longer], others, outcome)


def _kinds(decoder: Any) -> set[str]:
    """The types in a decoder of the tokenizers library, nested ones included."""
    tree = json.loads(decoder.__getstate__())
    return {part["type"] for part in [tree, *tree.get("decoders", [])]}


def _printable() -> str:
    """What byte-level BPE writes for each byte: its character where it can be seen, else one from U+0100."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in seen else chr(next(unseen)) for byte in range(256))
