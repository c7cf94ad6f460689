"""The last projection of a model, apart from the rest: what lets a loss see logits in chunks.

An mlx-lm model ends in one call, of `lm_head` or of the embedding as a linear map, and what follows
it (a soft cap, a scale) works on each logit alone. Both are found by watching a call of the model:
while the projection is made to hand back its input, the model gives its last hidden state; while it
is made to hand back an array of ours, the model applies to it whatever follows the projection, and
nothing else is computed, because MLX is lazy. So no architecture is written down here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

NAMES = ("lm_head", "output", "embed_out", "head")  # of projections that are no embedding


class Head:
    """Splits `model` at its last projection.

    Where that cannot be done exactly, `whole` is true: then `hidden` gives all logits, `logits`
    hands them through, and memory is that of the naive way.

    Args:
        vocabulary: logits beyond it, which pad the matrix, are cut.
    """

    def __init__(self, model: nn.Module, vocabulary: int):
        self.model, self.vocabulary = model, vocabulary
        self._projection, self._method = _last_projection(model)
        self.whole = self._projection is None
        self._bare = False  # nothing follows the projection
        if not self.whole:
            self._check()

    def hidden(self, tokens: mx.array) -> mx.array:
        """What the projection reads, (B, T, D) in the model's own type; all logits if `whole`."""
        if self._projection is None:
            return self.model(tokens)[..., : self.vocabulary]
        read: list[mx.array] = []
        with _replaced(self._projection, self._method, lambda x: read.append(x) or x):
            self.model(tokens)
        last = read[-1]
        read.clear()  # the class made by `_replaced` is a circle, and would hold the array until Python looks
        return last

    @property
    def state(self) -> Any:
        """The containers that `logits` reads its arrays from, for `mx.compile`; {} if `whole`."""
        return {} if self._projection is None else self._projection.state

    def parameters(self, *, trainable: bool = False) -> Any:
        """The tree of the projection's weights, or of those that move; {} if `whole`."""
        if self._projection is None:
            return {}
        return self._projection.trainable_parameters() if trainable else self._projection.parameters()

    def logits(self, hidden: mx.array, parameters: Any = None) -> mx.array:
        """Logits (..., V) in the model's own type.

        Args:
            parameters: weights in place of the projection's own, so that they can be differentiated.
        """
        if self._projection is None:
            return hidden
        if not parameters:
            return self.cut(self._finish(getattr(self._projection, self._method)(hidden)))
        own = self._projection.parameters()
        self._projection.update(parameters)
        try:
            projected = getattr(self._projection, self._method)(hidden)
        finally:
            self._projection.update(own)
        return self.cut(self._finish(projected))

    def cut(self, logits: mx.array) -> mx.array:
        """Logits without those that pad the matrix."""
        return logits[..., : self.vocabulary]

    def is_matrix(self) -> bool:
        """Whether logits are the product with one matrix (V, D), padding included, and nothing else."""
        plain = type(self._projection) in (nn.Linear, nn.Embedding)
        return plain and self._bare and list(self.parameters()) == ["weight"]

    def _finish(self, projected: mx.array) -> mx.array:
        """What the model does to its logits behind the projection."""
        if self._bare:
            return projected
        assert self._projection is not None
        with _replaced(self._projection, self._method, lambda x: projected):
            return self.model(mx.zeros((1, 1), dtype=mx.int32))

    def _check(self) -> None:
        """Compare with the model itself; split nothing where the numbers differ."""
        tokens = mx.array([[0, 1, 2, 1]], dtype=mx.int32)
        expected = self.model(tokens)[..., : self.vocabulary]
        try:
            hidden = self.hidden(tokens)
            probe = mx.zeros((1, 1, 1))
            self._bare = self._finish(probe) is probe
            found = self.logits(hidden)
            same = found.shape == expected.shape and mx.allclose(
                found.astype(mx.float32), expected.astype(mx.float32), rtol=1e-3, atol=1e-3
            )
        except ValueError:  # what follows the projection takes nothing of another width
            same = False
        if not same:
            self._projection, self.whole = None, True


def _last_projection(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The module that a call of the model uses last of all that could be its projection."""
    called: list[tuple[nn.Module, str]] = []

    def watch(module: nn.Module, method: str) -> Callable[[mx.array], mx.array]:
        plain = getattr(type(module), method)

        def noticed(x: mx.array) -> mx.array:
            projected = plain(module, x)
            called.append((module, method))  # behind what it calls itself: adapters come after their base
            return projected

        return noticed

    candidates: list[tuple[nn.Module, str]] = []
    for name, module in model.named_modules():
        if hasattr(module, "as_linear"):
            candidates.append((module, "as_linear"))
        elif name.rpartition(".")[2] in NAMES:
            candidates.append((module, "__call__"))
    unwatched = [(module, type(module)) for module, _ in candidates]
    try:
        for module, method in candidates:
            _replace(module, method, watch(module, method))
        model(mx.array([[0, 1]], dtype=mx.int32))
    finally:
        for module, plain in unwatched:
            module.__class__ = plain
    return called[-1] if called else (None, "")


@contextmanager
def _replaced(module: nn.Module, method: str, function: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Let one instance, not its class, answer `method` with `function`."""
    plain = type(module)
    _replace(module, method, function)
    try:
        yield
    finally:
        module.__class__ = plain


def _replace(module: nn.Module, method: str, function: Callable[[mx.array], mx.array]) -> None:
    plain = type(module)
    module.__class__ = type(plain.__name__, (plain,), {method: lambda _, x: function(x)})
