"""From a target to sizes: how much of each axis stays, and how much after each round on the way there.

All axes are cut by one common share, as far as their units allow; what the target then leaves over goes to
single axes.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from mlx_distill.errors import RecipeError
from mlx_distill.options import KeptSizes, Prune
from mlx_distill.prune.axes import best_layers, check_sizes, count_of, opens, resized, shapes_of, sizes_of
from mlx_distill.prune.ladders import Ladder, Rung, ladders_of
from mlx_distill.prune.reading import read, sparse_layers, type_of
from mlx_distill.prune.sizes import Sizes

AXES = ("layers", "hidden", "feed_forward", "heads", "experts")


class Target(NamedTuple):
    """How many weights may stay."""

    said: str  # the option and its value
    most: int


def rounds_of(
    config: Mapping[str, Any],
    options: Prune,
    *,
    bytes_each: float = 4.0,
    group_size: int = 1,
    where: str = "student.prune",
) -> list[Sizes]:
    """Sizes of the model after each round, the last the target; every axis only ever gets smaller.

    Args:
        config: of the model that is cut.
        bytes_each: of a weight as it is stored, for a target in GiB.
        group_size: of the quantization that follows. Widths that it divides stay multiples of it.

    Returns:
        `options.rounds` sizes, with counts of weights in even proportions. The last is at most the target,
        and no axis could be one unit larger. Without a target, the model's own sizes once.

    Raises:
        RecipeError: a target that is too small or no target at all, sizes that the model cannot have, an axis
            that it has not, or more rounds than there are cuts.
    """
    own, whole = sizes_of(config), count_of(config)
    if options.sizes is not None:
        last = _asked(config, options.sizes, f"{where}.sizes")
        if last == own and not (options.vocabulary or options.sparsity or options.dense):
            raise RecipeError(f"`{where}.sizes` are those that the model has; lower one")
        ladders = ladders_of(config, _changed(own, last), where, least=last)
    else:
        target = _target(options, whole, bytes_each, where)
        if target is None:
            return [own]
        ladders = ladders_of(config, options.axes, where, group_size=group_size)
        last = _reached(config, ladders, target, options, where, group_size)
    rounds = [last]
    for number in range(options.rounds - 1, 0, -1):
        most = int(whole * (_count(config, last) / whole) ** (number / options.rounds))
        rounds.insert(0, _largest(config, ladders, rounds[0], most))
    for sizes in rounds:
        check_sizes(config, sizes, where)
    for number, (before, after) in enumerate(pairwise([own, *rounds]), 1):
        if options.rounds > 1 and before == after:
            raise RecipeError(
                f"`{where}.rounds` {options.rounds}: there is nothing to cut in round {number}; use fewer"
            )
    return rounds


def _target(options: Prune, whole: int, bytes_each: float, where: str) -> Target | None:
    """The target that the options name, of a model with `whole` weights."""
    if options.ratio is not None:
        return Target(f"`{where}.ratio` {options.ratio:g}", int(options.ratio * whole))
    if options.parameters is not None:
        target = Target(f"`{where}.parameters` {options.parameters:,}", options.parameters)
    elif options.gib is not None:
        target = Target(f"`{where}.gib` {options.gib:g}", int(options.gib * 2**30 / bytes_each))
    else:
        return None
    if target.most >= whole and not options.vocabulary:  # which may have been enough
        raise RecipeError(
            f"{target.said}: {target.most:,} weights may stay, and the model has {whole:,}; lower it"
        )
    return target


def _asked(config: Mapping[str, Any], asked: KeptSizes, where: str) -> Sizes:
    """The sizes that the recipe gives, key and value heads along with the others."""
    own = sizes_of(config)
    if asked.num_experts is not None and not own.experts:
        raise RecipeError(
            f"`{where}.num_experts` {asked.num_experts}: the model has no experts; use intermediate_size"
        )
    heads, group = asked.num_attention_heads or own.heads, own.heads // own.kv_heads
    if heads % group and heads % own.kv_heads:
        steps = (range(step, own.heads + 1, step) for step in (group, own.kv_heads))
        counts = ", ".join(str(count) for count in sorted(set().union(*steps)))
        raise RecipeError(
            f"`{where}.num_attention_heads` {heads}: {own.heads} heads share {own.kv_heads} key and value "
            f"heads, {group} each; what divides is {counts}"
        )
    sizes = Sizes(
        layers=asked.num_hidden_layers or own.layers,
        hidden=asked.hidden_size or own.hidden,
        feed_forward=asked.intermediate_size or own.feed_forward,
        heads=heads,
        kv_heads=own.kv_heads if heads % group else heads // group,
        experts=asked.num_experts or own.experts,
        vocabulary=own.vocabulary,
    )
    check_sizes(config, sizes, where)
    return sizes


def _changed(own: Sizes, sizes: Sizes) -> list[str]:
    return [axis for axis in AXES if getattr(own, axis) != getattr(sizes, axis)]


def _reached(
    config: Mapping[str, Any],
    ladders: Sequence[Ladder],
    target: Target,
    options: Prune,
    where: str,
    group_size: int,
) -> Sizes:
    """The largest sizes within the target."""
    own = least = sizes_of(config)
    for ladder in ladders:
        least = least._replace(**ladder[0])
    smallest = _count(config, least)
    if smallest <= target.most:
        return _largest(config, ladders, least, target.most)
    shapes = shapes_of(resized(config, least)).values()
    tokens = sum(prod(shape) for shape in shapes if len(shape) > 1 and shape[0] == own.vocabulary)
    moves, alone = ["add `hidden` to `axes`"], ""
    if tokens <= target.most:
        moves = [f"add `{axis}` to `axes`" for axis in AXES if getattr(own, axis) > 1]
    else:
        alone = f", of which {tokens:,} are for its {own.vocabulary:,} tokens"
        moves += [] if options.vocabulary else ["set `vocabulary: true`"]
    moves = [move for move in moves if move.split("`")[1] not in options.axes]
    moves += [f"take a smaller `quantize.group_size` than {group_size}"] if group_size > 32 else []
    sizes = ", ".join(f"{axis} {getattr(least, axis)}" for axis in _changed(own, least))
    raise RecipeError(
        f"{target.said}: at most {target.most:,} of {count_of(config):,} weights may stay, and the smallest "
        f"that `{where}.axes` allow has {smallest:,}{alone} ({sizes or 'nothing can be cut'}); "
        + ", ".join([*moves, "or raise it" if moves else "raise it"])
    )


def _largest(config: Mapping[str, Any], ladders: Sequence[Ladder], least: Sizes, most: int) -> Sizes:
    """The largest sizes from `least` on that have at most so many weights; `least` has no more.

    All axes stay as far as one common share takes them. Where that cannot be, because rungs are so coarse
    that a tenth of the weights is left over, or heads do not divide the width, one axis may go a rung
    further, or less far; of sizes that leave less over, the most even are taken.
    """

    def shares(sizes: Sizes) -> list[float]:
        axes = [next(iter(ladder[0])) for ladder in ladders]
        return [getattr(sizes, axis) / ladder[-1][axis] for axis, ladder in zip(axes, ladders, strict=True)]

    common = _climbed(config, ladders, least, most)
    if opens(config, common) and _count(config, common) >= 0.9 * most:
        return common
    found = [common]
    for ladder in ladders:
        axis = next(iter(ladder[0]))
        reached = [rung[axis] for rung in ladder].index(getattr(common, axis))
        for rung in ladder[max(0, reached - 1) : reached + 2]:
            if rung[axis] < getattr(least, axis) or _count(config, least._replace(**rung)) > most:
                continue
            others = [other for other in ladders if other is not ladder]
            if axis == "heads":  # with a width that they divide
                others = [[one for one in other if _divided(config, one, rung)] for other in others]
            raised = _climbed(config, [other for other in others if other], least._replace(**rung), most)
            found.append(raised)
    found = [_filled(config, ladders, sizes, most) for sizes in [*found, least] if opens(config, sizes)]
    if not found:
        return common  # which is refused, with what would do
    enough = [sizes for sizes in found if _count(config, sizes) >= 0.9 * most]
    if enough:
        return min(enough, key=lambda sizes: max(shares(sizes)) - min(shares(sizes)))  # the first of equals
    return max(found, key=lambda sizes: _count(config, sizes))


def _filled(config: Mapping[str, Any], ladders: Sequence[Ladder], sizes: Sizes, most: int) -> Sizes:
    """Sizes with one axis after another a rung further, the shortest first, while that is possible."""
    while True:
        steps = []
        for place, ladder in enumerate(ladders):
            axis = next(iter(ladder[0]))
            further = [sizes._replace(**rung) for rung in ladder if rung[axis] > getattr(sizes, axis)]
            step = next((one for one in further if opens(config, one)), None)
            if step is not None and _count(config, step) <= most:
                steps.append((getattr(step, axis) / ladder[-1][axis], place, step))
        if not steps:
            return sizes
        sizes = min(steps)[2]


def _divided(config: Mapping[str, Any], rung: Rung, heads: Rung) -> bool:
    return "hidden" not in rung or opens(config, sizes_of(config)._replace(**rung, **heads))


def _climbed(config: Mapping[str, Any], ladders: Sequence[Ladder], least: Sizes, most: int) -> Sizes:
    """Sizes from `least` on that have at most so many weights, and no rung more would fit.

    Every rung is climbed in the order of the share of its axis that it stands for, so that all axes keep one
    common share, each to the nearest rung, until the target is reached; then those rungs that still fit.
    """
    steps = []  # share, place of the axis, rung
    for place, ladder in enumerate(ladders):
        axis = next(iter(ladder[0]))
        for lower, upper in pairwise(ladder):
            if upper[axis] > getattr(least, axis):
                steps.append(((lower[axis] + upper[axis]) / ladder[-1][axis] / 2, place, upper))
    steps.sort(key=lambda step: step[:2])

    def climbed(count: int) -> Sizes:
        sizes = least
        for _, _, rung in steps[:count]:
            sizes = sizes._replace(**rung)
        return sizes

    def too_large(count: int) -> bool:
        return _count(config, climbed(count)) > most

    reached = bisect_left(range(1, len(steps) + 1), True, key=too_large)
    sizes, closed = climbed(reached), set()
    for _, place, rung in steps[reached:]:
        if place not in closed and _count(config, sizes._replace(**rung)) <= most:
            sizes = sizes._replace(**rung)
        else:
            closed.add(place)
    return sizes


def _count(config: Mapping[str, Any], sizes: Sizes) -> int:
    """Weights at these sizes. Where some layers have experts and some go, of those that have most."""
    own = sizes_of(config)
    if not own.experts or sizes.layers == own.layers:
        return count_of(resized(config, sizes))
    worth = [float(sparse) for sparse in sparse_layers(type_of(config), read(config))]
    choices = (best_layers(config, [sign * one for one in worth], sizes.layers) for sign in (1.0, -1.0))
    return max(count_of(resized(config, sizes, layers)) for layers in choices)
