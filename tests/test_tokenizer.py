"""The tokenizer that is trained on the user's text."""

import pytest
from tiny import TEXTS, tiny_tokenizer

from mlx_distill.data import pocket
from mlx_distill.errors import DataError
from mlx_distill.options import NewTokenizer
from mlx_distill.tokenizer import train_tokenizer


def test_text_survives_the_round_trip():
    rows = pocket.rows("both", "train", 400)
    texts = [f"{row.prompt}{row.completion}" for row in rows]
    tokenizer = train_tokenizer(texts, NewTokenizer(pieces=300, byte_fallback=False))
    for text in [*texts, "    indented\n\n", " x", "x ", "\n", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 300


def test_digits_stand_alone():
    tokenizer = tiny_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("return x + 57\n"))
    assert "5" in pieces
    assert "7" in pieces


def test_bytes_spell_what_no_piece_covers():
    with_bytes = train_tokenizer(TEXTS, NewTokenizer(pieces=300))
    assert with_bytes.decode(with_bytes.encode("naïve 😀")) == "naïve 😀"
    without = tiny_tokenizer()
    assert without.encode("😀") == [without.unk_token_id]


def test_the_same_text_makes_the_same_tokenizer():
    one, other = tiny_tokenizer(), tiny_tokenizer()
    assert one.get_vocab() == other.get_vocab()
    assert one.encode(TEXTS[7]) == other.encode(TEXTS[7])


def test_more_pieces_than_the_text_has_are_refused():
    with pytest.raises(DataError, match=r"student\.tokenizer\.pieces.: 5000 cannot be made"):
        train_tokenizer(TEXTS[:3], NewTokenizer(pieces=5000, byte_fallback=False))
