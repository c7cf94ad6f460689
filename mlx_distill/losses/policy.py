"""The policy gradient of the reverse KL: the teacher's judgement of the very token that the student wrote."""

import mlx.core as mx

from mlx_distill.losses.labels import cross_entropy
from mlx_distill.losses.outcomes import LOWEST_LOG_P
from mlx_distill.losses.targets import Targets


def policy_gradient(student: mx.array, targets: Targets) -> mx.array:
    """log q(y) - log p(y) of the written token y; its gradient is -A grad log q(y), A = log p(y) - log q(y).

    For y drawn from q the value's expectation is KL(q || p) at this place, and the gradient's is that KL's
    gradient; for a y drawn from anything else both are of nothing in particular. Later tokens do not count
    (discount 0), and neither side's log-probability in A carries a gradient.

    Source: Thinking Machines Lab, "On-Policy Distillation", October 2025.

    Args:
        student: logits (B, T, V), any float type; the sums run in float32.
        targets: the teacher's `logits`, and the `labels` that the student itself drew.

    Returns:
        (B, T) float32 nats, of either sign.

    Raises:
        ValueError: the targets have no logits: a top k need not hold the token that was written.
    """
    if targets.logits is None:
        raise ValueError("policy_gradient needs the teacher's logits, not its top k")
    log_q = -cross_entropy(student, targets)
    log_p = mx.maximum(-cross_entropy(targets.logits, targets), LOWEST_LOG_P)
    gap = mx.stop_gradient(log_q - log_p)
    # The second factor is one, and its gradient is that of log q(y).
    return gap * (1 + log_q - mx.stop_gradient(log_q))
