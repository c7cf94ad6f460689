"""Losses. A loss is a function `(student logits, targets, *, options) -> (B, T) float32 nats`.

Its name is the recipe key, the metric in the log and the heading in the docs; its keyword-only
arguments are its options. `p` is the teacher and `q` the student: `forward_kl` is KL(p||q).
"""

import inspect
from typing import Any

from mlx_distill.losses.divergences import forward_kl
from mlx_distill.losses.labels import cross_entropy
from mlx_distill.losses.targets import Targets

LOSSES = {loss.__name__: loss for loss in (cross_entropy, forward_kl)}

__all__ = ["LOSSES", "Targets", "cross_entropy", "forward_kl", "options_of"]


def options_of(loss: str) -> dict[str, Any]:
    """Name and type of each option of a loss, read off its signature."""
    parameters = inspect.signature(LOSSES[loss]).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
