"""A divergence between a teacher and a student that cut the same text into different tokens.

`data.alignment` finds the spans: the shortest stretches of text that whole tokens cover on both sides.
Here both sides say at the start of a span how the text goes on, each in tokens of its own.
"""

import math
from typing import Literal, NamedTuple

import mlx.core as mx
from pydantic import NonNegativeFloat, PositiveFloat

from mlx_distill.data.vocabularies import Shared, Side
from mlx_distill.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from mlx_distill.losses.outcomes import LOWEST_LOG_P
from mlx_distill.losses.sums import log_softmax, logsumexp, sum_last
from mlx_distill.losses.targets import Targets

DIVERGENCES = {loss.__name__: loss for loss in (forward_kl, reverse_kl, jensen_shannon)}

# What is left of one after a probability nearer to it than this has no digits in float32.
_SURE = -1e-7
_TINY = 1e-37  # a float32 with a logarithm


class Spans(NamedTuple):
    """The stretches of text whose next tokens are compared. Ids of -1 fill up and hold anything."""

    our_tokens: mx.array  # (1, S) int32, the first token of the span in the student's vocabulary
    their_tokens: mx.array  # (1, S) int32, the same of the teacher
    single: mx.array  # (1, S) bool, one token on both sides


def cross_tokenizer(
    student_first: mx.array,
    teacher_first: mx.array,
    student_rest: mx.array,
    teacher_rest: mx.array,
    spans: Spans,
    shared: Shared,
    *,
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl",
    by_beginning: bool = True,
    sorted_weight: NonNegativeFloat = 1.0,
    merge: bool = True,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = True,
) -> mx.array:
    """A divergence over what both sides can say, and the sorted L1 distance (ULD) over what one can.

    How the text goes on is one of K + 2 outcomes, whose probabilities add up to one on either side:

    - it goes on with one of the K strings that both vocabularies have: the probability of its token and,
      with `by_beginning`, of all tokens without a partner whose longest shared beginning it is;
    - it goes on with a span of several tokens as it does here: exp(first + rest), the product of the
      conditional probabilities of its tokens;
    - anything else: tokens that are in none of the K.

    What is in such a span is taken out of the string that its first token counts to, where
    exp(first) (1 - exp(rest)) of that token stays. If the two sides' first tokens count to different
    strings, what is left of both strings moves to "anything else" on both sides: the mass of one side is
    in the span, that of the other is not, and they no longer mean the same. A span of one token on both
    sides takes nothing out. With one vocabulary, shared to the last token, what is left is the divergence
    between the whole distributions.

    Source: spans and the product over their tokens as in GOLD (TRL's trainer); the sorted distance from
    ULD (Boizard et al. 2024, arXiv 2402.12030), section 3, here over what is in none of the K alone.
    The outcome "anything else" and `by_beginning` are ours; nothing is renormalised.

    Args:
        student_first: logits (1, S, Vs) that predict the first token of each span, any float type.
        teacher_first: the same of the teacher, (1, S, Vt). No gradient flows into it or `teacher_rest`.
        student_rest: (1, S) float32 nats, the summed log-probabilities at `temperature` of the span's
            other tokens (`sum_over_rest`); 0 where there are none.
        teacher_rest: the same of the teacher.
        spans: ids of the first tokens.
        shared: which tokens of the two vocabularies say the same.
        divergence: between the outcomes; the Jensen-Shannon divergence with equal shares.
        by_beginning: count a token without a partner to the longest shared string that it begins with:
            one side's "there" to "the", which is how the other side would begin it. Without, to "anything
            else": then the true distribution of the text is not where the loss is lowest.
        sorted_weight: of the sorted distance between what is in none of the K. 0 turns it off.
        merge: count spans of several tokens too; without, they are 0 and only single ones count.
        temperature: softens both sides, token by token.
        temperature_squared: multiply the divergence (not the distance, which is of the first order) by
            temperature**2.

    Returns:
        (1, S) float32, one value a span: nats, and `sorted_weight` times a distance from 0 to 2.
    """
    our_token, their_token = (mx.stop_gradient(mx.maximum(ids, 0))[..., None] for ids in spans[:2])
    ours, theirs = (_Side(side, by_beginning) for side in shared)
    our_string, their_string = ours.string_of(our_token), theirs.string_of(their_token)
    same = our_string == their_string
    strings = mx.arange(ours.paired.size)
    taken = ~(spans.single[..., None] & same & (our_string < strings.size))
    emptied = ~same & ((strings == our_string) | (strings == their_string))
    log_q, log_q_others = ours.outcomes(student_first, student_rest, our_token, taken, emptied, temperature)
    log_p, log_p_others = theirs.outcomes(
        mx.stop_gradient(teacher_first),
        mx.stop_gradient(teacher_rest),
        their_token,
        taken,
        emptied,
        temperature,
    )
    # Log-probabilities are logits of themselves.
    value = DIVERGENCES[divergence](log_q, Targets(spans.our_tokens, log_p))
    if temperature_squared:
        value = temperature**2 * value
    if sorted_weight > 0:
        value = value + sorted_weight * sorted_distance(mx.exp(log_q_others), mx.exp(log_p_others))
    return value if merge else mx.where(spans.single, value, 0.0)


def sorted_distance(one: mx.array, other: mx.array) -> mx.array:
    """L1 distance of two sets of probabilities, largest with largest, the smaller set padded with zeros.

    Behind the size of the smaller set there is nothing to subtract, so in whatever order: only that many
    of the larger are sorted, and the result is still exact.

    Source: ULD (arXiv 2402.12030), equation 5.

    Args:
        one, other: (1, S, U) float32, of any two sizes, none included. Differentiable by both.

    Returns:
        (1, S) float32, from 0 to the sum of all.
    """
    size = min(one.shape[-1], other.shape[-1])
    distance = mx.zeros(one.shape[:-1])
    for values in (one, other):
        if values.shape[-1] > size:
            distance = distance + sum_last(values)
    if size == 0:
        return distance
    largest = [_largest(values, size) for values in (one, other)]
    for values, top in zip((one, other), largest, strict=True):
        if values.shape[-1] > size:
            distance = distance - sum_last(top)
    return distance + sum_last(mx.abs(largest[0] - largest[1]))


def label_log_probability(logits: mx.array, labels: mx.array, temperature: float = 1.0) -> mx.array:
    """Log-probability of each label at a temperature: logits (1, R, V), labels (1, R) to (1, R) float32.

    A label of -1 gives anything finite.
    """
    labels = mx.stop_gradient(mx.maximum(labels, 0))[..., None]
    logits = logits.astype(mx.float32) / temperature
    return mx.take_along_axis(log_softmax(logits), labels, axis=-1).squeeze(-1)


def sum_over_rest(log_probability: mx.array, span: mx.array, spans: int) -> mx.array:
    """Add up what continues each span.

    Args:
        log_probability: (1, R) float32 nats, of the tokens behind the first of their span.
        span: (R,) int32, the span that each belongs to; -1 is left out.
        spans: how many there are, S.

    Returns:
        (1, S) float32 nats, 0 for spans without a rest.
    """
    span = mx.stop_gradient(span)
    values = mx.where(span >= 0, log_probability[0], 0.0)
    return mx.zeros((spans,)).at[mx.maximum(span, 0)].add(values)[None]


class _Side:
    """The outcomes of one vocabulary."""

    def __init__(self, side: Side, by_beginning: bool):
        arrays = [mx.stop_gradient(mx.array(ids)) for ids in side]
        self.paired, self.longer, self.begins, self.others, self.outcome = arrays
        self.by_beginning = by_beginning and self.longer.size > 0
        if not self.by_beginning:
            self.others = mx.concatenate([self.longer, self.others])

    def string_of(self, token: mx.array) -> mx.array:
        """The k of the shared string that each token counts to; K for "anything else"."""
        string = self.outcome[token]
        if self.by_beginning:
            return string
        count = self.paired.size
        return mx.where(self.paired[mx.minimum(string, count - 1)] == token, string, count)

    def outcomes(
        self,
        logits: mx.array,
        rest: mx.array,
        token: mx.array,
        taken: mx.array,
        emptied: mx.array,
        temperature: float,
    ) -> tuple[mx.array, mx.array]:
        """Log-probabilities (1, S, K+2) of the outcomes, and (1, S, U) of the tokens in none of the K.

        Args:
            token: (1, S, 1), that opens the span.
            taken: (1, S, 1), whether the span is taken out of what its first token counts to.
            emptied: (1, S, K), strings whose mass moves to "anything else".
        """
        logs = log_softmax(logits.astype(mx.float32) / temperature)
        first = mx.take_along_axis(logs, token, axis=-1)
        rest = mx.minimum(rest.astype(mx.float32), 0.0)[..., None]
        left = mx.where(taken, first + _log_one_less_exp(rest), first)

        def of(ids: mx.array) -> mx.array:
            return mx.where(ids == token, left, mx.take(logs, ids, axis=-1))

        strings = of(self.paired)
        if self.by_beginning:
            strings = mx.logaddexp(strings, self._begun(mx.exp(of(self.longer))))
        # Never -inf, and the same on both sides: an outcome that neither has adds nothing to a divergence.
        span = mx.where(taken, first + rest, LOWEST_LOG_P)
        anything_else = logsumexp(mx.where(emptied, strings, LOWEST_LOG_P))
        others = mx.zeros((*logs.shape[:-1], 0))
        if self.others.size:
            others = of(self.others)
            anything_else = mx.logaddexp(anything_else, logsumexp(others))
        strings = mx.where(emptied, LOWEST_LOG_P, strings)
        return mx.concatenate([strings, span, anything_else[..., None]], axis=-1), others

    def _begun(self, probabilities: mx.array) -> mx.array:
        """Log of the mass (1, S, K) that counts to each string by its beginning, of (1, S, L)."""
        spans = probabilities.shape[1]
        # Rows of the scatter are tokens: four times as fast on a CPU as columns.
        sums = mx.zeros((self.paired.size, spans)).at[self.begins].add(probabilities[0].T)
        return mx.log(mx.maximum(sums, _TINY)).T[None]


def _log_one_less_exp(x: mx.array) -> mx.array:
    """log(1 - exp(x)) for x <= 0, with no gradient where it is the log of nothing."""
    unsure = x < _SURE
    # Both branches of `where` are differentiated, and 0 times infinity is not a number.
    return mx.where(unsure, mx.log(-mx.expm1(mx.where(unsure, x, -math.log(2)))), LOWEST_LOG_P)


def _largest(values: mx.array, count: int) -> mx.array:
    """The largest (1, S, count), in ascending order."""
    size = values.shape[-1]
    if count < size:
        largest = mx.argpartition(mx.stop_gradient(values), size - count, axis=-1)[..., size - count :]
        values = mx.take_along_axis(values, mx.stop_gradient(largest), axis=-1)
    order = mx.argsort(mx.stop_gradient(values), axis=-1)
    return mx.take_along_axis(values, mx.stop_gradient(order), axis=-1)
