"""Rejection sampling: of the answers that passed the filters, one a prompt."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mlx_distill.filters.surprise import Nll, mean_nll
from mlx_distill.written import Written


def keep(
    written: Sequence[Written],
    reasons: Sequence[str | None],
    how: Literal["all", "first", "best"],
    nll: Nll | None,
) -> list[str | None]:
    """The reasons, with one more for each answer that passed the filters and is not its prompt's choice.

    Args:
        how: "first": the one of least sample number. "best": the one of least mean nats a token, where
            two have the same the first. "all": nothing changes.
        nll: as in `Material`; None: what the server gave.

    Raises:
        DataError: "best" has nothing to tell answers apart by.
    """
    found = list(reasons)
    if how == "all":
        return found
    passed: dict[int, list[int]] = {}
    for i in sorted((i for i, one in enumerate(found) if one is None), key=lambda i: written[i].sample):
        passed.setdefault(written[i].prompt, []).append(i)
    rivals = [i for group in passed.values() if len(group) > 1 for i in group]
    if how == "first" or not rivals:
        for first, *others in passed.values():
            for i in others:
                found[i] = f"keep: answer {written[first].sample} is the first that passed"
        return found
    values = np.nan_to_num(mean_nll([written[i] for i in rivals], nll), nan=np.inf)
    nats = dict(zip(rivals, map(float, values), strict=True))
    for group in passed.values():
        if len(group) > 1:
            best = min(group, key=nats.__getitem__)
            for i in group:
                if i != best:
                    found[i] = (
                        f"keep: answer {written[best].sample} is likelier, "
                        f"{nats[best]:.4g} nats a token against {nats[i]:.4g}"
                    )
    return found
