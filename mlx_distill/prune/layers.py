"""Which layers of a model may stay, where its config says more of a layer than that there is one.

Most types have layers of one kind, and any of them may go. Where a list in the config tells their kinds,
the list is cut along. Where the kind follows from a layer's number (in Gemma 3 every sixth attends to all
tokens, the others to a window), only those may stay whose kinds are regular again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.errors import RecipeError
from mlx_distill.prune.reading import key_of, read, sparse_layers, type_of
from mlx_distill.prune.types import ModelType

PER_LAYER = ("layer_types", "no_rope_layers")  # config keys with one entry a layer


def possible_layers(config: Mapping[str, Any], layers: Sequence[int]) -> bool:
    """Whether a model of this type can consist of these layers alone."""
    return layer_changes(config, layers) is not None


def best_layers(config: Mapping[str, Any], worth: Sequence[float], count: int) -> list[int]:
    """The `count` layers of largest summed worth that may stay, in rising order; of equals the first.

    Args:
        worth: of each layer, as large as you like to keep it.

    Raises:
        RecipeError: no such choice. Only where the type's layers were irregular to begin with.
    """
    kind, values = type_of(config), read(config)
    order = sorted(range(len(worth)), key=lambda layer: (-worth[layer], layer))
    best = sorted(order[:count])
    if kind.global_every:
        period = values[kind.global_every]
        kinds = [_is_nth(layer, period) for layer in range(len(worth))]
        # The period that the model has comes first, so that it stays where nothing is lost by it.
        periods = sorted(range(1, count + 1), key=lambda one: one != period)
        found = [_best_of_kinds(kinds, worth, [_is_nth(n, one) for n in range(count)]) for one in periods]
        sums = [(sum(worth[i] for i in layers), layers) for layers in found if layers is not None]
        best = max(sums, key=lambda one: one[0])[1] if sums else best
    elif not possible_layers(config, best):
        # All of them look through a window, and mlx-lm's models need a layer that sees everything.
        full = next(i for i in order if values["layer_types"][i] == "full_attention")
        best = sorted([*order[: count - 1], full])
    if not possible_layers(config, best):
        raise RecipeError(f"no {count} layers of this {config['model_type']} make a model of their own")
    return best


def check_layers(config: Mapping[str, Any], layers: Sequence[int], where: str) -> None:
    """Refuse layers that cannot stay without the others, naming the nearest that can.

    Raises:
        RecipeError: they are not in rising order, not there, or irregular in their kinds.
    """
    count = read(config)["num_hidden_layers"]
    inside = all(0 <= layer < count for layer in layers)
    if not layers or not inside or sorted(set(layers)) != list(layers):
        raise RecipeError(
            f"`{where}`: layers that stay must rise within 0 to {count - 1}; got {list(layers)}"
        )
    if not possible_layers(config, layers):
        near = best_layers(config, [float(layer in layers) for layer in range(count)], len(layers))
        raise RecipeError(
            f"`{where}`: layers {list(layers)} alone are no {config['model_type']}, whose config cannot say "
            f"which of them attend to all tokens; keep {near} or others in that pattern"
        )


def layer_changes(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any] | None:
    """What changes in the config when these layers stay, without their number; None where it cannot."""
    kind, values = type_of(config), read(config)
    if list(layers) == list(range(values["num_hidden_layers"])):
        return {}
    changes: dict[str, Any] = {}
    if kind.rope_every:  # the list that mlx-lm makes where there is none
        ropes = [int(not _is_nth(i, values[kind.rope_every])) for i in range(values["num_hidden_layers"])]
        values.setdefault("no_rope_layers", ropes)
    for key in PER_LAYER:
        if isinstance(values.get(key), list):
            changes[key] = [values[key][layer] for layer in layers]
    if "max_window_layers" in values:  # for transformers: from this layer on, a window
        changes["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in layers)
    if "full_attention" in values.get("layer_types", []) and "full_attention" not in changes["layer_types"]:
        return None
    if kind.global_every:
        period = _period([_is_nth(layer, values[kind.global_every]) for layer in layers])
        if period is None:
            return None
        changes[kind.global_every] = period
    return changes | _expert_changes(kind, values, layers)


def _expert_changes(kind: ModelType, values: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The keys that say which layers have experts: any choice can be written down."""
    if not kind.sparse or "decoder_sparse_step" not in values or not values[key_of(kind, "experts")]:
        return {}
    everywhere = sparse_layers(kind, values)
    sparse = [everywhere[layer] for layer in layers]
    step = values["decoder_sparse_step"]
    if any(has and not _is_nth(n, step) for n, has in enumerate(sparse)):
        step = 1
    dense = [n for n, has in enumerate(sparse) if not has and _is_nth(n, step)]
    return {"decoder_sparse_step": step, "mlp_only_layers": dense}


def _is_nth(layer: int, period: int) -> bool:
    return (layer + 1) % period == 0


def _period(kinds: Sequence[bool]) -> int | None:
    """The P for which exactly every P-th is true. mlx-lm needs one of them at least."""
    period = kinds.index(True) + 1 if True in kinds else None
    if period is None or any(is_true != _is_nth(n, period) for n, is_true in enumerate(kinds)):
        return None
    return period


def _best_of_kinds(kinds: Sequence[bool], worth: Sequence[float], wanted: Sequence[bool]) -> list[int] | None:
    """Layers of these kinds in this order, of largest summed worth; None if there are none."""
    best: list[tuple[float, list[int]] | None] = [(0.0, [])] + [None] * len(wanted)
    for layer, kind in enumerate(kinds):
        for n in range(len(wanted) - 1, -1, -1):  # from the back, so that a layer is taken once
            before, found = best[n], best[n + 1]
            if before is None or wanted[n] != kind:
                continue
            total = before[0] + worth[layer]
            if found is None or total > found[0]:
                best[n + 1] = total, [*before[1], layer]
    return best[-1][1] if best[-1] is not None else None
