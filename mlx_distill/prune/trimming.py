"""tokenizer.json with fewer pieces, which splits the texts that it is made for as before.

Why the texts are split as before: byte pair encoding joins the pair of the lowest rank, again and again,
and joins nothing across the edges of a piece that is there at the end. So what happens inside such a piece
is what happens to it as a text of its own, and `_path` plays that again. With all pieces on these paths,
every join that was made can still be made, in the same order, and fewer others compete. Unigram chooses
the segmentation of the highest score; of those that are left, it is the same one.
"""

from collections.abc import Collection
from itertools import pairwise
from math import inf
from typing import Any

Ranks = dict[tuple[str, str], int]  # a pair of pieces -> the rank at which it is joined


def trim(tree: dict[str, Any], used: Collection[int]) -> tuple[dict[str, Any], list[int]]:
    """The content of a smaller tokenizer.json, and the old ids of its tokens, rising.

    What stays: the tokens used, the pieces that they are joined from, all added tokens, and what spells out
    any other text: the 256 bytes, or all single characters where there are none. The new ids are 0, 1, ...
    in the order of the old ones.

    Args:
        tree: content of tokenizer.json; it is left as it is.
        used: ids; those of no token count for nothing.

    Raises:
        ValueError: a tokenizer that cannot be made smaller, and why.
    """
    model = tree["model"]
    pieces = _pieces(model)
    added = {token["content"]: token["id"] for token in tree["added_tokens"]}
    by_id = {index: piece for piece, index in {**pieces, **added}.items()}
    wanted = {by_id[index] for index in used if index in by_id} | {*added, *_spelling(model, pieces)}
    if model["type"] == "BPE":
        wanted |= {model["unk_token"]} & pieces.keys()
        ranks: Ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
        wanted |= {piece for whole in wanted - added.keys() for piece in _path(whole, ranks)} & pieces.keys()
    elif model["unk_id"] is not None:
        wanted.add(by_id[model["unk_id"]])
    kept = sorted(index for index, piece in by_id.items() if piece in wanted)
    new = {old: place for place, old in enumerate(kept)}
    small = {
        **tree,
        "model": _trimmed_model(model, pieces, new),
        "added_tokens": [{**token, "id": new[token["id"]]} for token in tree["added_tokens"]],
        "post_processor": _renumbered(tree.get("post_processor"), new),
    }
    if tree.get("padding") is not None:
        small["padding"] = {**tree["padding"], "pad_id": new[tree["padding"]["pad_id"]]}
    return small, kept


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    """Ids of the pieces, without the added tokens that stand beside them."""
    if model["type"] == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, and only BPE and Unigram can be made smaller")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its pieces are marked with a {key} ({model[key]!r})")
    return model["vocab"]


def _spelling(model: dict[str, Any], pieces: dict[str, int]) -> set[str]:
    """Pieces that spell out any text that could be written before.

    Beside bytes, the characters of ASCII stay too, which a model knows better than their bytes, and the
    mark of a space, whose bytes would be decoded as the mark.
    """
    characters = {piece for piece in pieces if len(piece) == 1}  # of byte-level BPE: the 256 bytes
    spelled = {f"<0x{byte:02X}>" for byte in range(256)}
    if not model.get("byte_fallback") or not spelled <= pieces.keys():
        return characters
    return spelled | {piece for piece in characters if piece.isascii() or piece == "▁"}


def _path(piece: str, ranks: Ranks) -> set[str]:
    """Every piece on the way from the characters of `piece` to it; none if no way leads there."""
    parts = list(piece)
    seen = set(parts)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, inf), place) for place, pair in enumerate(pairwise(parts)))
        if rank == inf:
            return set()
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        seen.add(parts[place])
    return seen


def _trimmed_model(model: dict[str, Any], pieces: dict[str, int], new: dict[int, int]) -> dict[str, Any]:
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
        rows = [row for index, row in enumerate(model["vocab"]) if index in new]
        return {**model, "vocab": rows, "unk_id": None if unknown is None else new[unknown]}
    kept = {piece: new[index] for piece, index in pieces.items() if index in new}
    merges = [
        (left, right)
        for left, right in model["merges"]
        if left in kept and right in kept and left + right in kept
    ]
    return {**model, "vocab": kept, "merges": merges}


def _renumbered(processor: dict[str, Any] | None, new: dict[int, int]) -> dict[str, Any] | None:
    """What adds special tokens around a text, with their new ids."""
    kind = None if processor is None else processor["type"]
    if processor is None or kind == "ByteLevel":
        return processor
    if kind == "Sequence":
        return {**processor, "processors": [_renumbered(one, new) for one in processor["processors"]]}
    if kind != "TemplateProcessing":
        raise ValueError(f"its post-processor {kind} holds ids in a way of its own")
    special = {
        name: {**one, "ids": [new[index] for index in one["ids"]]}
        for name, one in processor["special_tokens"].items()
    }
    return {**processor, "special_tokens": special}
