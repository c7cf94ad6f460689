"""What a choice of places to keep amounts to, and whether it holds together."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_distill.errors import Fault
from mlx_distill.prune.axes import everything, sizes_of
from mlx_distill.prune.sizes import Kept, Sizes


def kept_sizes(config: Mapping[str, Any], kept: Kept) -> Sizes:
    """The sizes of the model that is left of one with this config.

    Raises:
        Fault: `kept` has places that are not there, out of order, of another number in each layer, or
            query heads without theirs of keys and values.
    """
    whole, old = everything(config), sizes_of(config)
    _rising("layers", np.array(kept.layers), old.layers)
    _rising("hidden", kept.hidden, old.hidden)
    _rising("vocabulary", kept.vocabulary, old.vocabulary)
    for axis in ("feed_forward", "heads", "kv_heads", "experts"):
        for_layers, of = getattr(kept, axis), getattr(whole, axis)
        if len(for_layers) != len(kept.layers):
            raise Fault(f"{axis} kept in {len(for_layers)} layers, and {len(kept.layers)} layers stay")
        for places, layer in zip(for_layers, kept.layers, strict=True):
            for row in places if places.ndim == 2 else [places]:
                _rising(f"{axis} of layer {layer}", row, len(of[layer]))
    sparse = [len(whole.experts[layer]) > 0 for layer in kept.layers]
    for n, layer in enumerate(kept.layers):
        _check_heads(layer, kept.heads[n], kept.kv_heads[n], old.heads // old.kv_heads)
        width, experts = kept.feed_forward[n], kept.experts[n]
        if width.ndim == 2 and len(width) != len(experts):
            raise Fault(f"feed_forward of layer {layer}: {len(width)} rows for {len(experts)} experts")
        if old.experts and not sparse[n] and len(width) != len(whole.feed_forward[layer]):
            raise Fault(f"feed_forward of layer {layer}: a layer beside those with experts stays whole")
    with_experts = [n for n, has in enumerate(sparse) if has]
    counted = with_experts if old.experts else list(range(len(kept.layers)))
    return Sizes(
        layers=len(kept.layers),
        hidden=len(kept.hidden),
        feed_forward=_same(
            "feed_forward", [kept.feed_forward[n].shape[-1] for n in counted], old.feed_forward
        ),
        heads=_same("heads", [len(places) for places in kept.heads], old.heads),
        kv_heads=_same("kv_heads", [len(places) for places in kept.kv_heads], old.kv_heads),
        experts=_same("experts", [len(kept.experts[n]) for n in with_experts], old.experts),
        vocabulary=len(kept.vocabulary),
    )


def _rising(what: str, places: np.ndarray, there: int) -> None:
    shaped = places.ndim == 1 and not (np.diff(places) <= 0).any()
    if not shaped or (len(places) and (places[0] < 0 or places[-1] >= there)):
        raise Fault(f"{what}: places that stay must rise within 0 to {there - 1}; got {places}")


def _same(axis: str, counts: Sequence[int], otherwise: int) -> int:
    if len(set(counts)) > 1:
        raise Fault(f"{axis}: as many must stay in each layer, got {list(counts)}")
    return counts[0] if counts else otherwise


def _check_heads(layer: int, heads: np.ndarray, kv_heads: np.ndarray, group: int) -> None:
    """Query head h reads key and value head h // group; in the cut model that must hold again."""
    share = len(heads) // max(len(kv_heads), 1)
    if not np.array_equal(heads // group, np.repeat(kv_heads, share)):
        raise Fault(
            f"heads of layer {layer}: each of the key and value heads {kv_heads} needs equally many of its "
            f"{group} query heads; got {heads}"
        )
