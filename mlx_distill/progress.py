"""Progress that library code reports and somebody else shows.

A long function takes `progress` and writes

    with progress("teacher answers", len(prompts), "rows") as advance:
        ...
        advance(1, tokens_per_second=812.0)

`silent` is the default; the run folder hands in one that draws a bar, or prints plain lines where
the output is no terminal, and that others can follow (`progress_file.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[..., None]
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]


@contextmanager
def silent(title: str, total: int, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda amount=1, **columns: None


class Meter:
    """One piece of work: how far it is, how fast, how long still."""

    def __init__(self, title: str, total: int, unit: str, clock: Callable[[], float]):
        """
        Args:
            clock: seconds, ever growing.
        """
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.columns: dict[str, float] = {}
        self._clock = clock
        self._start = clock()

    def advance(self, amount: int, columns: dict[str, float]) -> None:
        """Add to what is done. Columns stand in the order in which they were last given."""
        self.done += amount
        self.columns = columns | {name: x for name, x in self.columns.items() if name not in columns}

    def elapsed(self) -> float:
        return self._clock() - self._start

    def rate(self) -> float | None:
        """Units a second so far; None before any time has passed."""
        elapsed = self.elapsed()
        return self.done / elapsed if elapsed > 0 else None

    def left(self) -> float | None:
        """Seconds left at the speed so far; None before the first advance."""
        if not self.done or self.done > self.total:
            return None
        return self.elapsed() * (self.total - self.done) / self.done
