"""The student: loaded or built, with the parameters that move set free and no others."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill import models
from mlx_distill.errors import ModelError
from mlx_distill.keys import seed_global
from mlx_distill.models import Loaded
from mlx_distill.options import Student


def make_student(options: Student, tokenizer: Any | None, seed: int) -> Loaded:
    """The student as it is before training; the same bits for the same recipe and seed.

    Args:
        tokenizer: for a new `shape`: the teacher's, or one trained on the data. A loaded model has
            its own.
    """
    if options.shape is not None:
        return models.build(options.shape, tokenizer, seed)
    assert options.model is not None  # the recipe holds one of the two
    loaded = models.load(options.model, "student.model")
    if options.method != "full":
        add_adapters(loaded.model, options, seed)
    return loaded


def add_adapters(model: Any, options: Student, seed: int) -> None:
    """Freeze a model and add trainable LoRA or DoRA matrices to its last `layers` layers, in place."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    seed_global(seed, "adapters")
    linear_to_lora_layers(
        model,
        options.layers if options.layers is not None else len(model.layers),
        {"rank": options.rank, "scale": options.scale, "dropout": options.dropout},
        use_dora=options.method == "dora",
    )
    mx.eval(model.parameters())


def widen(model: nn.Module) -> mx.Dtype | None:
    """Turn half-precision weights that will move to float32, in place, and give the type they had.

    Of weights around 0.02 in bfloat16, most steps of 1e-5 would be rounded away.

    Raises:
        ModelError: the weights are quantized, and so have no gradient.
    """
    if any("scales" in module for _, module in model.named_modules()):
        raise ModelError(
            "`student.model` is quantized, so its weights cannot move; use `student.method` lora, "
            "or the unquantized model"
        )
    arrays: Any = tree_flatten(model.parameters())
    halves = {array.dtype for _, array in arrays} & {mx.bfloat16, mx.float16}
    if not halves:
        return None
    model.set_dtype(mx.float32)
    return halves.pop()


def checkpoint_layers(model: Any) -> None:
    """Recompute each layer in the backward pass instead of keeping what it computed, in place.

    mlx-lm's `grad_checkpoint` patches the class, and with it a teacher of the same architecture.
    Here each layer of this model alone becomes an instance of a subclass of its class.
    """
    for layer in model.layers:
        layer.__class__ = _checkpointed(type(layer))


def _checkpointed(layer_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def run(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return layer_class.__call__(self, *args, **kwargs)

        return mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)

    return type(f"Checkpointed{layer_class.__name__}", (layer_class,), {"__call__": call})
