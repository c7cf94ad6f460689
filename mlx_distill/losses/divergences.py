"""Divergences between the teacher's distribution p and the student's q over the next token."""

import mlx.core as mx
from pydantic import PositiveFloat

from mlx_distill.losses.targets import Targets, log_softmax


def forward_kl(student: mx.array, targets: Targets, *, temperature: PositiveFloat = 1.0) -> mx.array:
    """KL(p || q): the student must cover all that the teacher does.

    Args:
        student: logits (B, T, V), any float type; the sum runs in float32.
        targets: its `logits` are the teacher's; no gradient flows into them.
        temperature: softens both sides. The result is scaled by temperature**2, which keeps the
            size of the gradient (Hinton et al. 2015, section 2).

    Returns:
        (B, T) float32 nats, >= 0 up to rounding, and zero where the two distributions are equal.
    """
    if targets.logits is None:
        raise ValueError("forward_kl needs the teacher's logits")
    teacher = mx.stop_gradient(targets.logits)
    if temperature != 1:
        teacher, student = teacher / temperature, student / temperature
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return temperature**2 * (mx.exp(log_p) * (log_p - log_q)).sum(-1)
