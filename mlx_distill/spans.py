"""A teacher with a tokenizer of its own, and the loss that compares it with the student span by span."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_distill.data.alignment import align_rows, pack
from mlx_distill.data.batch import Batch, Encoded, at_places, counted_places, make_batch
from mlx_distill.data.template import end_of_turn_ids
from mlx_distill.data.vocabularies import Shared, Side, shared_tokens, token_bytes
from mlx_distill.errors import DataError
from mlx_distill.losses import Targets
from mlx_distill.losses.chunks import Arrays, chunked_sum
from mlx_distill.losses.cross_tokenizer import (
    Spans,
    cross_tokenizer,
    label_log_probability,
    sum_over_rest,
)
from mlx_distill.losses.menu import option
from mlx_distill.models import Loaded
from mlx_distill.models.head import Head
from mlx_distill.options import Term


class Aligned(NamedTuple):
    """A batch as two tokenizers read it; the arrays are `alignment.Packed`'s, with a first axis of 1."""

    first: mx.array  # (1, S, D) the teacher's last hidden state where it predicts the first token of a span
    rest: mx.array  # (1, Q, D) the same for the tokens behind the first
    packed: dict[str, mx.array]


class ForeignTeacher:
    """A live teacher whose tokens are not the student's.

    Args:
        loaded: the model, with its tokenizer; frozen here.
        vocabulary: real size of its tokenizer.
        ours, theirs: every row to train on, in the student's tokens and in the teacher's.
        tokenizer: the student's.
        size: real size of the student's.
        origins: where each row stands, for messages; (): by their numbers.

    Raises:
        ValueError: a tokenizer whose tokens' bytes are not known.
        DataError: a row that reads differently to the two, as where one of them changes letters.
    """

    def __init__(
        self,
        loaded: Loaded,
        vocabulary: int,
        ours: Sequence[Encoded],
        theirs: Sequence[Encoded],
        tokenizer: Any,
        size: int,
        origins: Sequence[str] = (),
    ):
        self.model, self.ours, self.theirs = loaded.model, ours, theirs
        self.model.freeze()
        self.model.eval()
        self.head: Head = Head(self.model, vocabulary)
        tables = _filled(token_bytes(tokenizer), size), _filled(token_bytes(loaded.tokenizer), vocabulary)
        found = shared_tokens(*tables, tokenizer.eos_token_id, loaded.tokenizer.eos_token_id)
        self.shared = Shared(*(Side(*map(mx.array, side)) for side in found))
        ends = end_of_turn_ids(tokenizer), end_of_turn_ids(loaded.tokenizer)
        self.spans = []
        for number, both in enumerate(zip(ours, theirs, strict=True), start=1):
            try:
                self.spans.append(align_rows(*both, *tables, *ends))
            except ValueError as error:
                where = origins[number - 1] if origins else f"row {number} of those to learn from"
                raise DataError(
                    f"`objective.cross_tokenizer`: {where} reads differently to teacher and student "
                    f"({error}); leave it out, or choose a teacher that reads it alike"
                ) from None

    def targets(self, batch: Batch) -> Targets:
        """Labels, and the teacher's last hidden states where spans begin and go on."""
        ours, theirs = ([rows[i] for i in batch.rows] for rows in (self.ours, self.theirs))
        read = make_batch(theirs)
        widths = batch.tokens.shape[1], read.tokens.shape[1]
        found = pack([self.spans[i] for i in batch.rows], ours, theirs, *widths)
        packed = {name: mx.array(array) for name, array in found._asdict().items()}
        last = self.head.hidden(read.tokens)
        first, rest = (
            mx.stop_gradient(at_places(last, packed[f"their_{part}"])) for part in ("first", "rest")
        )
        return Targets(at_places(batch.labels, counted_places(batch)), spans=Aligned(first, rest, packed))


def span_sum(
    head: Head,
    voices: Sequence[Any],
    last: mx.array,
    targets: Sequence[Targets],
    term: Term,
    chunk: int,
) -> mx.array:
    """`cross_tokenizer` summed over the spans of a batch, over all teachers with tokens of their own.

    Its weight is in it, because `chunked_sum` forms the gradient with the value.

    Args:
        head: the student's. voices: the teachers, each with its `share`, `head` and `shared` vocabulary.
        last: (B, T, D) that the student's head reads.
        chunk: spans, or tokens behind the first of a span, whose logits are held at once.
    """
    temperature = option("cross_tokenizer", term.options, "temperature")
    total = mx.array(0.0)
    for voice, one in zip(voices, targets, strict=True):
        if one.spans is None:
            continue
        found: Aligned = one.spans
        packed, spans = found.packed, found.packed["our_first"].size
        ours, theirs = (
            _rest(of, states, packed, side, spans, temperature, chunk)
            for of, states, side in (
                (head, at_places(last, packed["our_rest"]), "our"),
                (voice.head, found.rest, "their"),
            )
        )
        fixed = {name: packed[name][None] for name in ("our_tokens", "their_tokens", "single", "weight")}
        fixed |= {"teacher": found.first, "teacher_rest": theirs}

        def spans_of(logits: Arrays, cut: Arrays, beside: Arrays, voice: Any = voice) -> tuple[Any, Arrays]:
            values = cross_tokenizer(
                logits["first"],
                voice.head.logits(cut["teacher"]),
                beside["rest"],
                cut["teacher_rest"],
                Spans(cut["our_tokens"], cut["their_tokens"], cut["single"]),
                voice.shared,
                **term.options,
            )
            return term.weight * voice.share * (values * cut["weight"]).sum(-1).sum(), {}

        hidden = {"first": at_places(last, packed["our_first"])}
        total = total + chunked_sum(spans_of, head, hidden, fixed, chunk, {"rest": ours})[0]
    return total


def _rest(
    head: Head,
    states: mx.array,
    packed: Mapping[str, mx.array],
    side: str,
    spans: int,
    temperature: float,
    chunk: int,
) -> mx.array:
    """(1, S): log-probability of what continues each span; logits are made again for the gradient."""
    labels = packed[f"{side}_rest_tokens"][None]

    def piece(weights: Any, states: mx.array, labels: mx.array) -> mx.array:
        return label_log_probability(head.logits(states, weights), labels, temperature)

    again = mx.checkpoint(piece)
    pieces: list[mx.array] = []
    for start in range(0, labels.shape[1], chunk):
        here = states[:, start : start + chunk]
        if pieces:
            [here] = mx.depends([here], [pieces[-1]])
        cut = mx.stop_gradient(labels[:, start : start + chunk])
        pieces.append(again(head.parameters(trainable=True), here, cut))
    return sum_over_rest(mx.concatenate(pieces, axis=1), packed[f"{side}_rest_span"], spans)


def _filled(table: list[bytes | None], size: int) -> list[bytes | None]:
    return [*table, *[None] * size][:size]
