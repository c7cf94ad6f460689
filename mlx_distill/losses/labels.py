"""Losses on the labels: the tokens that the data, or the teacher's own answer, contains."""

import mlx.core as mx

from mlx_distill.losses.sums import logsumexp
from mlx_distill.losses.targets import Targets


def cross_entropy(student: mx.array, targets: Targets) -> mx.array:
    """-log q(label): plain next-token training.

    Args:
        student: logits (B, T, V), any float type; the sum runs in float32.
        targets: only its labels are read.

    Returns:
        (B, T) float32 nats, >= 0.
    """
    student = student.astype(mx.float32)
    labels = mx.stop_gradient(targets.labels[..., None])  # a gather asks for the gradient of its indices
    chosen = mx.take_along_axis(student, labels, axis=-1).squeeze(-1)
    return logsumexp(student) - chosen
