"""Which answers a model learns from: filters drop some, each with its reason; one a prompt may be chosen.

The filters stand in `FILTERS`, in the order in which they run; each is a function

    (answers that are still kept, the option's value, material) -> a reason a dropped answer, else None

and its name is the option's. An answer is dropped by the first filter that takes it. The cheap ones come
first, but `duplicates` is the last: a copy must not fall to an answer that is dropped itself later on.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mlx_distill.filters import (
    decontamination,
    duplicates,
    language,
    programs,
    repetition,
    shape,
    surprise,
    verification,
)
from mlx_distill.filters.choice import keep
from mlx_distill.filters.material import Material
from mlx_distill.filters.needs import check_filters, determining
from mlx_distill.filters.surprise import remembered
from mlx_distill.options import Filters
from mlx_distill.written import Written

__all__ = ["FILTERS", "Material", "check_filters", "determining", "keep", "reasons", "remembered", "summary"]

Filter = Callable[[Sequence[Written], Any, Material], list[str | None]]

FILTERS: dict[str, Filter] = {
    "stubs": shape.stubs,
    "min_tokens": shape.min_tokens,
    "max_tokens": shape.max_tokens,
    "repetition": repetition.repetition,
    "parses": programs.parses,
    "language": language.language,
    "decontaminate": decontamination.decontaminate,
    "verified": verification.verified,
    "perplexity": surprise.perplexity,
    "duplicates": duplicates.duplicates,
}


def reasons(
    written: Sequence[Written],
    options: Filters,
    material: Material,
    already: Sequence[str | None] | None = None,
) -> list[str | None]:
    """Why each answer is dropped, None where it is kept.

    A reason is one line: the name of the filter, a colon, the value measured and the limit.

    Args:
        already: reasons found elsewhere; no filter looks at those answers, and the reasons come back.

    Raises:
        MissingExtra: a filter needs a package that is not installed.
        DataError: an answer that cannot be judged: no tests or references, no log-probabilities.
    """
    found: list[str | None] = [None] * len(written) if already is None else list(already)
    for name, look in FILTERS.items():
        value = getattr(options, name)
        left = [i for i, reason in enumerate(found) if reason is None]
        if value is None or value is False or not left:
            continue
        for i, reason in zip(left, look([written[i] for i in left], value, material), strict=True):
            found[i] = None if reason is None else f"{name}: {_one_line(reason)}"
    return found


def summary(found: Sequence[str | None]) -> dict[str, int]:
    """How many answers each filter took: what stands before the colon -> count.

    What was found elsewhere comes first, then the filters in their order, then `keep`.
    """
    counts: dict[str, int] = {}
    for reason in found:
        if reason is not None:
            kind = reason.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
    order = [*FILTERS, "keep"]
    return dict(sorted(counts.items(), key=lambda one: order.index(one[0]) if one[0] in order else -1))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
