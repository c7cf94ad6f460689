"""A model that several processes hold in parts, as mlx-lm divides it, and that all of them run together.

Rank 0 uses it as if it were whole, wherever it asks: for targets, answers, scores. What it is about to run is
told to the others first, and they run the same. So that no two of them wait for each other in another order,
a call without a cache is evaluated at once, and with caches the model writes whole answers (`generate.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.errors import ModelError

Tell = Callable[[str, dict[str, Any], bytes, Callable[[], Any]], Any]
"""Has the others do a task, told in plain values and bytes, while this rank does its own, and gives that."""


@dataclass
class Together:
    """What belongs to a model that is held in parts."""

    group: mx.distributed.Group
    whole: nn.Module  # the same before it was divided, whose arrays were never read
    tell: Tell | None = None  # of rank 0; None: this rank does as it is told
    writing: bool = False  # all ranks write answers: its calls are told no more


def hold(model: Any, whole: nn.Module, group: mx.distributed.Group, tell: Tell | None = None) -> None:
    """Read a part that `divide` left.

    Args:
        whole: the same model, loaded once more, of which nothing is read; it knows how large the model is.
        tell: of rank 0.
    """
    mx.eval(model.parameters())
    model.together = Together(group, whole, tell)
    if tell is not None:
        _lead(model.model, model.together, tell)


def divide(model: Any, how: Literal["tensor", "pipeline"], group: mx.distributed.Group, place: str) -> None:
    """Keep this rank's part of a model whose arrays are not read yet, and still read nothing.

    Args:
        how: tensor: a part of every layer; pipeline: some of the layers.
        place: names the model in messages.

    Raises:
        ModelError: mlx-lm does not divide such a model, or not by so many.
    """
    trunk = getattr(model, "model", None)
    ways = {"tensor": getattr(model, "shard", None), "pipeline": getattr(trunk, "pipeline", None)}
    way = ways[how] if isinstance(trunk, nn.Module) else None
    if way is None:
        name = type(model).__module__.rpartition(".")[2]
        others = [other for other, found in ways.items() if found is not None and trunk is not None]
        advice = f"use {others[0]}" if others else "leave `parallel` out"
        raise ModelError(f"{place}: a {name} cannot be divided by {how}; {advice}")
    try:
        way(group)
        model(mx.zeros((1, 2), dtype=mx.int32))  # shapes alone: nothing is computed
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{place}: mlx-lm cannot divide it by {how} among {group.size()} processes ({reason}); "
            "start another number of them, or leave `parallel` out"
        ) from None


def together_of(model: Any) -> Together | None:
    """What belongs to a model that is held in parts; None for one that is whole."""
    return getattr(model, "together", None)


def read(model: Any, content: bytes, shape: list[int]) -> None:
    """Another rank than 0 runs its part of a call."""
    mx.eval(model.model(mx.array(np.frombuffer(content, dtype=np.int32).reshape(shape))))


@contextmanager
def writing(together: Together) -> Iterator[None]:
    """While all ranks write the same answers."""
    together.writing = True
    try:
        yield
    finally:
        together.writing = False


def of_first(tokens: mx.array, together: Together) -> mx.array:
    """Rank 0's tokens on every rank: one that rounds differently might have drawn another."""
    # Times 0, as what does not depend on the model could be sent before what its layers send.
    mine = tokens if together.group.rank() == 0 else tokens * 0
    return mx.distributed.all_sum(mine, group=together.group)


def _lead(trunk: Any, together: Together, tell: Tell) -> None:
    """Let one instance, not its class, tell the others of each call."""
    plain = type(trunk)

    def led(self: Any, inputs: mx.array, cache: Any = None, *more: Any, **named: Any) -> Any:
        if together.writing:
            return plain.__call__(self, inputs, cache, *more, **named)
        assert cache is None  # the others would lack it
        tokens = np.array(inputs, dtype=np.int32)

        def mine() -> Any:
            states = plain.__call__(self, inputs, cache, *more, **named)
            mx.eval(states)
            return states

        return tell("read", {"shape": list(tokens.shape)}, tokens.tobytes(), mine)

    trunk.__class__ = type(plain.__name__, (plain,), {"__call__": led})
