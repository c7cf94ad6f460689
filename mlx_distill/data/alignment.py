"""Two tokenizations of one text, laid over each other byte by byte.

Across tokenizers a teacher's and a student's distributions are only comparable where both have read the
same bytes. A span is the shortest stretch of text that whole tokens cover on both sides; its place is
known by its bytes, never by the number of a token.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from mlx_distill.data.batch import PLACES_TO, Encoded


class Span(NamedTuple):
    """Tokens `[our_start, our_end)` of ours and `[their_start, their_end)` of theirs: the same bytes."""

    our_start: int
    our_end: int
    their_start: int
    their_end: int

    @property
    def single(self) -> bool:
        """Whether it is one token on both sides."""
        return self.our_end - self.our_start == 1 == self.their_end - self.their_start


class Packed(NamedTuple):
    """The spans of a batch as arrays of static sizes; -1 fills up integers, False and 0 the others.

    Places are indices into a flattened (B, T) batch of one side, at which the distribution over the named
    token is. S spans; R and Q tokens behind the first of their span. All sizes are rounded up.
    """

    our_first: np.ndarray  # (S,) int32, the place that predicts the first token of each span
    their_first: np.ndarray  # (S,) int32
    our_tokens: np.ndarray  # (S,) int32, that first token
    their_tokens: np.ndarray  # (S,) int32
    single: np.ndarray  # (S,) bool, one token on both sides
    weight: np.ndarray  # (S,) float32, of the row of each span, 0 for what fills up
    our_rest: np.ndarray  # (R,) int32, the places that predict what follows the first tokens
    our_rest_tokens: np.ndarray  # (R,) int32
    our_rest_span: np.ndarray  # (R,) int32, the span that each belongs to
    their_rest: np.ndarray  # (Q,) int32
    their_rest_tokens: np.ndarray  # (Q,) int32
    their_rest_span: np.ndarray  # (Q,) int32


def align(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[Span]:
    """The shortest stretches that whole tokens cover on both sides, in order and without a gap.

    A token of no bytes belongs to the stretch that follows it, at the end to the last one. Every stretch
    has at least one byte; where there are none at all, there is no stretch. The end of a turn has no
    bytes of the text: `align_rows` adds it.

    Raises:
        ValueError: the two are not the same bytes; with the place.
    """
    _must_agree(b"".join(ours), b"".join(theirs))
    our_ends, their_ends = _first_reaching(ours), _first_reaching(theirs)
    cuts = [(our_ends[place], their_ends[place]) for place in our_ends if place in their_ends]
    if cuts:
        cuts[-1] = (len(ours), len(theirs))
    starts = [(0, 0), *cuts[:-1]]
    return [
        Span(our_start, our_end, their_start, their_end)
        for (our_start, their_start), (our_end, their_end) in zip(starts, cuts, strict=False)
    ]


def align_rows(
    ours: Encoded,
    theirs: Encoded,
    our_bytes: Sequence[bytes | None],
    their_bytes: Sequence[bytes | None],
    our_ends: set[int],
    their_ends: set[int],
) -> list[Span]:
    """The spans of one row, encoded twice, over the tokens that both sides count.

    The counted text of one side must be the end of the other's; what the longer one begins with besides
    is in no span. So a row of plain text may lack its first token on one side, where no BOS stands before
    it, and a sentencepiece tokenizer may open it with a space of its own. Likewise nothing before a token
    of unknown bytes, such as <unk>, is in a span.

    Args:
        ours, theirs: the row, in the tokens of each.
        our_bytes, their_bytes: `token_bytes` of each tokenizer.
        our_ends, their_ends: ids that end a turn. Where both rows end with one, the two are one more
            span, although they are called differently.

    Returns:
        Spans in indices into the two rows' `tokens`.

    Raises:
        ValueError: the texts differ; with the place.
    """
    our_start, our_stop = _known(ours, our_bytes, our_ends)
    their_start, their_stop = _known(theirs, their_bytes, their_ends)
    our_text = [our_bytes[token] or b"" for token in ours.tokens[our_start:our_stop]]
    their_text = [their_bytes[token] or b"" for token in theirs.tokens[their_start:their_stop]]
    our_whole, their_whole = b"".join(our_text), b"".join(their_text)
    shorter = min(len(our_whole), len(their_whole))
    _must_agree(our_whole[len(our_whole) - shorter :], their_whole[len(their_whole) - shorter :])
    our_more, their_more = _excess(our_text, their_text)
    our_start, their_start = our_start + our_more, their_start + their_more
    spans = [
        Span(our_start + span[0], our_start + span[1], their_start + span[2], their_start + span[3])
        for span in align(our_text[our_more:], their_text[their_more:])
    ]
    if our_stop < len(ours.tokens) and their_stop < len(theirs.tokens):
        spans.append(Span(our_stop, our_stop + 1, their_stop, their_stop + 1))
    return spans


def pack(
    spans: Sequence[Sequence[Span]],
    ours: Sequence[Encoded],
    theirs: Sequence[Encoded],
    our_width: int,
    their_width: int,
    places_to: int = PLACES_TO,
) -> Packed:
    """The spans of a batch, ready for gathering in a compiled step.

    A span counts once, however many tokens it has: it is one choice, and the sum over spans is in nats of
    the text, as a sum over tokens is. Both are weighed by row; the objective divides both by the weights of
    our counted tokens.

    Args:
        spans: of each row, as `align_rows` gives them.
        ours, theirs: the rows, in the order of the batch of each side.
        our_width, their_width: T of `make_batch` for each side.
        places_to: sizes are rounded up to a multiple of this, and are at least this.
    """
    firsts: list[tuple[int, ...]] = []
    rests: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])
    for row, (row_spans, our_row, their_row) in enumerate(zip(spans, ours, theirs, strict=True)):
        sides = ((our_row.tokens, row * our_width - 1), (their_row.tokens, row * their_width - 1))
        (our_tokens, our_base), (their_tokens, their_base) = sides
        for span in row_spans:
            for rest, (tokens, base), start, end in zip(rests, sides, span[::2], span[1::2], strict=True):
                rest += [(base + i, tokens[i], len(firsts)) for i in range(start + 1, end)]
            places = (our_base + span.our_start, their_base + span.their_start)
            labels = (our_tokens[span.our_start], their_tokens[span.their_start])
            firsts.append((*places, *labels, span.single, row))
    *integers, single, row_of = _columns(firsts, 6, places_to)
    weights = np.array([*(row.weight for row in ours), 0], dtype=np.float32)  # the last is of row -1
    rest_columns = [column for rest in rests for column in _columns(rest, 3, places_to)]
    return Packed._make([*integers, single == 1, weights[row_of], *rest_columns])


def _must_agree(ours: bytes, theirs: bytes) -> None:
    if ours == theirs:
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    raise ValueError(
        f"the two tokenizations differ at byte {same}: ours goes on with {ours[same : same + 20]!r}, "
        f"theirs with {theirs[same : same + 20]!r}"
    )


def _first_reaching(tokens: Sequence[bytes]) -> dict[int, int]:
    """Bytes covered -> how many tokens it takes, in order; none for no bytes."""
    counts: dict[int, int] = {}
    for count, covered in enumerate(accumulate(map(len, tokens)), start=1):
        if covered:
            counts.setdefault(covered, count)
    return counts


def _known(row: Encoded, table: Sequence[bytes | None], ends: set[int]) -> tuple[int, int]:
    """Where the counted text of a row starts, behind its last token of unknown bytes, and where it stops."""
    stop = len(row.tokens) - (row.tokens[-1] in ends)
    unknown = (i for i in range(stop - 1, row.start - 1, -1) if table[row.tokens[i]] is None)
    return next(unknown, min(row.start, stop) - 1) + 1, stop


def _excess(ours: Sequence[bytes], theirs: Sequence[bytes]) -> tuple[int, int]:
    """How many tokens to leave out in front, so that equally many bytes follow on both sides.

    The fewest: the rest of both starts at a place where both have a cut.
    """
    sizes = [list(accumulate((len(token) for token in reversed(side)), initial=0)) for side in (ours, theirs)]
    if sizes[0][-1] == sizes[1][-1]:
        return 0, 0  # tokens of no bytes in front included
    common = max(set(sizes[0]) & set(sizes[1]))
    return len(ours) - sizes[0].index(common), len(theirs) - sizes[1].index(common)


def _columns(rows: Sequence[tuple[int, ...]], width: int, places_to: int) -> list[np.ndarray]:
    """The columns of a table as int32, filled up with -1 to a multiple of `places_to`, at least one."""
    table = np.array(rows, dtype=np.int32).reshape(-1, width)
    missing = max(places_to, -(-len(table) // places_to) * places_to) - len(table)
    padded = np.pad(table, ((0, missing), (0, 0)), constant_values=-1)
    return [np.ascontiguousarray(padded[:, column]) for column in range(width)]
