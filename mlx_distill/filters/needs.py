"""What filters need, checked before a teacher works for hours."""

from collections.abc import Mapping, Sequence

from mlx_distill.data.rows import Row
from mlx_distill.data.sources import digest
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.filters.decontamination import ngrams_of
from mlx_distill.filters.duplicates import load_datasketch
from mlx_distill.filters.language import load_detector
from mlx_distill.filters.verification import check_verifiable
from mlx_distill.recipe import Recipe


def check_filters(recipe: Recipe, rows: Mapping[str, Sequence[Row]]) -> None:
    """Refuse filters that could not do their work on these rows.

    Args:
        rows: by key of `data`.

    Raises:
        MissingExtra: a package is not installed.
        RecipeError: a language that is not known, or nothing held out to compare with.
        DataError: a prompt whose answers nothing verifies.
    """
    filters = recipe.generate.filters
    if recipe.data.prompts is None:
        return
    if filters.duplicates is not None and filters.duplicates < 1:
        load_datasketch()
    if filters.language is not None:
        known = [label for label in load_detector().labels if len(label) == 2]
        if filters.language not in known:
            raise RecipeError(
                f"`generate.filters.language` {filters.language!r}: the detector knows "
                f"{', '.join(sorted(known))}"
            )
    if filters.decontaminate is not None:
        n, held_out = filters.decontaminate, [*rows["valid"], *rows["test"]]
        if not held_out:
            raise RecipeError(
                "`generate.filters.decontaminate` compares with `data.valid` and `data.test`, and both are "
                "missing; name one"
            )
        if not ngrams_of(held_out, n):
            raise DataError(
                f"`generate.filters.decontaminate` {n}: no text of `data.valid` and `data.test` has "
                f"{n} words; lower it"
            )
    if filters.verified:
        for row in rows["prompts"]:
            check_verifiable(row)


def determining(recipe: Recipe, rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """What decides which answers are kept and stands outside of `recipe.determining`, for a fingerprint.

    Elsewhere held-out rows and the seconds of a test change nothing about the student.
    """
    filters, found = recipe.generate.filters, []
    if recipe.data.prompts is None:
        return found
    if filters.decontaminate is not None:
        found.append(f"held out {digest([*rows['valid'], *rows['test']])}")
    if filters.verified:
        found.append(f"verified {digest(rows['prompts'])} {recipe.evaluate.seconds}")
    return found
