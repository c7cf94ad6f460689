"""Ctrl-C, SIGTERM and a closed terminal: a training stage saves first, anything else stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_distill.errors import DistillError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESUMABLE = (75, *(128 + number for number in SIGNALS))  # exit codes after which a run can go on


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
        """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted` while the block runs.

        Also where a library took it for a failure of its own, such as a model that cannot be loaded. SIGHUP
        stays ignored where it is, as under `nohup`.
        """
        # None: a handler that Python did not set, which it cannot put back.
        heeded = [
            number
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) not in (signal.SIG_IGN, None)
        ]
        before = {number: signal.signal(number, self._came) for number in heeded}
        try:
            yield
        except Exception as error:
            if (signalled := _behind(error)) is not None and signalled is not error:
                raise signalled from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note the first signal; the block asks `check` where it can stop. A second one stops it.

        Not a second SIGHUP: a closed terminal's comes from the system, and again from the shell.
        """
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _came(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and number != signal.SIGHUP
        if self.number is None:
            self.number = number
        if again or not self._waits:
            raise Interrupted(number)


def _behind(error: BaseException | None) -> Interrupted | None:
    """The signal that an error was made of."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error
