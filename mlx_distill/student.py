"""The student: loaded or built, with the parameters that move set free and no others."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_distill import models
from mlx_distill.errors import ModelError
from mlx_distill.keys import seed_global
from mlx_distill.models import Loaded
from mlx_distill.options import Student


def make_student(options: Student, tokenizer: Any | None, seed: int, *, trust: bool = False) -> Loaded:
    """The student as it is before training; the same bits for the same recipe and seed.

    Args:
        tokenizer: for a new `shape`: the teacher's, or one trained on the data. A loaded model has
            its own.
        trust: it may be Python code.
    """
    if options.shape is not None:
        return models.build(options.shape, tokenizer, seed)
    assert options.model is not None  # the recipe holds one of the two
    loaded = models.load(options.model, "student.model", trust=trust)
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
        def run(parameters: Any, args: Any, kwargs: Any) -> Any:
            own = self.parameters()
            self.update(parameters)
            try:
                return layer_class.__call__(self, *args, **kwargs)
            finally:
                self.update(own)

        return _recomputed(run, self.trainable_parameters(), args, kwargs)

    return type(f"Checkpointed{layer_class.__name__}", (layer_class,), {"__call__": call})


def _recomputed(run: Callable[[Any, Any, Any], Any], parameters: Any, args: Any, kwargs: Any) -> Any:
    """`run(parameters, args, kwargs)`, computed once more in the backward pass, and not before its turn.

    `mx.checkpoint` leaves MLX free to compute a layer again early, and the gradients of its weights late; in
    between lies all that was to be saved. So here a layer is computed again only once the gradient of what it
    gave is there, and the layer before it waits until this one's gradients are.
    """
    tree = (parameters, args, kwargs)
    inputs: list[mx.array] = []
    tree_map(lambda leaf: inputs.append(leaf) if _moves(leaf) else None, tree)
    count = sum(_moves(leaf) for _, leaf in tree_flatten(parameters))
    shaped: list[Any] = []  # how the outputs hang together

    def flat(*arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)
        made = [run(*tree_map(lambda leaf: next(given) if _moves(leaf) else leaf, tree))]
        # Not the arrays: of a compiled step they hold the trace, which holds this function, for ever.
        shaped[:] = tree_map(lambda _: None, made)
        return [array for _, array in tree_flatten(made)]  # type: ignore[misc]

    function = mx.custom_function(flat)

    @function.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        _, found = mx.vjp(flat, mx.depends(list(primals), list(cotangents)), list(cotangents))
        weights, before = found[:count], found[count:]
        return [*weights, *(mx.depends(before, weights) if weights and before else before)]

    made: Any = function(*inputs)
    outputs = iter(made)
    return tree_map(lambda _: next(outputs), shaped[0])


def _moves(leaf: Any) -> bool:
    """Whether a gradient may flow into it."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)
