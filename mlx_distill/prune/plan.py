"""What pruning will leave, known from config.json alone and so before any work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_distill.models.headers import config_of, stored_sizes
from mlx_distill.options import Prune
from mlx_distill.prune.axes import check_supported, count_of, resized, shapes_of, sizes_of
from mlx_distill.prune.dense import planned_dense
from mlx_distill.prune.sizes import Sizes
from mlx_distill.prune.sparse import check_pattern
from mlx_distill.prune.target import rounds_of
from mlx_distill.quantize.checks import check_groups, check_type, grid_of
from mlx_distill.recipe import Recipe

WHERE = "student.prune"


class Planned(NamedTuple):
    """A student that is to be cut out."""

    source: dict[str, Any]  # config.json of what is cut
    rounds: list[Sizes]  # after each round; the last is what stays
    config: dict[str, Any]  # of the student
    bytes_each: float  # of a weight as it is stored

    @property
    def summary(self) -> str:
        """Its sizes against those of what is cut, in a line."""
        before, after = sizes_of(self.source), self.rounds[-1]
        changed = [
            f"{name.replace('_', ' ')} {old} -> {new}"
            for name, old, new in zip(Sizes._fields, before, after, strict=True)
            if old != new
        ]
        mine, whole = count_of(self.config), count_of(self.source)
        said = ", ".join(changed) or "no size changes"
        return f"{said}; {mine:,} of {whole:,} weights ({mine / whole:.0%})"


def plan_pruning(
    recipe: Recipe, folders: Mapping[str, Path], vocabulary: int | None = None
) -> Planned | None:
    """The student that a recipe cuts out; None if it cuts none, or what it cuts is not there yet.

    Args:
        folders: of models by their keys; `student` is what is cut.
        vocabulary: tokens that stay, for a recipe that cuts those too: it has no plan before they are known.

    Raises:
        ModelError: a model type that cannot be cut.
        RecipeError: a target that cannot be reached, or leaves nothing, or what `quantize` cannot round.
    """
    options, quantize = recipe.student.prune, recipe.quantize
    if options is None or "student" not in folders:
        return None
    folder = folders["student"]
    config, stored = config_of(folder), stored_sizes(folder)
    check_supported(config, WHERE)
    if options.vocabulary and vocabulary is None:
        return None
    each, size = stored.bytes / stored.numbers, 1 if quantize is None else quantize.group_size
    planned = plan_from(config, options, bytes_each=each, vocabulary=vocabulary, group_size=size)
    if quantize is not None:
        check_type(quantize, planned.config)
        check_groups(shapes_of(planned.config), grid_of(quantize), "quantize")
    return planned


def plan_from(
    config: dict[str, Any],
    options: Prune,
    *,
    bytes_each: float,
    vocabulary: int | None = None,
    group_size: int = 1,
) -> Planned:
    """The same from a config.

    Args:
        bytes_each: of a weight as it is stored, for a target in GiB.
        vocabulary: tokens that stay; None: all. A `ratio` is of the weights that there are before.
        group_size: of the quantization that follows, so that it divides what it divided before.
    """
    check_supported(config, WHERE)
    whole = config
    if vocabulary is not None:
        if options.ratio is not None:
            most = int(options.ratio * count_of(config))
            options = options.model_copy(update={"ratio": None, "parameters": most})
        config = resized(config, sizes_of(config)._replace(vocabulary=vocabulary))
    rounds = rounds_of(config, options, bytes_each=bytes_each, group_size=group_size, where=WHERE)
    small = resized(config, rounds[-1])
    if options.dense:
        small = planned_dense(small, WHERE)
    if options.sparsity is not None:
        check_pattern(small, options.sparsity, f"{WHERE}.sparsity")
    return Planned(whole, rounds, small, bytes_each)
