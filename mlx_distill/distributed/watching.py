"""Who notices that a rank has ended, and ends all: each rank watches its connection, rank 0 those of all.

A process that dies closes its connections, whatever killed it, and a machine that goes silent is given up by
the kernels of the others (`links.py`). `mx.distributed` may hang at such a moment or raise an error in the
middle of a step; either way the thread that watches ends this process with a line that says what happened.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_distill.distributed.links import Link
from mlx_distill.errors import DistillError, Stopped
from mlx_distill.interrupt import Interrupted, Interrupts

TOGETHER = 1.0  # seconds within which a Ctrl-C that all processes got has reached rank 0
HUNG = 5.0  # seconds after a second signal in which Python, if it still runs, has ended this process


class Watch:
    """Watches the other ranks until `done`.

    Args:
        rank: of this process. links: to every other rank, or to rank 0.
        interrupts: what rank 0 heeds; signals that others got are handed on to it.
        end: ends the process with an exit code; a test's does not.
    """

    def __init__(
        self,
        rank: int,
        links: list[Link],
        interrupts: Interrupts | None = None,
        end: Callable[[int], None] = os._exit,
    ):
        self.rank, self.links, self.interrupts, self._end = rank, links, interrupts, end
        self.last_words: Callable[[str], None] = lambda why: None  # what is still to be done when all stops
        self._over = threading.Event()
        self._signals = 0  # that came to this process
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._look, args=(link,), daemon=True) for link in links]
        for thread in self._threads:
            thread.start()

    def tell(self, value: dict[str, Any]) -> None:
        """Say something to those who watch this rank, if they are still there."""
        for link in self.links:
            try:
                link.send(value)
            except Stopped:
                continue

    def done(self) -> None:
        """All is done here: from now on whoever ends does so rightly. Waits for the others."""
        self.tell({"done": True})
        for thread in self._threads:
            thread.join(timeout=10)
        self._over.set()
        for link in self.links:
            link.close()

    def ended_by(self, error: BaseException) -> None:
        """This rank stops because of `error`, which the caller raises on. The others are told why.

        What is only another rank's end, seen from here, or comes to all alike, is left to the one who knows
        more, and this does not return. A signal at another rank than 0 is left to rank 0 too.
        """
        if isinstance(error, Interrupted) and self.rank:
            self.tell({"signal": error.exit_code - 128})
            self._threads[0].join(timeout=20)
        alike = self.rank > 0 or isinstance(error, Stopped)
        if (alike or not isinstance(error, DistillError | KeyboardInterrupt)) and self._over.wait(timeout=2):
            time.sleep(5)  # the thread that watches knows who it was, and ends this process
        self._over.set()
        first = (str(error).splitlines() or [""])[0]
        kind = "" if isinstance(error, DistillError) else f"{type(error).__name__}: "
        self.tell({"ended": f"{kind}{first}"[:300], "code": getattr(error, "exit_code", 1)})

    def _look(self, link: Link) -> None:
        try:
            while True:
                said = link.receive().value
                if "done" in said:
                    return
                if "ended" in said:
                    self._all_stop(link.rank, said["ended"], said["code"])
                    return
                self._hand_on(said["signal"])
        except Stopped:
            self._all_stop(link.rank, None, Stopped.exit_code)

    def _hand_on(self, number: int) -> None:
        if self.interrupts is not None and self.interrupts.number is None and not self._signals:
            os.kill(os.getpid(), number)

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """While the block runs, a second Ctrl-C or SIGTERM ends this process even where MLX never returns.

        Python's handlers wait for MLX, and a collective may wait for a rank that hangs.
        """
        here, there = socket.socketpair()
        there.setblocking(False)
        before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._count_signals, args=(here,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            there.close()
            thread.join(timeout=1)
            here.close()

    def _count_signals(self, numbers: socket.socket) -> None:
        while came := numbers.recv(16):
            heeded = [number for number in came if number in (signal.SIGINT, signal.SIGTERM)]
            self._signals += len(heeded)
            if heeded and self._signals > 1 and not self._over.wait(HUNG):
                self._give_up(signal.Signals(heeded[-1]))

    def _give_up(self, number: signal.Signals) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            line = f"{number.name} came twice, and MLX hangs; go on with --resume"
            self.tell({"ended": line, "code": 128 + number})
            self.last_words(line)
            self._say(line)
            self._end(128 + number)

    def _say(self, line: str) -> None:
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a bar hides
        sys.stderr.write(f"{shown}error: {line}\n")
        sys.stderr.flush()

    def _all_stop(self, rank: int, why: str | None, code: int) -> None:
        """A rank has ended. Rank 0 says so, unless the error is its own and told already."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            line = f"rank {rank} ended {'without a word' if why is None else f'({why})'}; all stop"
            if code != 2:  # of a wrong input, which would be wrong again
                line += "; go on with --resume"
            if self.rank == 0:
                self.tell({"ended": line, "code": code})
            self.last_words(line)
            if self.rank == 0 or why is None:
                self._say(line)
            self._end(code)


class Forwarded(Interrupts):
    """Signals at another rank than 0: rank 0 is told, saves, and ends all. A second one ends this rank."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]):
        super().__init__()
        self._tell, self._came_before = tell, False

    def _came(self, number: int, frame: Any) -> None:
        if self._came_before:
            raise Interrupted(number)
        self._came_before = True
        # Not at once: on one machine Ctrl-C reaches all, and rank 0 would take it for a second one.
        timer = threading.Timer(TOGETHER, self._tell, ({"signal": signal.Signals(number).value},))
        timer.daemon = True
        timer.start()
