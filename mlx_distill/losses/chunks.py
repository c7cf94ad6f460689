"""A loss on logits, and its gradient, a chunk of positions at a time: the memory of one chunk, not of all.

Logits over 150,000 tokens are too big to keep for a whole batch. Here each chunk's loss and gradients
are formed together in the forward pass, so nothing has to be kept or computed again for the backward
pass, which only scales them; and each chunk waits for the one before it, or MLX would start them all.
The gradient of the projection, as big as the projection itself, is added up in place.
"""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

# MLX allocates for about 100 operations before it runs them. As many that do nothing stand between chunks,
# or on a CPU the arrays of the next chunk would be there beside those of this one.
AHEAD = 120
STEPS = AHEAD + 48  # operations in a row that a chunk may take; more than any loss has
Arrays = dict[str, mx.array]
Function = Callable[[Arrays, Arrays, Arrays], tuple[mx.array, Arrays]]


class Projects(Protocol):
    """The last projection of a model; `models.head.Head` is one."""

    def parameters(self, *, trainable: bool = False) -> Any: ...
    def logits(self, hidden: mx.array, parameters: Any = None) -> mx.array: ...
    def is_matrix(self) -> bool: ...
    def cut(self, logits: mx.array) -> mx.array: ...


def chunked_sum(
    function: Function,
    head: Projects,
    hidden: Arrays,
    fixed: Arrays,
    chunk: int,
    beside: Arrays | None = None,
) -> tuple[mx.array, Arrays]:
    """Sum a loss on logits over all positions, differentiable by the head's weights and what it reads.

    Args:
        function: (logits (1, C, V) of each of `hidden`, `fixed` and `beside` cut alike) -> (the sum over
            the C positions, a scalar; parts for the log, scalars).
        hidden: name -> (1, N, D) that the head projects.
        fixed: name -> (1, N, ...), which get no gradient.
        beside: name -> (1, N, ...) floats that get a gradient, and are not projected.
        chunk: positions at a time.

    Returns:
        the sum over all N, and that of each part; the parts carry no gradient. The sum may only be added
        to others: multiplied by anything, its gradient by `hidden` is NaN (or, where that is free, right).
    """
    weights: Any = tree_flatten(head.parameters(trainable=True))
    beside = beside or {}
    keys, names = list(hidden), list[str]()
    held = {name: mx.stop_gradient(array) for name, array in fixed.items()}
    positions = next(iter(hidden.values())).shape[1]
    # With one matrix and nothing behind it, its gradient can be added up by the product itself.
    in_place = head.is_matrix() and len(weights) == 1 and weights[0][1].dtype == mx.float32

    def project(flat: list[mx.array], rows: list[mx.array]) -> list[mx.array]:
        tree = (
            tree_unflatten([(name, a) for (name, _), a in zip(weights, flat, strict=True)]) if flat else None
        )
        return [head.logits(row, tree) for row in rows]

    def loss(logits: list[mx.array], more: Arrays, cut: Arrays) -> tuple[mx.array, list[mx.array]]:
        if in_place:
            logits = [head.cut(one) for one in logits]
        total, parts = function(dict(zip(keys, logits, strict=True)), cut, more)
        names[:] = list(parts)
        return total, list(parts.values())

    loss_and_slope = mx.value_and_grad(loss, argnums=(0, 1))

    def forward(*arrays: mx.array) -> list[mx.array]:
        flat, rows = list(arrays[: len(weights)]), list(arrays[len(weights) :])
        sums: list[mx.array] = []  # the total, then the parts
        by_weight: list[mx.array] = []
        pieces: list[list[mx.array]] = []
        for start in range(0, positions, chunk):
            both = [row[:, start : start + chunk] for row in rows]
            cut = {name: array[:, start : start + chunk] for name, array in held.items()}
            if pieces:
                done = _later(mx.depends(sums[:1], [*sums, *pieces[-1]])[0], AHEAD)
                waiting = mx.depends([*both, *cut.values()], [done])
                both, cut = waiting[: len(both)], dict(zip(cut, waiting[len(both) :], strict=True))
            here, more = both[: len(keys)], dict(zip(beside, both[len(keys) :], strict=True))
            if in_place:
                [matrix] = flat
                logits = [row @ matrix.T for row in here]
                (total, parts), (slopes, by_more) = loss_and_slope(logits, more, cut)
                back = [slope @ matrix for slope in slopes]
                for slope, row in zip(slopes, here, strict=True):
                    by_weight = [_added(by_weight, slope[0].T, row[0])]
            else:
                logits = project(flat, here)
                (total, parts), (slopes, by_more) = loss_and_slope(logits, more, cut)
                _, gradients = mx.vjp(
                    lambda *a: project(list(a[: len(flat)]), list(a[len(flat) :])), [*flat, *here], slopes
                )
                # In float32: a sum in bfloat16 would lose what later chunks add.
                new = [gradient.astype(mx.float32) for gradient in gradients[: len(flat)]]
                by_weight = [a + b for a, b in zip(by_weight, new, strict=True)] if by_weight else new
                back = gradients[len(flat) :]
            pieces.append([*back, *by_more.values()])
            sums = [a + b for a, b in zip(sums, [total, *parts], strict=True)] if sums else [total, *parts]
        whole = [mx.concatenate(list(piece), axis=1) for piece in zip(*pieces, strict=True)]
        return [*sums, *by_weight, *whole]

    summing = mx.custom_function(forward)

    def scaled(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        gradients = outputs[1 + len(names) :]
        if in_place:  # scaling would take a second copy of the matrix, so there must be nothing to scale
            one = mx.where(cotangents[0] == 1, 1.0, mx.nan)
            return [gradients[0], *(one * g for g in gradients[1:])]
        return [
            (cotangents[0] * gradient).astype(primal.dtype)
            for primal, gradient in zip(primals, gradients, strict=True)
        ]

    summing.vjp(scaled)
    outputs: Any = summing(*(array for _, array in weights), *hidden.values(), *beside.values())
    parts = [mx.stop_gradient(part) for part in outputs[1 : 1 + len(names)]]
    return outputs[0], dict(zip(names, parts, strict=True))


def _added(by_weight: list[mx.array], left: mx.array, right: mx.array) -> mx.array:
    """left @ right, added to what is there without a copy of it.

    The product can add in place only if nothing else reads the sum, so no later chunk may be told to wait
    for it. MLX runs what is fewest steps away from the result last, and the sums would be: all chunks'
    slopes would be kept for them. The steps that do nothing keep them in line with the chunks.
    """
    if not by_weight:
        return left @ right
    return mx.addmm(_later(by_weight[0], STEPS), left, right)


def _later(x: mx.array, steps: int) -> mx.array:
    """The same array, after operations that do nothing, and that `mx.compile` does not take out."""
    for _ in range(steps):
        [x] = mx.depends([x], [x])
    return x
