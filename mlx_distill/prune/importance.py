"""What each channel, head, expert and layer does on real rows, in one pass and the memory of one batch.

A batch holds rows of one length, and so no padding that could count, whatever the shape that a module reads.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.data.batch import Encoded
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.keys import generator
from mlx_distill.models import Loaded
from mlx_distill.progress import Progress, silent
from mlx_distill.prune.recorders import Tally, recording

BATCH_TOKENS = 4096  # read at once; a longer row is a batch of its own


class Statistics(NamedTuple):
    """What a model did with the tokens it read; float64."""

    tokens: int  # that were read
    influence: np.ndarray  # (L,) 1 - mean cosine of what a layer reads and gives
    inputs: dict[str, np.ndarray]  # path of a module -> mean square of each channel it reads
    routed: list[np.ndarray]  # of each layer, (E,): share of the tokens routed to each expert
    expert_norms: list[np.ndarray]  # of each layer, (E,): mean of routing weight times norm of the output
    routing_weights: list[np.ndarray]  # of each layer, (E,): mean routing weight


def measure(
    loaded: Loaded, rows: Sequence[Encoded], tokens: int, *, seed: int = 0, progress: Progress = silent
) -> Statistics:
    """Read rows, drawn in an order of `seed`, until `tokens` tokens were read or all rows were.

    Returns:
        influence: block influence (Men et al. 2024, arXiv 2403.03853, equation 1); nan for a layer that the
        model does not call as one. inputs: (in,) for each Linear and norm that was called, quantized or not,
        and each embedding that made logits, over all vectors that it read, such as those of every head for
        a norm of heads; (E, in) for a layer of experts, over the tokens routed to each, 0 where there are
        none. The rest is empty arrays for a layer without experts, and of the first block of experts of a
        layer; means over all tokens, 0 counting for an expert that was not chosen. REAP (Lasby et al. 2025,
        arXiv 2510.13999) is `expert_norms / routed`.
    """
    model: Any = loaded.model
    paths = {id(module): path for path, module in model.named_modules()}
    chosen = _drawn(rows, tokens, seed)
    total = sum(len(row.tokens) - 1 for row in chosen)
    with _evaluating(model), recording(model) as tally, progress("importance", total, "tokens") as advance:
        for batch in _batches(chosen):
            model(mx.array(batch))
            tally.settle()
            advance(len(batch) * len(batch[0]))
    sums, layers = tally.sums, [paths[id(layer)] for layer in model.layers]
    inputs = {
        path: _mean(value, sums["vectors", path]) for (kind, path), value in sums.items() if kind == "squares"
    }
    influence = [
        float(sums.get(("turns", i), np.nan) / sums.get(("turned", i), 1)) for i in range(len(layers))
    ]
    experts = {
        kind: [_of_layer(tally, kind, path) for path in layers] for kind in ("routed", "norms", "weights")
    }
    return Statistics(
        total, np.array(influence), inputs, experts["routed"], experts["norms"], experts["weights"]
    )


def loss_changes(
    loaded: Loaded,
    rows: Sequence[Encoded],
    tokens: int,
    vocabulary: int,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> np.ndarray:
    """How much worse the model predicts counted labels without one of its layers, on the rows of `measure`.

    Args:
        vocabulary: real size of the tokenizer.

    Returns:
        (L,) float64, nats a counted label: the loss without a layer, minus the loss with all of them.
    """
    model: Any = loaded.model
    chosen, losses = _drawn(rows, tokens, seed), list[float]()
    with _evaluating(model), progress("layers", len(model.layers) + 1, "losses") as advance:
        for layer in (None, *model.layers):
            with _skipping(layer):
                losses.append(fidelity(model, chosen, vocabulary)[0]["nll"])
            advance(1)
    return np.array(losses[1:]) - losses[0]


def _drawn(rows: Sequence[Encoded], tokens: int, seed: int) -> list[Encoded]:
    """Whole rows, until the model reads as many tokens; it reads all of a row but its last."""
    chosen, read = list[Encoded](), 0
    for i in generator(seed, "rows to measure importance").permutation(len(rows)).tolist():
        if read >= tokens:
            break
        chosen.append(rows[i])
        read += len(rows[i].tokens) - 1
    return chosen


def _batches(rows: Sequence[Encoded]) -> Iterator[list[list[int]]]:
    """What the model reads at once: tokens of rows of one length."""
    by_length = defaultdict[int, list[list[int]]](list)
    for row in rows:
        by_length[len(row.tokens) - 1].append(row.tokens[:-1])
    for length, alike in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // length)
        yield from (alike[at : at + size] for at in range(0, len(alike), size))


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return total / np.maximum(count, 1)[..., None]


def _of_layer(tally: Tally, kind: str, layer: str) -> np.ndarray:
    for path in (path for (name, path) in tally.sums if name == kind and path.startswith(f"{layer}.")):
        return tally.sums[kind, path] / tally.sums["tokens", path]
    return np.zeros(0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = [(module, getattr(module, "_training", True)) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module._training = training


@contextmanager
def _skipping(layer: Any) -> Iterator[None]:
    """A layer that gives what it reads. It still runs, but what is not used is never computed."""
    if layer is None:
        yield
        return
    layer_class = type(layer)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        read = args[0] if args else next(iter(kwargs.values()))
        output = layer_class.__call__(self, *args, **kwargs)
        return (read, *output[1:]) if isinstance(output, tuple) else read

    layer.__class__ = type(f"Skipped{layer_class.__name__}", (layer_class,), {"__call__": call})
    try:
        yield
    finally:
        layer.__class__ = layer_class
