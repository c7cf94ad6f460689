"""Mixed precision: more bits where a layer harms more, at the size of one width for all.

What a layer harms at a width is measured: KL(p || q) of the model with every weight as it was, p, and the
model with this one layer rounded, q. Of small changes in several layers the KLs add up, nearly; so the
allocation is the one whose sum is least among all that fit, found exactly, as a knapsack with one choice a
layer. Whether it is better than one width is then measured too, with all layers rounded at once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.data.batch import Encoded, in_order, make_batch
from mlx_distill.errors import RecipeError
from mlx_distill.losses.targets import log_softmax
from mlx_distill.models import Loaded
from mlx_distill.options import Quantize
from mlx_distill.progress import Progress, silent
from mlx_distill.quantize.checks import grid_of
from mlx_distill.quantize.levels import Level
from mlx_distill.quantize.rounding import layer_grids, plain_layers, stored_bytes

Harms = Mapping[str, Mapping[int, float]]  # module path -> bits -> KL in nats a counted token
WIDTHS = (2, 3, 4, 5, 6, 8)
LOGITS = 2**25  # numbers of the logits of a batch; a few copies of them are held
UNITS = 2**16  # of the budget, in which layers are weighed


def allocated(
    loaded: Loaded,
    level: Level,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    harms: Harms | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Bits of each layer, from `level.options.mixed`, at the size of `level.grid.bits` for all, or of `gib`.

    Args:
        rows: to measure on, as they are learned; never those of the test.
        vocabulary: real size of the tokenizer.
        harms: what `layer_harms` found for this model and these options; None: it is measured here.

    Returns:
        bits by module path: those of one width for all layers where mixed is not better. And what was
        measured: kl_mixed, kl_uniform and kl_expected (the sum over layers) in nats a counted token, which
        of both was kept, bits_uniform, and the bytes of all weights and of the budget.

    Raises:
        RecipeError: `gib` is less than the narrowest width takes.
    """
    options = level.options
    if harms is None:
        harms = layer_harms(loaded, options, rows, vocabulary, progress=progress)
    sizes = layer_bytes(loaded.model, options)
    rest = other_bytes(loaded.model, options)
    widths = sorted(options.mixed)
    if options.gib is None:
        uniform = level.grid.bits
        budget = sum(size[uniform] for size in sizes.values())
    else:
        budget = math.floor(options.gib * 2**30) - rest
        fitting = [b for b in WIDTHS if sum(size[b] for size in sizes.values()) <= budget]
        if sum(size[widths[0]] for size in sizes.values()) > budget:
            least = (rest + sum(size[widths[0]] for size in sizes.values())) / 2**30
            raise RecipeError(
                f"`quantize.gib` {options.gib:g}: at {widths[0]} bits, the fewest of `mixed`, the weights "
                f"take {least:.4g} GiB; raise it, or add a narrower width"
            )
        uniform = max(fitting)
    chosen = least_harm(
        [[harms[path][b] for b in widths] for path in sizes],
        [[sizes[path][b] for b in widths] for path in sizes],
        budget,
    )
    mixed = {path: widths[place] for path, place in zip(sizes, chosen, strict=True)}
    plain = dict.fromkeys(sizes, uniform)
    kl_mixed, kl_uniform = whole_harms(loaded, options, [mixed, plain], rows, vocabulary, progress=progress)
    kept = mixed if kl_mixed < kl_uniform else plain
    return kept, {
        "kept": "mixed" if kept is mixed else "uniform",
        "kl_mixed": kl_mixed,
        "kl_uniform": kl_uniform,
        "kl_expected": sum(harms[path][width] for path, width in mixed.items()),
        "bits_uniform": uniform,
        "bytes": rest + sum(sizes[path][width] for path, width in kept.items()),
        "budget": rest + budget,
    }


def layer_harms(
    loaded: Loaded,
    options: Quantize,
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    progress: Progress = silent,
) -> dict[str, dict[int, float]]:
    """What each layer harms alone at each width of `options.mixed`, by module path and bits.

    It takes a pass over the rows for each of both, and the memory of one more layer and of one batch.
    """
    layers = plain_layers(loaded.model)
    trials = [{path: bits} for path in layers for bits in sorted(options.mixed)]
    found = _harms(loaded, options, trials, rows, vocabulary, "harm of each layer", progress)
    harms: dict[str, dict[int, float]] = {path: {} for path in layers}
    for trial, harm in zip(trials, found, strict=True):
        for path, bits in trial.items():
            harms[path][bits] = harm
    return harms


def whole_harms(
    loaded: Loaded,
    options: Quantize,
    allocations: Sequence[Mapping[str, int]],
    rows: Sequence[Encoded],
    vocabulary: int,
    *,
    progress: Progress = silent,
) -> list[float]:
    """KL in nats a counted token under each allocation, all its layers rounded at once."""
    return _harms(loaded, options, allocations, rows, vocabulary, "harm of all layers", progress)


def layer_bytes(model: nn.Module, options: Quantize) -> dict[str, dict[int, int]]:
    """Bytes of each layer that may have a width of its own, by bits, with its scales and biases."""
    grid = {"group_size": options.group_size, "mode": options.mode}
    return {
        path: {
            bits: stored_bytes(module.weight.size, {**grid, "bits": bits}, _each(module.weight, options))
            for bits in WIDTHS
        }
        for path, module in plain_layers(model).items()
    }


def other_bytes(model: nn.Module, options: Quantize) -> int:
    """Bytes of everything else once the model is in few bits: norms, and what has a grid of its own."""
    plain, grids = plain_layers(model), layer_grids(model, grid_of(options))
    keeps = getattr(model, "cast_predicate", None) or (lambda path: True)
    total = 0
    parameters: Any = tree_flatten(model.parameters())
    for path, value in parameters:
        layer = path.removesuffix(".weight") if path.endswith(".weight") else ""
        each = _each(value, options) if keeps(path) else value.dtype.size
        if layer in grids:
            total += 0 if layer in plain else stored_bytes(value.size, grids[layer], each)
        else:
            total += value.size * each
    return total


def least_harm(harms: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice for each layer that makes the sum of `harms` least, with a sum of `sizes` within the budget.

    Dynamic programming over the budget, one layer after the other. Exact where the sizes are multiples of a
    unit that goes into the budget at most `UNITS` times, as those of one model's matrices mostly are; else
    they are rounded up to one, and the budget is kept all the same.

    Args:
        harms, sizes: (layers, choices). The smallest choices together are within the budget.
    """
    least = [min(row) for row in sizes]
    room = budget - sum(least)
    more = [[size - low for size in row] for row, low in zip(sizes, least, strict=True)]
    step = max(1, math.gcd(*(size for row in more for size in row)))
    step *= max(1, -(-room // (step * UNITS)))
    units = room // step
    more = [[-(-size // step) for size in row] for row in more]
    best, choices = np.zeros(units + 1), list[np.ndarray]()  # best[u]: least sum of harms within u units
    for harm, extra in zip(harms, more, strict=True):
        tried = np.full((len(harm), units + 1), np.inf)
        for place, (value, taken) in enumerate(zip(harm, extra, strict=True)):
            if taken <= units:
                tried[place, taken:] = best[: units + 1 - taken] + value
        choices.append(tried.argmin(0).astype(np.uint8))
        best = tried.min(0)
    chosen, left = list[int](), units
    for choice, extra in zip(reversed(choices), reversed(more), strict=True):
        place = int(choice[left])
        left -= extra[place]
        chosen.append(place)
    return chosen[::-1]


class _Trial(NamedTuple):
    """A layer with the weights it had."""

    module: Any
    weight: mx.array


def _harms(
    loaded: Loaded,
    options: Quantize,
    trials: Sequence[Mapping[str, int]],
    rows: Sequence[Encoded],
    vocabulary: int,
    title: str,
    progress: Progress,
) -> list[float]:
    """KL in nats a counted token of the model under each trial, which are bits by module path."""
    model, layers = loaded.model, plain_layers(loaded.model)
    model.eval()
    sums, tokens = np.zeros(len(trials)), 0
    plan = in_order(rows, min(4096, LOGITS // vocabulary))
    with progress(title, len(plan) * len(trials), "passes") as advance:
        for indices in plan:
            batch = make_batch([rows[i] for i in indices])
            places = mx.array(np.flatnonzero(np.array(batch.counted)).astype(np.int32))

            def log_probabilities(read: mx.array = batch.tokens, at: mx.array = places) -> mx.array:
                return log_softmax(model(read)[..., :vocabulary].reshape(-1, vocabulary)[at])

            log_p = log_probabilities()
            p = mx.exp(log_p)
            mx.eval(log_p, p)
            for number, trial in enumerate(trials):
                changed = [_Trial(layers[path], layers[path].weight) for path in trial]
                try:
                    for (module, weight), bits in zip(changed, trial.values(), strict=True):
                        module.weight = _rounded(weight, bits, options)
                    divergence = (p * (log_p - log_probabilities())).sum(-1)
                    sums[number] += np.array(divergence).astype(np.float64).sum()
                finally:
                    for module, weight in changed:
                        module.weight = weight
                advance()
            tokens += places.size
    return (sums / tokens).tolist()


def _rounded(weight: mx.array, bits: int, options: Quantize) -> mx.array:
    """The values that a matrix has in few bits, in its own type."""
    size = options.group_size
    stored, scales, biases = mx.quantize(weight.astype(_type_of(weight, options)), size, bits)
    return mx.dequantize(stored, scales, biases, size, bits).astype(weight.dtype)


def _each(value: mx.array, options: Quantize) -> int:
    """Bytes of a number beside the rounded ones."""
    return _type_of(value, options).size


def _type_of(value: mx.array, options: Quantize) -> mx.Dtype:
    if options.dtype is None or not mx.issubdtype(value.dtype, mx.floating):
        return value.dtype
    return getattr(mx, options.dtype)
