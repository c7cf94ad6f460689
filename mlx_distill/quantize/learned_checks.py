"""What learned quantization cannot do with a recipe, known before anything is read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlx_distill.errors import RecipeError
from mlx_distill.losses.menu import MENU

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe
    from mlx_distill.teacher_files import TeacherFiles

LEARNED = ("dwq", "qad")


def learned_quantization(recipe: "Recipe") -> list[str]:
    """What the sections of a recipe say of each other here, one line a mistake."""
    options, teacher = recipe.quantize, recipe.teacher
    if options is None or options.method not in LEARNED:
        return []
    mistakes, method = [], f"`quantize.method` {options.method}"
    if options.towards == "teacher" and teacher is None:
        mistakes.append("`quantize.towards` teacher: the recipe names no `teacher`; use student")
    elif options.towards == "teacher" and not teaches_in_the_end(recipe):
        mistakes.append(
            "`quantize.towards` teacher: it is a moving average of the student, gone once that is trained; "
            "use student"
        )
    stored = teacher is not None and teacher.source != "live"
    asked = any(MENU[name].needs_teacher for name in recipe.objective)
    at = recipe.temperature
    if stored and asked and options.towards != "student" and options.temperature != at:
        mistakes.append(
            f"`quantize.temperature` {options.temperature:g}: the teacher's targets are stored at {at:g}, "
            "the temperature of `objective`; use that, or `quantize.towards` student"
        )
    if recipe.student.prune is not None and recipe.student.prune.sparsity is not None:
        if options.method == "dwq":
            mistakes.append(
                f"{method} moves whole groups of weights, and with them the zeros of "
                "`student.prune.sparsity`; use qad or rtn"
            )
        elif options.rank is not None:
            mistakes.append(
                f"`quantize.rank` {options.rank}: LoRA matrices would fill the zeros of "
                "`student.prune.sparsity`; drop it"
            )
    return mistakes


def teaches_in_the_end(recipe: "Recipe") -> bool:
    """Whether the first teacher is still there once the student is trained."""
    return recipe.teacher is not None and recipe.teacher.ema is None


def check_towards(recipe: "Recipe", teachers: Mapping[str, "TeacherFiles"]) -> None:
    """Refuse to learn towards a teacher with other tokens than the student's.

    Raises:
        RecipeError: it was asked for.
    """
    options = recipe.quantize
    asked = options is not None and options.method in LEARNED and options.towards == "teacher"
    if asked and "teacher" in teachers and teachers["teacher"].foreign:
        raise RecipeError(
            "`quantize.towards` teacher: its tokens are others than the student's, and distributions are "
            "compared over one vocabulary; use student"
        )
