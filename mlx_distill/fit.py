"""What to change in a recipe so that it fits the machine, the least intrusive first.

Those of `_STEPS` change how the same student is computed: which arrays are there at once. `--fit` applies
them. The others change what is learned, or from whom, and are only suggested.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from pydantic import ValidationError

from mlx_distill.data.batch import PAD_TO
from mlx_distill.errors import DistillError
from mlx_distill.memory import Estimate
from mlx_distill.recipe import Recipe

WORTH = 0.02  # share of the peak that a change must save
CHUNKS = 16  # MiB, the least that `train.logits_mib` is lowered to
Estimates = Callable[[Recipe], Estimate]


class Change(NamedTuple):
    """Some options of a recipe, and what other values of them save."""

    options: dict[str, Any]  # "section.key": value
    same: bool  # the same student is learned
    saves: float  # GiB of the peak, by the estimate
    recipe: Recipe  # with these values

    @property
    def overrides(self) -> str:
        """As words of the command line."""
        return " ".join(f"{key}={_shown(value)}" for key, value in self.options.items())


def suggested(recipe: Recipe, estimate: Estimates) -> list[Change]:
    """Changes that each save memory by themselves, in the order in which they should be tried."""
    before, found = estimate(recipe).peak, list[Change]()
    for options, same in _candidates(recipe, estimate):
        changed = with_options(recipe, options)
        if changed is None:
            continue
        saves = before - estimate(changed).peak
        if saves > WORTH * before:
            found.append(Change(options, same, saves, changed))
    return found


def fitted(recipe: Recipe, estimate: Estimates) -> tuple[Recipe, list[Change]]:
    """The recipe with as many changes as it needs to fit, of those that leave what is learned as it is.

    Returns:
        the recipe, and what was changed: nothing where it fits, and all that helps where it never does.
    """
    made: list[Change] = []
    for step in range(len(_STEPS)):
        found = estimate(recipe)
        if found.fits:
            break
        for options, same in _STEPS[step](recipe, estimate):
            changed = with_options(recipe, options) if same else None
            if changed is None:
                continue
            saves = found.peak - estimate(changed).peak
            if saves > WORTH * found.peak:
                made.append(Change(options, True, saves, changed))
                recipe = changed
                break
    return recipe, made


def advice(found: Estimate, changes: list[Change]) -> str | None:
    """A line where a run takes more than the machine lends; None where it fits."""
    if found.fits:
        return None
    told = f"memory: {found.at} takes an estimated {found.peak:.2g} GiB"
    told += f", and the machine lends {found.machine:.3g}"
    enough = [one for one in changes if found.peak - one.saves <= found.machine]
    enough.sort(key=lambda one: not one.same)  # else in their order
    best = enough[0] if enough else max(changes, key=lambda one: one.saves, default=None)
    if best is None:
        return f"{told}; no change of options is known that saves enough: take smaller models or shorter rows"
    how = "; --fit applies it" if best.same else ""
    return f"{told}; {best.overrides} saves {best.saves:.2g} GiB{how}"


def with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe | None:
    """The recipe with other values, checked as when it is read; None where they contradict the rest."""
    tree = recipe.model_dump(mode="json")
    for name, term in tree["objective"].items():  # as they stand in a file
        tree["objective"][name] = {"weight": term["weight"], **term["options"]}
    for key, value in options.items():
        place = tree
        *above, last = key.split(".")
        for name in above:
            place[name] = place[name] if place[name] is not None else {}
            place = place[name]
        place[last] = value
    try:
        return Recipe.model_validate(tree)
    except (ValidationError, DistillError):
        return None


Candidates = Iterator[tuple[dict[str, Any], bool]]


def _candidates(recipe: Recipe, estimate: Estimates) -> Candidates:
    for step in (*_STEPS, _few_bits, _adapters):
        yield from step(recipe, estimate)


def _stored(recipe: Recipe, estimate: Estimates) -> Candidates:
    """The teacher reads the rows once, before training. All of its distribution is too much to store."""
    if recipe.teacher is None or recipe.teacher.source == "cache" or recipe.teacher.others:
        return
    if recipe.teacher.top_k is not None:
        yield {"teacher.source": "cache"}, True
    else:
        yield {"teacher.source": "cache", "teacher.top_k": 64}, False


def _smaller_chunks(recipe: Recipe, estimate: Estimates) -> Candidates:
    """The largest chunk with which all fits, or else the smallest that saves something."""
    size = recipe.train.logits_mib
    tried = None
    while size > CHUNKS:
        size = max(CHUNKS, size // 2)
        changed = with_options(recipe, {"train.logits_mib": size})
        if changed is None:
            return
        tried = size
        if estimate(changed).fits:
            break
    if tried is not None:
        yield {"train.logits_mib": tried}, True


def _smaller_batches(recipe: Recipe, estimate: Estimates) -> Candidates:
    """As many tokens a step, in more forward passes."""
    train, tried = recipe.train, None
    tokens, passes = train.batch_tokens, train.micro_batches
    least = estimate(recipe).longest
    while tokens // 2 >= max(least, PAD_TO):
        tokens, passes = tokens // 2, passes * 2
        tried = {"train.batch_tokens": tokens, "train.micro_batches": passes}
        changed = with_options(recipe, tried)
        if changed is None or estimate(changed).fits:
            break
    if tried is not None:
        yield tried, True


def _recomputed(recipe: Recipe, estimate: Estimates) -> Candidates:
    if not recipe.train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": True}, True


def _few_bits(recipe: Recipe, estimate: Estimates) -> Candidates:
    teacher = recipe.teacher
    if teacher is not None and teacher.quantize is None and teacher.model != "student":
        yield {"teacher.quantize.bits": 4, "teacher.quantize.group_size": 64}, False


def _adapters(recipe: Recipe, estimate: Estimates) -> Candidates:
    if recipe.student.method == "full" and recipe.student.model is not None:
        yield {"student.method": "lora"}, False


def _answers_at_once(stage: str, recipe: Recipe, estimate: Estimates) -> Candidates:
    """Fewer of them, where it is the writing stage that takes most: as many as fit, or else one."""
    size = getattr(recipe, stage).batch_size
    if estimate(recipe).at != stage or size == 1:
        return
    while size > 1:
        size //= 2
        changed = with_options(recipe, {f"{stage}.batch_size": size})
        if changed is None or estimate(changed).fits:
            break
    yield {f"{stage}.batch_size": size}, True


_STEPS = (
    _stored,
    _smaller_chunks,
    _smaller_batches,
    _recomputed,
    partial(_answers_at_once, "generate"),
    partial(_answers_at_once, "evaluate"),
)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
