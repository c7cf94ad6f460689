"""A model that keeps sums of what its modules read and give, while it runs.

Each module that is watched becomes a subclass of its own class for a time, as in `models/taps.py`: paths of
parameters and modules stay as they are, and no architecture needs to know of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

Key = tuple[str, Any]  # what is summed, and of which module or layer


class Tally:
    """Sums over batches: lazy float32 arrays within one, NumPy float64 from one to the next."""

    def __init__(self) -> None:
        self.batch: dict[Key, mx.array] = {}
        self.sums: dict[Key, np.ndarray] = {}
        self.paused = False

    def add(self, key: Key, value: mx.array) -> None:
        if self.paused:
            return
        self.batch[key] = self.batch[key] + value if key in self.batch else value

    def settle(self) -> None:
        """Compute the sums of the batch, and nothing that they do not need."""
        mx.eval(list(self.batch.values()))
        for key, value in self.batch.items():
            self.sums[key] = self.sums.get(key, 0) + np.array(value).astype(np.float64)
        self.batch.clear()


class _Between:
    """What a module of experts and the block that weighs their outputs tell each other."""

    indices: mx.array | None = None  # (..., k), of the experts of each token
    output: mx.array | None = None  # (..., k, D), of these
    probe: mx.array | None = None  # given in place of the output


@contextmanager
def recording(model: Any) -> Iterator[Tally]:
    """Watch a model; each call of it inside adds to the tally. Afterwards it is as it was, whatever happened.

    Keys of the sums, where a vector is one of what a module reads, wherever it stands in a batch:
        ("squares", path): (in,) of each channel that a Linear, a norm, or an embedding that makes logits
        reads; (E, in) for a layer of experts. ("vectors", path): how many, () or (E,).
        ("turns", layer), ("turned", layer): 1 - cosine of what a layer reads and gives, and of how many.
        ("tokens", path), ("routed", path), ("weights", path), ("norms", path): of a module of experts the
        tokens it read, and for each expert, (E,), how many of them, their routing weights added up, and
        the same times the L2 norms of its outputs.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

    tally, plain = Tally(), list[tuple[nn.Module, type]]()
    modules = dict(model.named_modules())

    def become(module: nn.Module, made: type) -> None:
        plain.append((module, type(module)))
        module.__class__ = made

    try:
        for path, module in modules.items():
            if isinstance(module, SwitchGLU | SwitchMLP):
                between, block = _Between(), modules[path.rpartition(".")[0]]
                count = next(
                    m.num_experts
                    for m in module.children().values()
                    if isinstance(m, SwitchLinear | QuantizedSwitchLinear)
                )
                become(module, _answering(type(module), between))
                become(block, _routing(type(block), path, count, between, tally))
            elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
                become(module, _by_expert(type(module), path, tally))
            elif isinstance(module, nn.Linear | nn.QuantizedLinear) or _is_norm(module):
                become(module, _reading(type(module), path, tally, "__call__"))
            elif isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
                become(module, _reading(type(module), path, tally, "as_linear"))
        for number, layer in enumerate(model.layers):
            become(layer, _turning(type(layer), number, tally))
        yield tally
    finally:
        for module, module_class in reversed(plain):
            module.__class__ = module_class


def _subclass(module_class: type, method: str, function: Any) -> type:
    return type(f"Watched{module_class.__name__}", (module_class,), {method: function})


def _reading(module_class: Any, path: str, tally: Tally, method: str) -> type:
    plain = getattr(module_class, method)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        read = _first(args, kwargs).astype(mx.float32)
        read = read.reshape(-1, read.shape[-1])
        tally.add(("squares", path), mx.square(read).sum(0))
        tally.add(("vectors", path), mx.array(float(read.shape[0])))
        return plain(self, *args, **kwargs)

    return _subclass(module_class, method, call)


def _by_expert(module_class: Any, path: str, tally: Tally) -> type:
    def call(self: Any, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        # x is (..., 1, in). A token has a row of it for each of its experts, or one for all of them.
        lead = np.broadcast_shapes(indices.shape, x.shape[:-2])
        read = mx.broadcast_to(x.squeeze(-2), (*lead, x.shape[-1])).flatten(0, -2)
        chosen, zeros = mx.broadcast_to(indices, lead).flatten(), mx.zeros((self.num_experts, x.shape[-1]))
        tally.add(("squares", path), zeros.at[chosen].add(mx.square(read.astype(mx.float32))))
        tally.add(("vectors", path), zeros[:, 0].at[chosen].add(1.0))
        return module_class.__call__(self, x, indices, *args, **kwargs)

    return _subclass(module_class, "__call__", call)


def _turning(layer_class: Any, number: int, tally: Tally) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = layer_class.__call__(self, *args, **kwargs)
        before, after = _first(args, kwargs), output[0] if isinstance(output, tuple) else output
        if isinstance(after, mx.array) and before.shape == after.shape:
            before, after = before.astype(mx.float32), after.astype(mx.float32)
            lengths = mx.linalg.norm(before, axis=-1) * mx.linalg.norm(after, axis=-1)
            turns = 1 - (before * after).sum(-1) / mx.maximum(lengths, 1e-30)
            tally.add(("turns", number), turns.sum(-1).sum())
            tally.add(("turned", number), mx.array(float(turns.size)))
        return output

    return _subclass(layer_class, "__call__", call)


def _answering(module_class: Any, between: _Between) -> type:
    def call(self: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if between.probe is not None:
            return between.probe
        output = module_class.__call__(self, x, indices, *args, **kwargs)
        between.indices, between.output = indices, output
        return output

    return _subclass(module_class, "__call__", call)


def _routing(block_class: Any, path: str, count: int, between: _Between, tally: Tally) -> type:
    """A block of experts that tells its routing weights, however its router makes them.

    It gives `sum_j w_j y_j + rest`, linear in the outputs y of the experts of a token. So it runs again with
    unit vectors in their place, and with zeros: the difference is w.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = block_class.__call__(self, *args, **kwargs)
        indices, y = between.indices, between.output
        between.indices = between.output = None
        if indices is None or y is None:
            return output
        k = indices.shape[-1]

        def answered(probe: mx.array) -> mx.array:
            between.probe = mx.broadcast_to(probe, y.shape)
            return block_class.__call__(self, *args, **kwargs)[..., :k].astype(mx.float32)

        tally.paused = True
        try:
            weights = answered(mx.eye(k, y.shape[-1])) - answered(mx.zeros((k, y.shape[-1])))
        finally:
            between.probe, tally.paused = None, False
        zeros, chosen, weights = mx.zeros(count), indices.flatten(), weights.flatten()
        norms = mx.linalg.norm(y.astype(mx.float32), axis=-1).flatten()
        tally.add(("tokens", path), mx.array(float(chosen.size // k)))
        tally.add(("routed", path), zeros.at[chosen].add(1.0))
        tally.add(("weights", path), zeros.at[chosen].add(weights))
        tally.add(("norms", path), zeros.at[chosen].add(mx.abs(weights) * norms))
        return output

    return _subclass(block_class, "__call__", call)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
    return args[0] if args else next(iter(kwargs.values()))


def _is_norm(module: nn.Module) -> bool:
    """nn.RMSNorm, nn.LayerNorm, and what a model has in place of them: Gemma's, or gated ones."""
    return "Norm" in type(module).__name__ and not module.children()
