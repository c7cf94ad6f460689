"""Progress that library code reports and somebody else shows.

A long function takes `progress` and writes

    with progress("teacher answers", len(prompts), "rows") as advance:
        ...
        advance(1, tokens_per_second=812.0)

`silent` is the default; the run folder hands in one that draws a bar, or prints plain lines where
the output is no terminal.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[..., None]
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]


@contextmanager
def silent(title: str, total: int, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda amount=1, **columns: None
