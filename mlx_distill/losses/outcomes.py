"""What a divergence compares: the teacher's and the student's log-probabilities of the same outcomes.

Dense, the outcomes are the V tokens. On the teacher's top k they are those k tokens and, as one more,
all others together. Nothing is renormalised: both sides add up to one over the k+1.
"""

import mlx.core as mx

from mlx_distill.losses.sums import LOWEST, log_softmax, logsumexp, sum_last
from mlx_distill.losses.targets import Targets, Top

# The teacher's probability of zero counts as exp(-1e5): 0 wherever it is a factor, and a reverse KL, which
# would be infinite, becomes big enough to be seen and small enough for an optimizer to square. The student
# has no such bound: however sure of itself it is, its gradient is whole.
LOWEST_LOG_P = -1e5


def outcomes(student: mx.array, targets: Targets, temperature: float = 1.0) -> tuple[mx.array, mx.array]:
    """Log-probabilities of teacher and student, at `temperature`.

    Args:
        student: logits (B, T, V), any float type.
        targets: `logits`, which are brought to the temperature too, or `top`, which is at it already.
            No gradient flows into either.

    Returns:
        log_p, log_q: both (B, T, V), or with `top` (B, T, k+1), the last being the tail; (B, T, k)
        where `top` has no tail, and where k is V and nothing is left for one. float32 nats, finite.

    Raises:
        ValueError: the targets have neither logits nor a top k.
    """
    student = soften(student, temperature)
    if targets.logits is not None:
        log_p = log_softmax(soften(mx.stop_gradient(targets.logits), temperature))
        log_q = log_softmax(student)
    elif targets.top is not None:
        log_p, log_q = _of_top(student, targets.top)
    else:
        raise ValueError("a divergence needs the teacher's logits or its top k")
    return mx.maximum(log_p, LOWEST_LOG_P), log_q


def has_tail(targets: Targets, vocabulary: int) -> bool:
    """Whether the last of the outcomes is not a token but all the others together."""
    top = targets.top
    return (
        targets.logits is None
        and top is not None
        and top.log_tail is not None
        and top.indices.shape[-1] < vocabulary
    )


def top_of(logits: mx.array, k: int, temperature: float = 1.0) -> Top:
    """The k likeliest tokens of the teacher and the mass of all others, at `temperature`.

    Args:
        logits: (B, T, V), any float type. No gradient flows back into them.

    Returns:
        `indices` (B, T, k) int32 in no order, `log_p` (B, T, k) and `log_tail` (B, T) float32 nats. The
        tail is summed up, not taken as what is missing to one, so it is right however small. With k = V
        nothing is left over and `log_tail` is None.

    Raises:
        ValueError: k is not between 1 and V.
    """
    vocabulary = logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary of {vocabulary}; got {k}")
    logits = mx.stop_gradient(logits)
    indices = mx.argpartition(logits, vocabulary - k, axis=-1)[..., vocabulary - k :].astype(mx.int32)
    log_p, log_tail = _kept_and_rest(soften(logits, temperature), indices, rest=True)
    return Top(indices, log_p, log_tail)


def top_masses(student: mx.array, top: Top, temperature: float = 1.0) -> tuple[mx.array, mx.array, mx.array]:
    """How much of both sides the teacher's top k covers: for the log, no gradient flows.

    Args:
        student: logits (B, T, V), any float type.
        temperature: that of `top`.

    Returns:
        The teacher's probability of its k tokens; the student's of the same tokens; the overlap: the
        share of these that are also among the student's own k likeliest, tokens as likely as its k-th
        included. Each (B, T) float32 in 0..1.
    """
    student = mx.stop_gradient(soften(student, temperature))
    k = top.indices.shape[-1]
    log_q, _ = _kept_and_rest(student, top.indices, rest=False)
    # Against the k-th largest, not k names against k names: that would be k * k comparisons.
    kth_largest = mx.topk(student, k, axis=-1).min(-1, keepdims=True)
    common = mx.take_along_axis(student, top.indices, axis=-1) >= kth_largest
    teacher_mass = mx.stop_gradient(sum_last(mx.exp(top.log_p.astype(mx.float32))))
    return teacher_mass, sum_last(mx.exp(log_q)), common.astype(mx.float32).mean(-1)


def soften(logits: mx.array, temperature: float) -> mx.array:
    """Logits at a temperature, in float32: divided in bfloat16 they would be rounded once more."""
    logits = logits.astype(mx.float32)
    return logits if temperature == 1 else logits / temperature


def _of_top(student: mx.array, top: Top) -> tuple[mx.array, mx.array]:
    """log_p and log_q of the top k, with the tail as the last outcome where there is one."""
    log_p = mx.stop_gradient(top.log_p.astype(mx.float32))
    log_q, student_tail = _kept_and_rest(student, top.indices, rest=top.log_tail is not None)
    if top.log_tail is None or student_tail is None:
        return log_p, log_q
    log_tail = mx.stop_gradient(top.log_tail.astype(mx.float32))
    log_p = mx.concatenate([log_p, log_tail[..., None]], axis=-1)
    return log_p, mx.concatenate([log_q, student_tail[..., None]], axis=-1)


def _kept_and_rest(logits: mx.array, indices: mx.array, *, rest: bool) -> tuple[mx.array, mx.array | None]:
    """Log-probabilities of the tokens at `indices` (B, T, k), and of all others together (B, T).

    The rest is None where it is not asked for, or where the k are all there are. One pass of exp over V.
    """
    indices = mx.stop_gradient(indices)  # a gather under mx.checkpoint would ask for their gradient
    kept = mx.take_along_axis(logits, indices, axis=-1)
    if indices.shape[-1] == logits.shape[-1]:
        return log_softmax(kept), None
    if not rest:
        return mx.maximum(kept - logsumexp(logits)[..., None], LOWEST), None
    # Emptied, not subtracted from the whole: what is left of one after a mass near one has no digits.
    # And not emptied to -inf, of which a row that has nothing else would make NaN.
    others = logsumexp(mx.put_along_axis(logits, indices, mx.array(LOWEST), axis=-1))
    whole = logsumexp(kept)
    # Each mass from the odds, so that one near one is right to the last digit.
    log_kept = -mx.logaddexp(0.0, others - whole)
    log_others = -mx.logaddexp(0.0, whole - others)
    return mx.maximum(kept - whole[..., None] + log_kept[..., None], LOWEST), log_others
