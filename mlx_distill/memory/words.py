"""An estimate in words."""

import math
from collections.abc import Iterator

from mlx_distill.memory.estimates import Estimate
from mlx_distill.memory.parts import Parts

_HEADING = "memory, GiB"


def table(found: Estimate) -> Iterator[str]:
    """What each stage takes, part by part, in the order in which they come; then the most of them."""
    stages = found.by_stage
    columns = [*Parts._fields, "together"]
    first = max(map(len, [_HEADING, *stages]))
    yield "  ".join([_HEADING.ljust(first), *columns])
    for name, parts in stages.items():
        told = [f"{gib:.2g}" if gib else "" for gib in (*parts, parts.together)]
        cells = [one.rjust(len(column)) for one, column in zip(told, columns, strict=True)]
        yield "  ".join([name.ljust(first), *cells])
    most = f"the most is {found.at}, {found.peak:.2g} GiB"
    if math.isinf(found.machine):
        yield f"{most}; whether it fits is unknown: this system does not tell how much memory there is"
    else:
        verdict = "fits" if found.fits else "does not fit"
        yield f"{most}, which {verdict} in the {lent(found)} that a run may take here"


def lent(found: Estimate) -> str:
    """What the machine lends."""
    return "an unknown size" if math.isinf(found.machine) else f"{found.machine:.3g} GiB"
