"""What a step without finite numbers was made of, in words: losses, layers, micro-batches."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distill.data.batch import Batch
from mlx_distill.losses.menu import MENU
from mlx_distill.recipe import Recipe


class Seen(NamedTuple):
    """A micro-batch of a step, for what is told of it."""

    batch: Batch
    own: bool  # whether the student wrote its rows
    parts: dict[str, mx.array]  # of each loss, summed over the counted labels
    weight: mx.array  # of these labels


def diagnosis(
    recipe: Recipe, seen: Sequence[Seen], gradients: Mapping[str, float], rate: float, *, never: bool
) -> list[str]:
    """What is not finite, and what to try: a line each.

    Args:
        gradients: layer -> norm of its gradient.
        rate: the learning rate.
        never: not one step was taken before.
    """
    options = recipe.train
    broken = [name for name, size in gradients.items() if not math.isfinite(size)]
    finite = {name: size for name, size in gradients.items() if math.isfinite(size)}
    what = f"what: {what_is_not_finite(seen, bool(broken))}"
    if broken:
        what += f"; gradients of {some(broken)}"
    if finite:
        largest = max(finite, key=lambda name: finite[name])
        what += f"; the largest finite gradient is {finite[largest]:.3g}, of {largest}"
    lines = [what + f"; the learning rate was {rate:.3g}"]
    lost = bad_losses(seen)
    asking = {name for name in recipe.objective if MENU[name].needs_teacher}
    if lost and lost <= asking and asking < recipe.objective.keys():
        lines.append(
            "try: only what the teacher is asked for is not finite; other files of it, or other bits"
        )
    if never:
        lines.append(
            "try: no step was taken before, so it is not the learning rate: look at these rows, and at what "
            "the student computes for them before training"
        )
    else:
        more = "" if options.clip else ", set `train.clip: 1.0`"
        lines.append(
            f"try: lower `train.learning_rate` (now {options.learning_rate:g}), raise `train.warmup` (now "
            f"{options.warmup}){more}, or take out these rows"
        )
    return lines


def what_is_not_finite(seen: Sequence[Seen], gradient: bool) -> str:
    """Such as "cross_entropy, forward_kl and the gradient are not finite"."""
    names = sorted(bad_losses(seen))
    if gradient:
        names = [*names[:-1], f"{names[-1]} and the gradient"] if names else ["the gradient"]
    several = len(names) > 1 or " and " in names[0]
    return f"{', '.join(names)} {'are' if several else 'is'} not finite"


def bad_losses(seen: Sequence[Seen]) -> set[str]:
    """The losses whose sum is not finite."""
    return {name for one in seen for name, part in one.parts.items() if not math.isfinite(float(part))}


def suspects(seen: Sequence[Seen]) -> list[Seen]:
    """Micro-batches whose losses are not finite; all, where it is the gradient alone."""
    return [one for one in seen if bad_losses([one])] or list(seen)


def sizes_of_layers(gradients: Any, weight: mx.array) -> dict[str, float]:
    """Norm of the mean gradient of each layer, and of each module outside of them.

    Args:
        gradients: sums over labels of this weight.
    """
    squares: dict[str, mx.array] = {}
    arrays: Any = tree_flatten(gradients)
    for path, array in arrays:
        layer = re.search(r"(?:^|\.)(layers\.\d+)\.", path)
        name = layer[1] if layer else path.rpartition(".")[0].removeprefix("model.") or path
        square = mx.square(array.astype(mx.float32) / weight.astype(mx.float32)).sum(-1).sum()
        squares[name] = squares.get(name, mx.array(0.0)) + square
    return {name: float(mx.sqrt(square)) for name, square in squares.items()}


def not_finite(tree: Any) -> list[str]:
    """Paths of the arrays of a tree that hold a number which is not finite."""
    arrays: Any = tree_flatten(tree)
    good = [mx.isfinite(array).all() for _, array in arrays]
    mx.eval(good)  # all at once
    return [path for (path, _), fine in zip(arrays, good, strict=True) if not bool(fine)]


def some(names: Sequence[str]) -> str:
    """The first three of them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
