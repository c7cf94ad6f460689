"""A word of warning, early, when answers that are being written do not end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_distill.console import Console
from mlx_distill.options import Generate
from mlx_distill.progress import Advance, Progress
from mlx_distill.written import Written


class RunawayAlarm:
    """Says once, and early, that many answers do not end."""

    def __init__(self, console: Console, options: Generate):
        self._console, self._options = console, options
        self._done = self._unfinished = 0
        self._told = False

    def add(self, written: Sequence[Written]) -> None:
        """Count the answers of a whole block."""
        self._done += len(written)
        self._unfinished += sum(not one.finished and one.refused is None for one in written)
        self._look(0, 0)

    def watching(self, advance: Advance) -> Progress:
        """The progress of one block, as a part of the whole; the alarm looks on."""

        @contextmanager
        def progress(title: str, total: int, unit: str) -> Iterator[Advance]:
            done = 0

            def step(amount: int = 1, **columns: float) -> None:
                nonlocal done
                done += amount
                self._look(done, int(columns.get("unfinished", 0)))
                advance(amount, **columns)

            yield step

        return progress

    def _look(self, done: int, unfinished: int) -> None:
        done, unfinished = self._done + done, self._unfinished + unfinished
        # The first to be done are short ones, so the share is seen too small at first, never too large.
        if self._told or unfinished < 5 or unfinished <= 0.2 * done:
            return
        self._told = True
        self._console.say(
            f"{unfinished / done:.0%} of the first {done} answers did not end within `generate.max_tokens` "
            f"{self._options.max_tokens}, and are dropped; if that is too many, stop, look at the prompts, "
            "or raise it"
        )
