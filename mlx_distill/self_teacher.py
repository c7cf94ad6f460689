"""A student that teaches itself: as it was before training, or as a moving average of its own weights.

Both are second models with arrays of their own only where these differ from the student's.
"""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

ADAPTED = ("linear", "embedding")  # where mlx-lm's LoRA and DoRA modules hold what they adapt


def twin(model: nn.Module) -> nn.Module:
    """A second model of the same modules, whose arrays are the very arrays of the first.

    Either may then get other arrays without the other's noticing: training replaces arrays, and never
    writes into them.
    """
    arrays: Any = tree_flatten(model.state)
    return copy.deepcopy(model, {id(array): array for _, array in arrays if isinstance(array, mx.array)})


def without_adapters(model: nn.Module) -> nn.Module:
    """The model under LoRA or DoRA matrices, as it was before these were added, sharing all its arrays."""
    base = twin(model)
    plain = [
        (name, module[next(key for key in ADAPTED if key in module)])
        for name, module in base.named_modules()
        if "lora_a" in module
    ]
    base.update_modules(tree_unflatten(plain))
    return base


class Average:
    """A model whose weights are a moving average of a student's, first of all equal to them.

    What does not move in the student, such as the model under adapters, is shared with it.

    Args:
        decay: share of its weights that each update keeps.
    """

    def __init__(self, student: nn.Module, decay: float):
        self.model, self.decay = twin(student), decay
        trainable: Any = tree_flatten(student.trainable_parameters())
        self._names = [name for name, _ in trainable]

    @property
    def weights(self) -> dict[str, mx.array]:
        """Those that move, by name."""
        arrays = dict(tree_flatten(self.model.parameters()))
        return {name: arrays[name] for name in self._names}

    def follow(self, student: nn.Module, taken: mx.array | None = None) -> None:
        """weights <- decay * weights + (1 - decay) * the student's; described, not yet computed.

        Args:
            taken: whether the student has moved; where it has not, neither do they. None: it has.
        """
        now = dict(tree_flatten(student.trainable_parameters()))
        new = {name: self.decay * w + (1 - self.decay) * now[name] for name, w in self.weights.items()}
        if taken is not None:
            new = {name: mx.where(taken, new[name], w) for name, w in self.weights.items()}
        self.put(new)

    def put(self, weights: dict[str, mx.array]) -> None:
        """Replace weights by name."""
        self.model.load_weights(list(weights.items()), strict=False)
