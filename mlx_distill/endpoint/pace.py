"""When the next request may go out: threads share one pace."""

import math
import threading
import time


class Clock:
    """Seconds, and waiting for them to pass; tests put another in its place."""

    def now(self) -> float:
        """Seconds, ever growing."""
        return time.monotonic()

    def wait(self, seconds: float, stop: threading.Event) -> bool:
        """Wait, unless `stop` is set meanwhile; True if it is."""
        return stop.wait(seconds)


class Pace:
    """At most so many requests a minute, evenly spaced, and none while the server wants to be left alone.

    Spaced evenly they never crowd at the start of a minute, and no window of 60 seconds holds more than
    were allowed, wherever it begins.
    """

    def __init__(self, per_minute: float | None, clock: Clock):
        self._every = 0.0 if per_minute is None else 60.0 / per_minute
        self._clock = clock
        self._next = -math.inf  # when the next request may go
        self._lock = threading.Lock()

    def turn(self, stop: threading.Event) -> bool:
        """Wait for the turn of one request; True if `stop` came first."""
        while True:
            with self._lock:
                now = self._clock.now()
                if self._next <= now:
                    self._next = now + self._every
                    return stop.is_set()
                wait = self._next - now
            if self._clock.wait(wait, stop):
                return True

    def pause(self, seconds: float) -> None:
        """Let no request out for so long."""
        with self._lock:
            self._next = max(self._next, self._clock.now() + seconds)
