"""Two tokenizations of one text: what tokens stand for, where they meet, where their predictions are."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mlx_distill.data import pocket
from mlx_distill.data.alignment import Packed, Span, align, align_rows, pack
from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, end_of_turn_ids
from mlx_distill.data.vocabularies import shared_tokens, token_bytes
from mlx_distill.models import load_tokenizer

NAMES = ("embedded", "stories", "qwen")
PAIRS = [(one, other) for one in NAMES for other in NAMES]
TEXTS = (
    "Once upon a time, there was a little girl.\nShe said: hello!",
    "  two leading spaces, and   three inside",
    "def f(x):\n\treturn x  # tab\n\n\n    y = [1, 22, 333]\n",
    "Ünïcödé, 日本語, Ελληνικά, עברית",
    "emoji 🎉🏽‍🎄 and é as one code point",
    "<tool_call>\n{}\n</tool_call>\x00\x7f",
    "x",
)


class Side(NamedTuple):
    tokenizer: Any
    table: list[bytes | None]
    ends: set[int]

    def row(self, text: str) -> Encoded:
        """An answer, behind a prompt."""
        return encode(Row(prompt="Tell me.", completion=text), self.tokenizer)

    def text(self, row: Encoded) -> bytes | None:
        """The counted bytes of a row, or None with a token of unknown bytes in it."""
        strings = [self.table[token] for token in row.tokens[row.start : -1]]
        return None if None in strings else b"".join(string or b"" for string in strings)


@pytest.fixture(scope="module")
def sides(shared: Path, repository: Path) -> dict[str, Side]:
    folders = {
        "embedded": repository / "mlx_distill" / "assets" / "teacher",
        "stories": shared / "models" / "stories260K",
        "qwen": shared / "tokenizers" / "qwen2.5",
    }
    tokenizers = {name: load_tokenizer(folder, {"model_type": "none"}) for name, folder in folders.items()}
    return {name: Side(t, token_bytes(t), end_of_turn_ids(t)) for name, t in tokenizers.items()}


@pytest.fixture(scope="module")
def stories(shared: Path) -> list[str]:
    text = (shared / "data" / "tinystories" / "stories.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if 0 < len(story) < 800][:40]


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_the_tokens_are_those_of_the_text(
    name: str, sides: dict[str, Side], stories: list[str]
) -> None:
    side, compared = sides[name], 0
    for text in (*TEXTS, *stories):
        found = side.text(side.row(text))
        assert found in (None, text.encode())
        compared += found is not None
    # The embedded tokenizer has no piece for most of what is not code.
    assert compared == len(TEXTS) + len(stories) or (name == "embedded" and compared >= 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_the_tokens_are_not_their_bytes(name: str, sides: dict[str, Side]) -> None:
    """The usual mistake: a vocabulary's spelling taken for text."""
    side = sides[name]
    row = side.row(" a b\n c")
    spelled = side.tokenizer.convert_ids_to_tokens(row.tokens[row.start : -1])
    assert side.text(row) == b" a b\n c" != "".join(spelled).encode()


def test_what_ids_stand_for(sides: dict[str, Side]) -> None:
    stories, qwen = sides["stories"], sides["qwen"]
    ids = stories.tokenizer.convert_tokens_to_ids
    assert stories.table[ids("<0x00>")] == b"\0" and stories.table[ids("<0xFF>")] == b"\xff"
    assert stories.table[ids("▁the")] == b" the"
    # A byte piece is never written for a character that has a piece of its own.
    assert stories.table[ids("<0x61>")] is None and stories.table[ids("a")] == b"a"
    assert all(stories.table[ids(name)] is None for name in ("<s>", "</s>", "<unk>"))
    ids = qwen.tokenizer.convert_tokens_to_ids
    assert qwen.table[ids("Ġthe")] == b" the" and qwen.table[ids("Ċ")] == b"\n"
    assert qwen.table[ids("<tool_call>")] == b"<tool_call>"  # an added token, but text
    assert qwen.table[ids("<|im_end|>")] is None and qwen.table[ids("<|endoftext|>")] is None
    assert len(qwen.table) == 151_665
    assert {bytes([byte]) for byte in range(256)} <= set(qwen.table)


def test_a_gap_in_the_ids_and_an_unknown_kind() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    def wrapped(decoder: Any) -> Any:
        backend = Tokenizer(models.BPE({"a": 0, "▁b": 3}, [], unk_token="a"))
        backend.decoder = decoder
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    assert token_bytes(wrapped(decoders.Metaspace())) == [None, None, None, b" b"]
    with pytest.raises(ValueError, match="only byte-level BPE and sentencepiece .* WordPiece"):
        token_bytes(wrapped(decoders.WordPiece()))


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_the_shortest_that_both_sides_cover(seed: int) -> None:
    random = np.random.default_rng(seed)
    text = random.bytes(int(random.integers(1, 60)))
    ours, theirs = (_cut(text, random) for _ in range(2))
    spans = align(ours, theirs)
    assert (spans[0].our_start, spans[0].their_start) == (0, 0)
    assert (spans[-1].our_end, spans[-1].their_end) == (len(ours), len(theirs))
    for before, after in pairwise(spans):
        assert (before.our_end, before.their_end) == (after.our_start, after.their_start)
    for span in spans:
        our_part, their_part = (
            ours[span.our_start : span.our_end],
            theirs[span.their_start : span.their_end],
        )
        assert b"".join(our_part) == b"".join(their_part) != b""
        # No cut inside that both sides have. Tokens of no bytes behind the last one repeat its end.
        cuts = [{len(b"".join(part[:i])) for i in range(len(part))} for part in (our_part, their_part)]
        assert cuts[0] & cuts[1] <= {0, len(b"".join(our_part))}
        assert span == spans[-1] or cuts[0] & cuts[1] == {0}


def test_alignment_by_position_is_another_one() -> None:
    """The usual mistake: token i of one side beside token i of the other."""
    ours, theirs = [b"th", b"e", b" cat"], [b"the", b" c", b"at"]
    assert align(ours, theirs) == [Span(0, 2, 0, 1), Span(2, 3, 1, 3)]
    by_position = [Span(i, i + 1, i, i + 1) for i in range(3)]
    assert any(ours[s.our_start] != theirs[s.their_start] for s in by_position)


def test_tokens_of_no_bytes_join_what_follows() -> None:
    assert align([b"", b"a", b"b", b""], [b"a", b"", b"b"]) == [Span(0, 2, 0, 1), Span(2, 4, 1, 3)]
    assert align([b""], []) == [] == align([], [])


def test_texts_that_differ_are_refused_with_the_place() -> None:
    with pytest.raises(ValueError, match=r"differ at byte 2: ours goes on with b'c', theirs with b'd'"):
        align([b"ab", b"c"], [b"abd"])
    with pytest.raises(ValueError, match=r"differ at byte 2: .* theirs with b''"):
        align([b"ab", b"c"], [b"ab"])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_answers_in_every_pair_of_tokenizers(
    one: str, other: str, sides: dict[str, Side], stories: list[str]
) -> None:
    ours, theirs = sides[one], sides[other]
    functions = [row.completion or "" for row in pocket.rows("code", "train", 20)]
    whole = 0
    for text in (*TEXTS, *stories, *functions):
        our_row, their_row = ours.row(text), theirs.row(text)
        spans = align_rows(our_row, their_row, ours.table, theirs.table, ours.ends, theirs.ends)
        for span in spans[:-1]:
            our_part = [ours.table[t] for t in our_row.tokens[span.our_start : span.our_end]]
            their_part = [theirs.table[t] for t in their_row.tokens[span.their_start : span.their_end]]
            assert b"".join(filter(None, our_part)) == b"".join(filter(None, their_part)) != b""
        # The ends of the turn are one more span, although their names differ.
        ends = len(our_row.tokens), len(their_row.tokens)
        assert spans[-1] == (ends[0] - 1, ends[0], ends[1] - 1, ends[1])
        if ours.text(our_row) is not None and theirs.text(their_row) is not None:
            assert (spans[0].our_start, spans[0].their_start) == (our_row.start, their_row.start)
            whole += 1
        if one == other:
            assert all(span.single for span in spans)
    assert whole >= 20  # all the functions at least


def test_plain_text_whose_beginnings_differ(sides: dict[str, Side]) -> None:
    """Stories' text opens with a space of its own, behind BOS; Qwen's first token is not counted at all."""
    row = Row(text="Once upon a time")
    ours, theirs = sides["stories"], sides["qwen"]
    our_row, their_row = encode(row, ours.tokenizer), encode(row, theirs.tokenizer)
    assert b"".join(ours.table[t] or b"" for t in our_row.tokens) == b" Once upon a time"
    assert b"".join(theirs.table[t] or b"" for t in their_row.tokens) == b"Once upon a time"
    spans = align_rows(our_row, their_row, ours.table, theirs.table, ours.ends, theirs.ends)
    assert spans[0].their_start == their_row.start == 1
    found = [ours.table[token] for token in our_row.tokens[spans[0].our_start : spans[-2].our_end]]
    assert b"".join(filter(None, found)) == b" upon a time"


def test_nothing_before_a_token_of_unknown_bytes_is_in_a_span() -> None:
    table: list[bytes | None] = [None, b"a", b"b", b"ab"]
    ours, theirs = Encoded([1, 1, 0, 1, 2, 9], 1), Encoded([1, 1, 2, 2, 3, 8], 1)
    spans = align_rows(ours, theirs, table, table, {9}, {8})
    assert spans == [Span(3, 5, 4, 5), Span(5, 6, 5, 6)]
    # Nor is the end of the turn where one side does not end it.
    assert align_rows(Encoded([1, 1, 2], 1), theirs, table, table, {9}, {8}) == [Span(1, 3, 4, 5)]


def test_rows_of_other_text_are_refused() -> None:
    table: list[bytes | None] = [None, b"a", b"b", b"ab"]
    with pytest.raises(ValueError, match="differ at byte 1"):
        align_rows(Encoded([1, 1, 1], 1), Encoded([1, 3], 1), table, table, {0}, {0})


@pytest.mark.parametrize(
    ("one", "other"),
    [("embedded", "stories"), ("stories", "qwen"), ("qwen", "embedded"), ("stories", "stories")],
)
def test_shared_strings(one: str, other: str, sides: dict[str, Side]) -> None:
    tables = sides[one].table, sides[other].table
    ends = [sides[name].tokenizer.eos_token_id for name in (one, other)]
    shared = shared_tokens(*tables, *ends)
    strings = [[table[i] for i in side.paired] for table, side in zip(tables, shared, strict=True)]
    assert strings[0] == strings[1] and len(set(strings[0])) == len(strings[0])
    assert set(filter(None, strings[0])) == set(filter(None, tables[0])) & set(filter(None, tables[1]))
    place = list(shared.ours.paired).index(ends[0])
    assert shared.theirs.paired[place] == ends[1]
    known = set(filter(None, strings[0]))
    for table, side in zip(tables, shared, strict=True):
        parts = np.concatenate([side.paired, side.longer, side.others])
        assert sorted(parts.tolist()) == list(range(len(table)))
        assert all(array.dtype == np.int32 for array in side)
        assert (side.outcome[side.paired] == np.arange(len(side.paired))).all()
        assert (side.outcome[side.longer] == side.begins).all()
        assert (side.outcome[side.others] == len(side.paired)).all()
        for index, k in zip(np.array(side.longer)[:300], np.array(side.begins)[:300], strict=True):
            string, begin = table[index] or b"", strings[0][k] or b""
            assert string.startswith(begin)
            assert not any(string[:length] in known for length in range(len(begin) + 1, len(string)))


def test_of_two_ids_of_one_string_the_first_is_paired() -> None:
    shared = shared_tokens([b"a", b"a", b"ab", None, None, b"x"], [None, b"a"], 3, 0)
    assert shared.ours.paired.tolist() == [0, 3] and shared.theirs.paired.tolist() == [1, 0]
    assert shared.ours.longer.tolist() == [1, 2] and shared.ours.begins.tolist() == [0, 0]
    assert shared.ours.others.tolist() == [4, 5]


def test_a_string_that_ends_a_turn_is_no_string_of_the_text() -> None:
    shared = shared_tokens([b"\n", b"a", b"b"], [b"a", b"\n", None, b"b"], 0, 2)
    assert shared.ours.paired.tolist() == [0, 1, 2] and shared.theirs.paired.tolist() == [2, 0, 3]
    shared = shared_tokens([b"\n", b"a", None], [b"\n", b"a"], 2, 0)
    assert shared.ours.paired.tolist() == [1, 2] and shared.theirs.paired.tolist() == [1, 0]


PackedRows = tuple[Packed, list[Encoded], list[Encoded]]


@pytest.fixture
def packed() -> PackedRows:
    ours = [Encoded([1, 5, 6, 7, 8, 9], 2), Encoded([1, 2, 3], 1)]
    theirs = [Encoded([4, 4, 4, 3, 2, 1], 4), Encoded([4, 7, 8, 9], 2)]
    spans = [[Span(2, 5, 4, 5), Span(5, 6, 5, 6)], [Span(1, 2, 2, 4)]]
    return pack(spans, ours, theirs, 16, 32, places_to=4), ours, theirs


def test_places_are_where_the_tokens_are_predicted(
    packed: tuple[Packed, list[Encoded], list[Encoded]],
) -> None:
    arrays, ours, theirs = packed
    our_labels = np.array(make_batch(ours).labels).reshape(-1)
    their_labels = np.array(make_batch(theirs, pad_to=32).labels).reshape(-1)
    for places, labels, tokens in (
        (arrays.our_first, our_labels, arrays.our_tokens),
        (arrays.their_first, their_labels, arrays.their_tokens),
        (arrays.our_rest, our_labels, arrays.our_rest_tokens),
        (arrays.their_rest, their_labels, arrays.their_rest_tokens),
    ):
        used = places >= 0
        assert used.any() and (labels[places[used]] == tokens[used]).all()
        assert (tokens[~used] == -1).all() and len(places) % 4 == 0
        # The usual mistake: the distribution after the token, not the one that predicts it.
        assert (labels[places[used] + 1] != tokens[used]).all()


def test_what_is_packed(packed: PackedRows) -> None:
    lists = {name: array.tolist() for name, array in packed[0]._asdict().items()}
    assert lists["our_tokens"] == [6, 9, 2, -1] and lists["their_tokens"] == [2, 1, 8, -1]
    assert lists["our_rest_tokens"] == [7, 8, -1, -1] and lists["our_rest_span"] == [0, 0, -1, -1]
    assert lists["their_rest_tokens"] == [9, -1, -1, -1] and lists["their_rest_span"] == [2, -1, -1, -1]
    assert lists["single"] == [False, True, False, False]
    assert lists["weight"] == [1, 1, 1, 0]  # one a span, not one a token
    types = {name: array.dtype.name for name, array in packed[0]._asdict().items()}
    assert types.pop("single") == "bool" and types.pop("weight") == "float32"
    assert set(types.values()) == {"int32"}


def test_sizes_are_static_even_for_nothing() -> None:
    arrays = pack([[]], [Encoded([1, 2], 1)], [Encoded([1, 2], 1)], 16, 16)
    assert {len(array) for array in arrays} == {128}
    assert not arrays.weight.any() and (arrays.our_first == -1).all()


def _cut(text: bytes, random: np.random.Generator) -> list[bytes]:
    """Random tokens of a text, some of no bytes."""
    cuts = np.sort(random.integers(0, len(text) + 1, size=int(random.integers(0, len(text) + 1)))).tolist()
    edges = [0, *cuts, len(text)]
    return [text[start:end] for start, end in pairwise(edges)]
