"""What each axis of a model can be cut to: widths in units that quantization divides, heads in groups."""

from collections.abc import Mapping, Sequence
from math import gcd, lcm
from typing import Any

from mlx_distill.errors import RecipeError
from mlx_distill.prune.axes import fits, sizes_of
from mlx_distill.prune.reading import read
from mlx_distill.prune.sizes import Sizes

Rung = dict[str, int]  # sizes that change together
Ladder = list[Rung]  # what an axis can be cut to, rising to what it is


def ladders_of(
    config: Mapping[str, Any],
    axes: Sequence[str],
    where: str,
    *,
    group_size: int = 1,
    least: Sizes | None = None,
) -> list[Ladder]:
    """The ladder of each axis; of two axes that are tied, one ladder.

    Args:
        axes: their names, as in `Prune.axes`.
        group_size: of the quantization that follows. Widths that it divides stay multiples of it.
        least: the lowest rungs; None: one unit.

    Raises:
        RecipeError: the model has not this axis, or not alone.
    """
    own = sizes_of(config)
    if "experts" in axes and not own.experts:
        raise RecipeError(f"`{where}.axes`: the model has no experts; drop `experts`")

    def possible(ladder: Ladder) -> Ladder:
        return [rung for rung in ladder if fits(config, own._replace(**rung))]

    ladders = {axis: _rungs(config, axis, group_size, least) for axis in axes}
    found = {axis: possible(ladder) for axis, ladder in ladders.items()}
    stuck = [axis for axis in ("hidden", "heads") if len(found.get(axis, [])) == 1 < len(ladders[axis])]
    if stuck:
        # Where a head is hidden_size / num_attention_heads wide, the two are one axis.
        heads = _rungs(config, "heads", group_size, least)
        joint = possible([{**rung, "hidden": rung["heads"] * own.hidden // own.heads} for rung in heads])
        if len(joint) > 1 and not {"hidden", "heads"} <= set(axes):
            other = "heads" if stuck == ["hidden"] else "hidden"
            raise RecipeError(
                f"`{where}.axes`: a head of this model is hidden_size / num_attention_heads wide, so that "
                f"`{stuck[0]}` is cut together with `{other}`; add it, or drop `{stuck[0]}`"
            )
        found = {axis: ladder for axis, ladder in found.items() if axis not in stuck} | {"heads": joint}
    return list(found.values())


def _rungs(config: Mapping[str, Any], axis: str, group_size: int, least: Sizes | None) -> Ladder:
    """Sizes of one axis in whole units, from the least on."""
    own = sizes_of(config)
    size = getattr(own, axis)
    if axis != "heads":
        step = 1
        if axis in ("hidden", "feed_forward"):
            step = _grouped(_unit(size), group_size, size)
        lowest = step if least is None else getattr(least, axis)
        return [{axis: n} for n in sorted({lowest, *range(step, size + 1, step)}) if n >= lowest]
    # Whole groups of heads go with their key and value head, or a head of each group: what is finer.
    kv, group = own.kv_heads, own.heads // own.kv_heads
    stay = group > kv if least is None else least.kv_heads == kv
    step = _grouped(kv if stay else group, group_size // gcd(group_size, read(config)["head_dim"]), size)
    lowest = step if least is None else least.heads
    return [{"heads": n, "kv_heads": kv if stay else n // group} for n in range(lowest, size + 1, step)]


def _unit(size: int) -> int:
    """In which a width is cut: what groups of quantized weights divide, as far as it is so wide."""
    units = {64: 16, 32: 4, 16: 4, 8: 4, 4: 4, 2: 4}  # unit -> how many there are at least
    return next((unit for unit, count in units.items() if size % unit == 0 and size >= count * unit), 1)


def _grouped(step: int, group: int, size: int) -> int:
    """A multiple of `step` that is one of `group` too, where `size` is."""
    return lcm(step, group) if size % lcm(step, group) == 0 else step
