"""Losses. A loss is a function `(student logits, targets, *, options) -> (B, T) float32 nats`.

Its name is the recipe key, the metric in the log and the heading in the docs; its keyword-only
arguments are its options. `p` is the teacher and `q` the student: `forward_kl` is KL(p||q).
`policy_gradient` stands beside `LOSSES`: its gradient is not that of its value.
"""

from mlx_distill.losses.divergences import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from mlx_distill.losses.labels import cross_entropy
from mlx_distill.losses.outcomes import top_masses, top_of
from mlx_distill.losses.policy import policy_gradient
from mlx_distill.losses.targets import Targets, Top

LOSSES = {
    loss.__name__: loss
    for loss in (
        cross_entropy,
        forward_kl,
        reverse_kl,
        jensen_shannon,
        skewed_forward_kl,
        skewed_reverse_kl,
        adaptive_kl,
        total_variation,
    )
}

NEEDS_TEACHER = frozenset(LOSSES) - {"cross_entropy"}

# Losses that must not be given a teacher's top k without its tail, and why.
NEEDS_TAIL = {
    "reverse_kl": "it is lowest where the student puts a factor e less on the teacher's k tokens than the"
    " teacher does, and is as good as perfect where the student leaves them altogether",
    "skewed_reverse_kl": "it is lowest where the student puts less on the teacher's k tokens than the"
    " teacher does, and is as good as perfect where the student leaves them altogether",
    "adaptive_kl": "its reverse half goes below zero, the value of agreement, where the student puts less on"
    " the teacher's k tokens than the teacher does",
}

__all__ = [
    "LOSSES",
    "NEEDS_TAIL",
    "NEEDS_TEACHER",
    "Targets",
    "Top",
    "adaptive_kl",
    "cross_entropy",
    "forward_kl",
    "jensen_shannon",
    "policy_gradient",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "top_masses",
    "top_of",
    "total_variation",
]
