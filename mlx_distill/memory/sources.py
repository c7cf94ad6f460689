"""`source: auto` decided: a live teacher where all fits, a stored one where it does not."""

from typing import Any

from mlx_distill.memory.estimates import Estimate
from mlx_distill.memory.words import lent
from mlx_distill.options import Teacher
from mlx_distill.recipe import Recipe


def with_sources(recipe: Recipe, found: Estimate) -> Recipe:
    """The recipe with every `source: auto` decided: live if all fits together, else cache."""
    if recipe.teacher is None or all(one.source != "auto" for one in recipe.teachers.values()):
        return recipe
    chosen = "live" if found.together <= found.machine else "cache"

    def decided(teacher: Teacher) -> Teacher:
        others = [decided(other) for other in teacher.others]
        changes: dict[str, Any] = {"others": others}
        if teacher.source == "auto":
            changes |= {"source": chosen} | ({"cache": None} if chosen == "live" else {})
        return teacher.model_copy(update=changes)

    return recipe.model_copy(update={"teacher": decided(recipe.teacher)})


def decisions(asked: Recipe, decided: Recipe, found: Estimate) -> list[str]:
    """A line for each `source: auto`: what it became, and why."""
    lines = []
    for place, teacher in asked.teachers.items():
        if teacher.source == "auto":
            source = decided.teachers[place].source
            fits = "fit" if source == "live" else "do not fit"
            lines.append(
                f"{place}.source: auto takes {source}; teacher and student {fits} together, at an estimated "
                f"{found.together:.2g} of {lent(found)}"
            )
    return lines
