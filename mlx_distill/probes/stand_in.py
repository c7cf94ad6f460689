"""A model as large as a student that is yet to be cut out, so that its memory shows in the first minute."""

from copy import deepcopy
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_map

from mlx_distill.models import Loaded
from mlx_distill.prune.axes import resized
from mlx_distill.student import add_adapters
from mlx_distill.work import Work

WEIGHT = 0.01  # all of them: only shapes and types mean anything


def stand_in(work: Work, method: Literal["full", "lora", "dora"] | None = None) -> Loaded:
    """The largest that is trained: the student, or what the first of several rounds leaves to be healed.

    Args:
        method: which parameters move; None: as the recipe says.
    """
    from mlx_lm.utils import _get_classes

    planned, recipe = work.prepared.planned, work.recipe
    assert planned is not None
    several = len(planned.rounds) > 1
    config = resized(planned.source, planned.rounds[0]) if several else planned.config
    model_class, arguments = _get_classes(config)
    model: Any = model_class(arguments.from_dict(deepcopy(config)))  # gemma3 writes into what it is given
    dtype = mx.float32 if planned.bytes_each > 3 else mx.bfloat16

    def constant(array: mx.array) -> mx.array:
        """In place of random numbers, which are never computed."""
        return mx.full(array.shape, WEIGHT, dtype if mx.issubdtype(array.dtype, mx.floating) else array.dtype)

    model.update(tree_map(constant, model.parameters()))
    if (method or recipe.student.method) != "full":
        add_adapters(model, recipe.student, recipe.seed)
    return Loaded(model, config, work.prepared.tokenizer)
