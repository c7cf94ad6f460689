"""A run whose memory is more than the machine's: changed if the user says so, else told."""

from mlx_distill.console import Console
from mlx_distill.fit import advice, fitted, suggested
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.recipe import Recipe


def made_to_fit(
    prepared: Prepared, recipe: Recipe, console: Console, *, trust: bool = False
) -> tuple[Prepared, Recipe]:
    """What is prepared, with the changes that it takes to fit; the recipe that asks for it.

    Each change is said as an override, with which the run could be repeated.
    """
    _, changes = fitted(prepared.recipe, prepared.estimated)
    if not changes:
        return prepared, recipe
    changed = changes[-1].recipe
    for one in changes:
        console.say(f"--fit: {one.overrides} saves an estimated {one.saves:.2g} GiB")
    return prepare(changed, console.progress, trust=trust), changed


def short_of_memory(prepared: Prepared) -> list[str]:
    """A line where the run takes more than the machine lends, with the change that helps best."""
    if prepared.memory.fits:
        return []
    line = advice(prepared.memory, suggested(prepared.recipe, prepared.estimated))
    return [] if line is None else [line]
