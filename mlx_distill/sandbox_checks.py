"""Whether a run will execute programs that models wrote: then a sandbox has to be there from the start."""

from collections.abc import Iterable

from mlx_distill.data.rows import Row
from mlx_distill.layout import STAGES
from mlx_distill.recipe import Recipe

_EXECUTED = {"code", "humaneval", "mbpp"}  # tasks whose answers are programs


def check_tasks(recipe: Recipe, upto: str, finished: Iterable[str], *, unsafe: bool) -> None:
    """Refuse a recipe whose tasks execute answers, where nothing holds them.

    Args:
        upto: last stage of the run. finished: stages that it will not do again.

    Raises:
        SandboxError: what is missing, and how to accept that.
    """
    evaluated = STAGES.index(upto) >= STAGES.index("evaluate") and "evaluate" not in finished
    if evaluated and _EXECUTED & set(recipe.evaluate.tasks):
        _require(unsafe)


def check_prompts(recipe: Recipe, rows: Iterable[Row], finished: Iterable[str], *, unsafe: bool) -> None:
    """Refuse a recipe that sifts answers by tests, where nothing holds them.

    Args:
        rows: of `data.prompts`.

    Raises:
        SandboxError: as `check_tasks`.
    """
    if recipe.generate.filters.verified and "generate" not in finished and any(row.tests for row in rows):
        _require(unsafe)


def _require(unsafe: bool) -> None:
    from mlx_distill.evaluate import sandbox

    sandbox.require(unsafe)
