"""The objective: a weighted sum of losses over the counted positions.

A sum, not a mean: sums of micro-batches and machines add up, and `train` divides once, by the number
of counted tokens. A mean of means would weigh a token of a short row more.
"""

from collections.abc import Mapping, Sequence
from math import log
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.data.batch import at_places
from mlx_distill.data.vocabularies import Shared
from mlx_distill.losses import Targets, Top
from mlx_distill.losses.chunks import Arrays, chunked_sum
from mlx_distill.losses.exits import exit_enabled, exit_weights
from mlx_distill.losses.features import balanced_weight
from mlx_distill.losses.menu import MENU, option, options_of
from mlx_distill.losses.outcomes import top_of
from mlx_distill.losses.targets import log_softmax
from mlx_distill.matching import Matching
from mlx_distill.models.early_exit import final_norm
from mlx_distill.models.head import Head
from mlx_distill.models.taps import tapped
from mlx_distill.options import Term
from mlx_distill.spans import span_sum
from mlx_distill.teacher import Layers

# What changes the weights of losses between steps: an exit loss -> weight of each of its exits, (E,); a loss
# on labels -> 1 or 0, a scalar, in runs that mix in rows which the student wrote itself.
Schedule = dict[str, mx.array]


class Voice(NamedTuple):
    """A teacher as the losses hear it."""

    share: float  # of the mixture; those of all teachers add up to 1
    head: Head | None = None  # makes logits of the last hidden states in its targets
    shared: Shared | None = None  # tokens that both have, of a teacher with a tokenizer of its own
    top_k: int | None = None  # likeliest tokens kept of them
    tail: bool = True


class Objective:
    """The losses of a recipe over a student, with the gradient of the last projection formed in chunks.

    Args:
        terms: loss -> its weight and options, as in the recipe.
        voices: the teachers, in the order in which `sums` gets their targets.
        chunk: places whose logits are held at once.
        temperature: at which `voices` keep their likeliest tokens.
        matching: what compares hidden states and attention; None without such a loss.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        student: nn.Module,
        vocabulary: int,
        voices: Sequence[Voice] = (),
        *,
        chunk: int,
        temperature: float = 1.0,
        matching: Matching | None = None,
    ):
        self.terms, self.student, self.voices = terms, student, voices
        self.chunk, self.temperature, self.matching = chunk, temperature, matching
        self.head = Head(student, vocabulary)
        self.exits = sorted({layer for term in exit_terms(terms).values() for layer in term.options["exits"]})
        self.norm = final_norm(student) if self.exits else None
        matched = matching.student_layers if matching else Layers()
        self.layers = Layers({*self.exits, *matched.hidden}, matched.attention)

    def sums(
        self,
        tokens: mx.array,
        places: mx.array,
        weights: mx.array,
        targets: Sequence[Targets],
        schedule: Schedule,
    ) -> tuple[mx.array, Arrays]:
        """The student's losses on a batch.

        Args:
            tokens: (B, T).
            places: (N,) of the counted labels in the flattened batch, -1 where N was filled up.
            weights: (1, N) float32 of the labels there, 0 where N was filled up.
            targets: of each voice, at the places; without a teacher one, with labels alone.
            schedule: `exit_schedule` of this step, or what `label_schedule` makes of it.

        Returns:
            total: scalar; its gradient is the objective's. parts: loss -> its own sum before the weight,
            for the log, in the loss's unit.
        """
        with tapped(self.student, hidden=self.layers.hidden, attention=self.layers.attention) as seen:
            last = self.head.hidden(tokens)
        hidden = {"last": at_places(last, places)}
        if self.norm is not None:
            hidden |= {f"exit {n}": self.norm(at_places(seen.hidden[n], places)) for n in self.exits}
        total, parts = self._on_logits(hidden, weights, targets, schedule)
        for name, term in self.terms.items():
            if MENU[name].family == "spans":
                weighted = span_sum(self.head, self.voices, last, targets, term, self.chunk)
                parts[name] = mx.stop_gradient(weighted) / term.weight
                total = total + weighted
        if self.matching is not None:
            on_logits = total
            for name, values in self.matching.values(seen, places, targets).items():
                value = _sum(values, weights)
                parts[name] = mx.stop_gradient(value)
                weight = mx.array(self.terms[name].weight)
                if option(name, self.terms[name].options, "balanced"):
                    weight = weight * balanced_weight(on_logits, value)
                total = total + weight * value
        return total, parts

    def _on_logits(
        self, hidden: Arrays, weights: mx.array, targets: Sequence[Targets], schedule: Schedule
    ) -> tuple[mx.array, Arrays]:
        """The losses that read logits, a chunk of places at a time."""
        terms = {name: t for name, t in self.terms.items() if MENU[name].family in ("token", "exit")}
        if not terms:
            return mx.array(0.0), {}
        fixed = {"weights": weights, "labels": targets[0].labels}
        for place, one in enumerate(targets):
            if one.last is not None:
                fixed[f"last {place}"] = one.last
            elif one.top is not None:
                fixed |= {f"{part} {place}": a for part, a in one.top._asdict().items() if a is not None}

        def chunk_sum(logits: Arrays, fixed: Arrays, _: Arrays) -> tuple[mx.array, Arrays]:
            labels, dense, tops = fixed["labels"], *self._heard(fixed)
            parts = {}
            for name, term in terms.items():
                if MENU[name].family == "token":
                    values = _token_loss(name, term, logits["last"], labels, dense, tops)
                    values = values * schedule.get(name, 1.0)
                else:
                    exits = [logits[f"exit {n}"] for n in term.options["exits"]]
                    values = _exit_loss(name, term, exits, logits["last"], labels, schedule[name])
                parts[name] = _sum(values, fixed["weights"])
            return sum((term.weight * parts[name] for name, term in terms.items()), mx.array(0.0)), parts

        return chunked_sum(chunk_sum, self.head, hidden, fixed, self.chunk)

    def _heard(
        self, fixed: dict[str, mx.array]
    ) -> tuple[list[tuple[float, mx.array]], list[tuple[float, Top]]]:
        """Shares and logits of the teachers that give whole distributions; shares and tops of the others."""
        dense, tops = [], []
        for place, voice in enumerate(self.voices):
            if f"last {place}" in fixed:
                assert voice.head is not None  # only a live teacher gives a last hidden state
                logits = mx.stop_gradient(voice.head.logits(fixed[f"last {place}"]))
                if voice.top_k is None:
                    dense.append((voice.share, logits))
                else:
                    top = top_of(logits, min(voice.top_k, logits.shape[-1]), self.temperature)
                    tops.append((voice.share, top if voice.tail else top._replace(log_tail=None)))
            elif f"indices {place}" in fixed:
                indices, log_p = fixed[f"indices {place}"], fixed[f"log_p {place}"]
                tops.append((voice.share, Top(indices, log_p, fixed.get(f"log_tail {place}"))))
        return dense, tops


def _token_loss(
    name: str,
    term: Term,
    logits: mx.array,
    labels: mx.array,
    dense: list[tuple[float, mx.array]],
    tops: list[tuple[float, Top]],
) -> mx.array:
    """(1, N) of a loss. Whole distributions are mixed first; where only tops are known, losses are."""
    loss, options = MENU[name].function, term.options
    if not MENU[name].needs_teacher:
        return loss(logits, Targets(labels), **options)
    heard = [(share, Targets(labels, top=top)) for share, top in tops]
    if dense:
        tempered = "temperature" in options_of(name)
        mixed = mixture(dense, option(name, options, "temperature") if tempered else 1.0)
        heard.append((sum(share for share, _ in dense), Targets(labels, mixed)))
    return sum((share * loss(logits, targets, **options) for share, targets in heard), mx.array(0.0))


def mixture(dense: Sequence[tuple[float, mx.array]], temperature: float) -> mx.array:
    """Logits whose softmax at `temperature` is the weighted mean of those of several teachers."""
    if len(dense) == 1:
        return dense[0][1]
    whole = sum(share for share, _ in dense)
    logs = [log_softmax(logits / temperature) + log(share / whole) for share, logits in dense]
    return temperature * mx.logsumexp(mx.stack(logs), axis=0)


def _exit_loss(
    name: str, term: Term, exits: list[mx.array], logits: mx.array, labels: mx.array, weights: mx.array
) -> mx.array:
    """(1, N): the sum over exits, each with its weight at this step."""
    own = {key: value for key, value in term.options.items() if key in MENU[name].own_options}
    target = logits if name == "exit_kl" else labels
    values = [MENU[name].function(one, target, **own) * weights[i] for i, one in enumerate(exits)]
    return sum(values, mx.array(0.0))


def exit_schedule(terms: Mapping[str, Term], layers: int, step: int, steps: int) -> Schedule:
    """Weight of each exit at a step: LayerSkip's, as a multiple of the last layer's own."""
    schedule = {}
    for name, term in exit_terms(terms).items():
        exits, scale = term.options["exits"], option(name, term.options, "scale")
        enabled = exit_enabled(option(name, term.options, "curriculum"), exits, step, steps)
        *weights, last = exit_weights(exits, layers, scale, enabled)
        schedule[name] = mx.array([weight / last for weight in weights])
    return schedule


def label_schedule(terms: Mapping[str, Term], schedule: Schedule, *, own: bool) -> Schedule:
    """A schedule in which losses on labels count on rows of the data alone, not on the student's own.

    On both it has the same keys and shapes, so that a compiled step is traced once for both.
    """
    counts = mx.array(0.0 if own else 1.0)
    on_labels = [name for name in terms if MENU[name].on_labels]
    return {**schedule, **{name: schedule.get(name, mx.array(1.0)) * counts for name in on_labels}}


def exit_terms(terms: Mapping[str, Term]) -> dict[str, Term]:
    return {name: term for name, term in terms.items() if MENU[name].family == "exit"}


def _sum(values: mx.array, weights: mx.array) -> mx.array:
    """Last axis first: float32 sums of a whole array are wrong on some backends."""
    return mx.where(weights > 0, values * weights, 0).sum(-1).sum()
