"""Which layers, channels, heads and experts of a model stay when it is cut to given sizes."""

import numpy as np

from mlx_distill.keys import generator
from mlx_distill.models import Loaded
from mlx_distill.options import Prune
from mlx_distill.prune.axes import best_layers, check_sizes, everything, sizes_of
from mlx_distill.prune.importance import Statistics
from mlx_distill.prune.scores import Scores
from mlx_distill.prune.sizes import Kept, Sizes


def choose(
    loaded: Loaded,
    sizes: Sizes,
    options: Prune,
    statistics: Statistics,
    *,
    seed: int,
    changes: np.ndarray | None = None,
) -> Kept:
    """What stays: what counts most, by `options.layers_by` and `options.by`; all where no size changes.

    Inner channels of experts are chosen for each of them. Of key and value heads those stay whose query
    heads count most together, as many of these as will stay with each.

    Args:
        sizes: of what stays, but for the vocabulary, which stays as it is.
        seed: of all that is random.
        changes: of the loss without each layer, for `layers_by` loss.

    Raises:
        RecipeError: a model of this type cannot have these sizes, or not so many layers.
    """
    check_sizes(loaded.config, sizes, "student.prune")
    whole, old = everything(loaded.config), sizes_of(loaded.config)
    scores = Scores(loaded, options.by, statistics, seed)
    kept = Kept(whole.layers, whole.hidden, [], [], [], [], whole.vocabulary)
    if sizes.layers < old.layers:
        worth = _worth(sizes.layers, options, statistics, seed, changes)
        kept = kept._replace(layers=best_layers(loaded.config, worth.tolist(), sizes.layers))
    if sizes.hidden < old.hidden:
        kept = kept._replace(hidden=_most(scores.hidden(), sizes.hidden))
    for layer in kept.layers:
        heads, kv_heads = whole.heads[layer], whole.kv_heads[layer]
        if (sizes.heads, sizes.kv_heads) != (old.heads, old.kv_heads):
            heads, kv_heads = _heads(scores, layer, sizes, old)
        experts, width = whole.experts[layer], whole.feed_forward[layer]
        if len(experts) > sizes.experts:
            experts = _most(scores.experts(layer), sizes.experts)
        if sizes.feed_forward < old.feed_forward and (len(experts) or not old.experts):
            channels = scores.feed_forward(layer)
            width = _most(channels[experts] if len(experts) else channels, sizes.feed_forward)
        for places, chosen in (
            (kept.feed_forward, width),
            (kept.heads, heads),
            (kept.kv_heads, kv_heads),
            (kept.experts, experts),
        ):
            places.append(chosen)
    return kept


def _worth(
    count: int, options: Prune, statistics: Statistics, seed: int, changes: np.ndarray | None
) -> np.ndarray:
    """Of each layer, how much it is worth keeping; the first and the last stay if that says so, no sooner.

    - influence: what a layer turns (Men et al. 2024, arXiv 2403.03853, section 3.1).
    - loss: what the loss gains by it.
    - every_other: near to places that are evenly spaced from the first to the last layer, as DistilBERT's
      0, 2, 4, 7, 9, 11 of 12 (Sanh et al. 2019, arXiv 1910.01108, section 3); one place is the first.
    """
    layers = len(statistics.influence)
    if options.layers_by == "influence":
        return statistics.influence
    if options.layers_by == "random":
        return generator(seed, "layers that stay").random(layers)
    if options.layers_by == "loss":
        if changes is None:
            raise ValueError("layers by `loss` need `changes`, the loss without each of them")
        return changes
    steps = max(1, count - 1)
    even = (2 * np.arange(count) * (layers - 1) + steps) // (2 * steps)  # rounded to the nearest
    return -np.abs(np.arange(layers)[:, None] - even).min(-1).astype(np.float64)


def _heads(scores: Scores, layer: int, sizes: Sizes, old: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Query heads, and key and value heads, that stay in a layer: groups first, then equally many of each."""
    group, share = old.heads // old.kv_heads, sizes.heads // sizes.kv_heads
    each = scores.heads(layer).reshape(old.kv_heads, group)
    best = _most(each, share)
    together = np.take_along_axis(each, best, -1).sum(-1) + scores.heads(layer, "kv_heads")
    kv_heads = _most(together, sizes.kv_heads)
    return (best + group * np.arange(old.kv_heads)[:, None])[kv_heads].reshape(-1), kv_heads


def _most(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest of the last axis, in rising order; of equals the first."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)
