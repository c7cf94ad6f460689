"""Divergences between the teacher's distribution p and the student's q over the next token.

All take the student's logits (B, T, V), of any float type, and targets with the teacher's `logits` or,
in their place, its `top` k, whose k+1 outcomes (k tokens and the tail) then stand for the vocabulary. All
give (B, T) float32 nats, zero where p = q up to rounding, and raise ValueError where the targets hold
nothing of a teacher. No gradient flows into the targets. Logits may be -inf on either side;
`outcomes.LOWEST_LOG_P` says what a probability of zero counts as.

`temperature` softens both sides: logits are divided by it (`top` is at it already). With
`temperature_squared` the result is multiplied by temperature**2, which keeps the size of the gradient
(Hinton et al. 2015, arXiv 1503.02531, section 2).

Constants are Python floats: a NumPy scalar on the left of an mx.array leaves the graph and the gradient
is zero, without an error.
"""

import math
from typing import Annotated, Any

import mlx.core as mx
from pydantic import Field, PositiveFloat

from mlx_distill.losses.outcomes import has_tail, outcomes, soften
from mlx_distill.losses.sums import LOWEST, odds, sum_last, with_gradient
from mlx_distill.losses.targets import Targets

Share = Annotated[float, Field(gt=0, lt=1)]
ShareOrZero = Annotated[float, Field(ge=0, lt=1)]


def forward_kl(
    student: mx.array,
    targets: Targets,
    *,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = True,
) -> mx.array:
    """KL(p || q) = sum p log(p / q): the student must cover all that the teacher does.

    Source: Hinton et al. 2015, section 2, less the teacher's entropy, so that it ends at zero.

    Returns:
        (B, T) float32 nats, >= 0 up to rounding; on a `top` without tail down to P log P, where P is the
        teacher's mass on its k, reached at q = p / P.
    """
    if targets.logits is None:
        nats = _forward(*outcomes(student, targets, temperature))
    else:
        nats = _forward_of_logits(soften(targets.logits, temperature), soften(student, temperature))
    return _scaled(nats, temperature, temperature_squared)


def reverse_kl(
    student: mx.array,
    targets: Targets,
    *,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = True,
) -> mx.array:
    """KL(q || p) = sum q log(q / p): the student must stay where the teacher is.

    Source: MiniLLM (arXiv 2306.08543), here token by token over the whole distribution.

    Returns:
        (B, T) float32 nats, >= 0 up to rounding. Needs the tail: see `losses.NEEDS_TAIL`.
    """
    log_p, log_q = outcomes(student, targets, temperature)
    return _scaled(_reverse(log_p, log_q), temperature, temperature_squared)


def jensen_shannon(
    student: mx.array,
    targets: Targets,
    *,
    beta: Share = 0.5,
    normalize: bool = False,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = True,
) -> mx.array:
    """beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q.

    Source: GKD (Agarwal et al. 2023, arXiv 2306.13649), its generalized JSD(beta).

    Args:
        beta: the teacher's share of m. The value tends to 0 towards either end.
        normalize: divide by beta (1 - beta), which makes it tend to the forward KL for beta -> 0 and to the
            reverse KL for beta -> 1.

    Returns:
        (B, T) float32 nats, from 0 to -beta log(beta) - (1 - beta) log(1 - beta), times the scales; at
        beta = 0.5 at most log 2, and symmetric.
    """
    log_p, log_q = outcomes(student, targets, temperature)
    log_m_over_p = _log_mixture(log_q - log_p, 1 - beta)
    log_m_over_q = _log_mixture(log_p - log_q, beta)
    nats = -sum_last(beta * mx.exp(log_p) * log_m_over_p + (1 - beta) * mx.exp(log_q) * log_m_over_q)
    if normalize:
        nats = nats / (beta * (1 - beta))
    return _scaled(nats, temperature, temperature_squared)


def skewed_forward_kl(
    student: mx.array,
    targets: Targets,
    *,
    alpha: ShareOrZero = 0.1,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = True,
) -> mx.array:
    """KL(p || alpha p + (1 - alpha) q): forward KL that cannot exceed -log(alpha).

    Source: DistiLLM (Ko et al. 2024, arXiv 2402.03898), skew KL.

    Args:
        alpha: the teacher's share of the mixture; 0 is the plain forward KL.

    Returns:
        (B, T) float32 nats, >= 0 up to rounding; less on a `top` without tail, as `forward_kl`.
    """
    if alpha == 0:
        return forward_kl(student, targets, temperature=temperature, temperature_squared=temperature_squared)
    log_p, log_q = outcomes(student, targets, temperature)
    log_m_over_p = _log_mixture(log_q - log_p, 1 - alpha)
    return _scaled(-sum_last(mx.exp(log_p) * log_m_over_p), temperature, temperature_squared)


def skewed_reverse_kl(
    student: mx.array,
    targets: Targets,
    *,
    alpha: ShareOrZero = 0.1,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = True,
) -> mx.array:
    """KL(q || (1 - alpha) p + alpha q): reverse KL that cannot exceed -log(alpha).

    Source: DistiLLM (Ko et al. 2024, arXiv 2402.03898), skew reverse KL. The gradient
    flows through the mixture too.

    Args:
        alpha: the student's share of the mixture; 0 is the plain reverse KL.

    Returns:
        (B, T) float32 nats, >= 0 up to rounding. Needs the tail: see `losses.NEEDS_TAIL`.
    """
    log_p, log_q = outcomes(student, targets, temperature)
    if alpha == 0:
        nats = _reverse(log_p, log_q)
    else:
        log_m_over_q = _log_mixture(log_p - log_q, 1 - alpha)
        nats = -sum_last(mx.exp(log_q) * log_m_over_q)
    return _scaled(nats, temperature, temperature_squared)


def adaptive_kl(
    student: mx.array,
    targets: Targets,
    *,
    head: Share = 0.5,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = True,
) -> mx.array:
    """w KL(p || q) + (1 - w) KL(q || p), where w is the head's share of the gap sum |p - q|.

    Source: Wu et al. 2024 (arXiv 2404.02657), adaptive KL. As there the weights carry no gradient. The head
    is the fewest tokens of the teacher that together reach the mass `head`, and any as likely as the last
    of them, so that no order among equals matters; the paper's released code leaves out the token that
    crosses the mark. The tail of a `top` is never in the head: each of its tokens is less likely.

    Args:
        head: probability of the teacher that its head reaches.

    Returns:
        (B, T) float32 nats, >= 0 up to rounding. Needs the tail: see `losses.NEEDS_TAIL`.
    """
    log_p, log_q = outcomes(student, targets, temperature)
    p = mx.exp(log_p)
    gap = mx.abs(p - mx.exp(mx.stop_gradient(log_q)))
    tokens = p[..., :-1] if has_tail(targets, student.shape[-1]) else p
    # Where both agree there is no gap to share: the constant makes that one half instead of 0 / 0.
    in_head = (p >= _least_likely_of_head(tokens, head)) & (mx.arange(p.shape[-1]) < tokens.shape[-1])
    tiny = 1e-20
    weight = (sum_last(gap * in_head) + tiny) / (sum_last(gap) + 2 * tiny)
    nats = weight * _forward(log_p, log_q) + (1 - weight) * _reverse(log_p, log_q)
    return _scaled(nats, temperature, temperature_squared)


def total_variation(
    student: mx.array,
    targets: Targets,
    *,
    temperature: PositiveFloat = 1.0,
    temperature_squared: bool = False,
) -> mx.array:
    """sum |p - q| / 2: the mass that would have to move; one less the chance that a draft is accepted.

    Source: f-distill (Wen et al. 2023, arXiv 2307.15190). Of the first order, not the second:
    its gradient shrinks as 1 / temperature and jumps at p = q. So temperature**2, which would make it grow,
    is off unless asked for.

    Returns:
        (B, T) float32, from 0 to 1 (a probability; nats by courtesy of the objective's sum).
    """
    log_p, log_q = outcomes(student, targets, temperature)
    half = 0.5 * sum_last(mx.abs(mx.exp(log_p) - mx.exp(log_q)))
    return _scaled(half, temperature, temperature_squared)


def _forward(log_p: mx.array, log_q: mx.array) -> mx.array:
    return sum_last(mx.exp(log_p) * (log_p - log_q))


def _forward_of_logits(teacher: mx.array, student: mx.array) -> mx.array:
    """The same from logits over the whole vocabulary, where memory matters most.

    The gradient, q - p, is written out: with one pass of exp a side for value and gradient together, and with
    half as many arrays as MLX would hold.
    """
    teacher = mx.maximum(mx.stop_gradient(teacher), LOWEST)

    @mx.custom_function
    def with_odds(student: mx.array) -> tuple[mx.array, ...]:
        student = mx.maximum(student, LOWEST)
        p, q = odds(teacher), odds(student)
        shift = p.largest - q.largest + mx.log(p.total / q.total)
        nats = sum_last(p.odds * (teacher - student - shift)) / p.total.squeeze(-1)
        return nats, p.odds, q.odds, p.total, q.total

    @with_odds.vjp
    def _(student: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        _, p, q, p_total, q_total = outputs
        return (q - p * (q_total / p_total)) * (cotangents[0][..., None] / q_total)

    outputs: Any = with_odds(student)
    return outputs[0]


def _reverse(log_p: mx.array, log_q: mx.array) -> mx.array:
    return sum_last(mx.exp(log_q) * (log_q - log_p))


def _log_mixture(log_ratio: mx.array, share: float) -> mx.array:
    """log(1 - share + share * a / b), from log(a / b): of a mixture over its other side, b.

    From the ratio, not from the mixture's own logarithm, whose rounding is of the size of log b: where a and
    b are near, and towards the ends of `jensen_shannon`, that rounding would be all that is left.
    """

    @with_gradient(lambda x, cotangent, output: cotangent * mx.sigmoid(x + math.log(share / (1 - share))))
    def stable(x: mx.array) -> mx.array:
        if min(share, 1 - share) < 0.02:  # below, log1p would be of -1 and a few digits
            return mx.logaddexp(math.log(1 - share), math.log(share) + x)
        other = mx.where(x > 0, 1 - share, share)  # the bigger of a and b is taken out, exp cannot overflow
        return mx.maximum(x, 0) + mx.log1p(other * mx.expm1(-mx.abs(x)))

    return stable(log_ratio)


def _scaled(nats: mx.array, temperature: float, squared: bool) -> mx.array:
    return temperature**2 * nats if squared else nats


def _least_likely_of_head(p: mx.array, head: float) -> mx.array:
    """The smallest probability (B, T, 1) among the fewest outcomes that together reach `head`."""
    ascending = mx.sort(p, axis=-1)
    likelier = mx.cumsum(ascending, axis=-1, reverse=True, inclusive=False)
    return mx.where(likelier < head, ascending, math.inf).min(-1, keepdims=True)
