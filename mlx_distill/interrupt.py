"""Ctrl-C and SIGTERM: a training stage saves first, anything else stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_distill.errors import DistillError


class Interrupted(DistillError):
    """The user, or the system, asked the run to stop; `exit_code` is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Interrupts:
    """Which signal came, for the one who asks between steps."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._waits = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into `Interrupted` while the block runs."""
        before = {number: signal.signal(number, self._came) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first signal; the block asks `check` where it can stop. A second one stops it."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _came(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number is not None, number
        if again or not self._waits:
            raise Interrupted(number)
