"""Feature matching: losses on what one layer of the student and one of the teacher compute inside.

Each takes one pair of layers and gives one value a position, which is zero where the student's layer does
as the teacher's; `layer_maps.py` says which layers make a pair. No gradient flows into the teacher.
"""

import math
from typing import TYPE_CHECKING, Annotated, Literal

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field, PositiveInt

from mlx_distill.losses.attention_scores import attention_scores, visible_keys
from mlx_distill.losses.relations import (
    Relation,
    check_relation_heads,
    relation_heads,
    relation_scores,
    widths,
)
from mlx_distill.losses.targets import log_softmax

if TYPE_CHECKING:
    from mlx_distill.models.taps import Attention

_RELATIONS: list[Relation] = ["queries", "keys", "values"]
_LOWEST = -1e30  # a score that leaves no probability; a row of -inf, as of padding, would be nan


def hidden_mse(student: mx.array, teacher: mx.array, *, normalize: bool = False) -> mx.array:
    """Mean squared difference of two hidden states: TinyBERT (Jiao et al. 2020, section 3.1).

    Args:
        student: (B, T, D), any float type; `project` brings another width to the teacher's.
        teacher: (B, T, D).
        normalize: divide both by their root mean square over D first, since the size of the residual
            stream differs between models and grows with depth. Minitron compares states behind the
            norm likewise (Muralidharan et al. 2024, section 3); here without the norm's learned weights.

    Returns:
        (B, T) float32, mean over D: squared units of the hidden state, or without unit and in 0..4 if
        normalised. Exactly zero, gradient included, where both are equal.

    Raises:
        ValueError: the widths differ.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"hidden states are {student.shape[-1]} wide in the student and {teacher.shape[-1]} in the "
            "teacher; project the student's first"
        )
    student, teacher = student.astype(mx.float32), mx.stop_gradient(teacher).astype(mx.float32)
    if normalize:
        student, teacher = _unit_rms(student), _unit_rms(teacher)
    return mx.square(student - teacher).mean(-1)


def hidden_cosine(student: mx.array, teacher: mx.array) -> mx.array:
    """1 - cosine of two hidden states: DistilBERT (Sanh et al. 2019, section 2).

    Computed as half the squared distance of the normalised states, which is the same number, exactly
    zero at equality, and without the digits that 1 - cosine loses near it.

    Args:
        student, teacher: (B, T, D), any float type, as for `hidden_mse`.

    Returns:
        (B, T) float32 without unit, 0 (same direction) to 2 (opposite).

    Raises:
        ValueError: the widths differ.
    """
    return hidden_mse(student, teacher, normalize=True) / 2


def attention_transfer(
    student: "Attention", teacher: "Attention", *, on: Literal["distributions", "scores"] = "distributions"
) -> mx.array:
    """How differently two layers attend: over keys that both may see in all heads, mean over heads.

    Where head counts differ, each side is averaged over its heads first: probabilities, or scores.
    Attention sinks are left out: what is compared is how the rest is shared among keys. Memory is that
    of (B, H, T, T) float32, a few times over.

    Args:
        student: queries, keys, scale and mask of one layer, as `models.taps.Attention`.
        teacher: those of a layer on the same tokens.
        on: "distributions": KL(teacher || student) of each query's attention (MobileBERT, Sun et al.
            2020, section 3; MiniLM, Wang et al. 2020, section 3.1). "scores": squared difference of the
            scores before the softmax, mean over visible keys (TinyBERT, Jiao et al. 2020, section 3.1);
            a constant added to all scores of a query counts there, though the model computes the same.

    Returns:
        (B, T) float32, one value a query: nats, or squared scores. Zero where both attend alike.
    """
    visible = visible_keys(student) & visible_keys(teacher)
    ours, theirs = attention_scores(student), mx.stop_gradient(attention_scores(teacher))
    if on == "distributions":
        return _attention_kl(theirs, ours, visible)
    # Hidden scores are -inf: out of the way before anything is subtracted.
    ours, theirs = mx.where(visible, ours, 0.0), mx.where(visible, theirs, 0.0)
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = ours.mean(1, keepdims=True), theirs.mean(1, keepdims=True)
    keys = mx.maximum(visible.sum(-1), 1)
    return (mx.square(ours - theirs).sum(-1) / keys).mean(1)


def attention_relations(
    student: "Attention",
    teacher: "Attention",
    *,
    relations: Annotated[list[Relation], Field(min_length=1)] = _RELATIONS,
    heads: PositiveInt | None = None,
) -> mx.array:
    """How differently two layers relate positions by their queries, keys and values: MiniLMv2.

    The heads of each are put together, cut into `heads` relation heads, and the relation is softmax(x x^T /
    sqrt(width of a relation head)): Wang et al. 2021, section 3. No head count, head size or
    grouping has to agree. A query is related to the keys that `attention_transfer` compares: for
    causal layers itself and what precedes it, so padding on the right is never seen by real positions,
    and within the window where a layer has one.

    Args:
        student: queries, keys, values and mask of one layer, as `models.taps.Attention`. Queries and
            keys carry their rotary positions.
        teacher: those of a layer on the same tokens.
        relations: which of the three are compared.
        heads: relation heads; must divide all widths. null: the largest number that does and is at most
            the student's attention heads. More compare finer (the paper takes 48 and 64), and need
            memory for as many T x T matrices.

    Returns:
        (B, T) float32 nats: KL(teacher || student) of relations, mean over relation heads and over
        `relations`. Zero where both relate positions alike.

    Raises:
        ValueError: `heads` does not divide a width.
    """
    student_widths, teacher_widths = widths(student, relations), widths(teacher, relations)
    if heads is None:
        heads = relation_heads([*student_widths, *teacher_widths], most=student.queries.shape[1])
    else:
        check_relation_heads(heads, student_widths, teacher_widths)
    visible = visible_keys(student) & visible_keys(teacher)
    divergences = []
    for relation in relations:
        ours = relation_scores(getattr(student, relation), heads)
        theirs = relation_scores(mx.stop_gradient(getattr(teacher, relation)), heads)
        divergences.append(_attention_kl(theirs, ours, visible))
    return mx.stack(divergences).mean(0)


def balanced_weight(logits_loss: mx.array, feature_loss: mx.array) -> mx.array:
    """The weight that makes a feature loss count as much as the loss on logits, at every step anew.

    logits_loss / feature_loss (Minitron, Muralidharan et al. 2024, section 3). Without gradient, or the
    product would be the loss on logits and teach nothing new. It grows without bound as the features
    come to match; where they do (feature_loss at most 1e-8, no more than rounding) it is 0.

    Args:
        logits_loss, feature_loss: scalars, both summed (or both averaged) over the same positions.

    Returns:
        scalar float32.
    """
    logits_loss, feature_loss = logits_loss.astype(mx.float32), feature_loss.astype(mx.float32)
    weight = logits_loss / mx.maximum(feature_loss, 1e-8)
    return mx.stop_gradient(mx.where(feature_loss > 1e-8, weight, 0.0))


class Projections(nn.Module):
    """Trained matrices that bring the student's hidden states to the teacher's width, one a pair."""

    def __init__(self, pairs: int, student_width: int, teacher_width: int):
        super().__init__()
        self.pairs = [nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs)]


def make_projections(
    pairs: list[tuple[int, int]], student_width: int, teacher_width: int
) -> Projections | None:
    """One projection a pair of layers (TinyBERT, Jiao et al. 2020, W_h of section 3.1), float32.

    Drawn from MLX's random state, which the caller seeds. None where both widths are equal.
    """
    return None if student_width == teacher_width else Projections(len(pairs), student_width, teacher_width)


def project(projections: Projections | None, pair: int, hidden: mx.array) -> mx.array:
    """A student's hidden state (B, T, D) in the teacher's width.

    Args:
        pair: index in the list that `make_projections` was given, from 0; not a layer's number.
    """
    return hidden if projections is None else projections.pairs[pair](hidden)


def _unit_rms(hidden: mx.array) -> mx.array:
    return hidden * mx.rsqrt(mx.square(hidden).mean(-1, keepdims=True) + 1e-12)


def _attention_kl(teacher: mx.array, student: mx.array, visible: mx.array) -> mx.array:
    """KL(teacher || student) over visible keys of scores (B, H, T, T); mean over heads, (B, T) nats."""
    log_p = log_softmax(mx.where(visible, teacher, _LOWEST))
    log_q = log_softmax(mx.where(visible, student, _LOWEST))
    if log_p.shape[1] != log_q.shape[1]:
        log_p, log_q = _mean_of_heads(log_p), _mean_of_heads(log_q)
    # At hidden keys 0 times a finite number; a row that sees nothing is the same on both sides.
    return (mx.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)


def _mean_of_heads(log_probabilities: mx.array) -> mx.array:
    """Log of the heads' mean probability; in logs throughout, so that none becomes log 0."""
    heads = log_probabilities.shape[1]
    return mx.logsumexp(log_probabilities, axis=1, keepdims=True) - math.log(heads)
