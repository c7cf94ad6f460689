"""`progress.json`: what goes on in a run, written for those who look on from another process.

It is there from the first stage that is done until the run has finished. A run that stops leaves it behind
with the reason in `ended`; one that is killed leaves the number of a process that is no more.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill.progress import Advance, Meter, Progress

EVERY = 1.0  # seconds between two writes, at least


class ProgressFile:
    """Hands progress on to the one who shows it, and keeps what another process may see of it."""

    def __init__(
        self,
        path: Path,
        shown: Progress,
        memory: Callable[[], tuple[str, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            shown: draws the bars.
            memory: what is measured, and GiB of it.
            clock: seconds, ever growing.
        """
        self.path, self._shown_by, self._memory, self._clock = path, shown, memory, clock
        self._stage: dict[str, Any] = {"stage": None, "stage_started": None}
        self._working: list[tuple[Meter, float]] = []  # the outermost first, and when it began
        self._state: dict[str, Any] = {}  # of the last work, which an error may have ended
        self._written = float("-inf")

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """As `progress.py` has it."""
        meter = Meter(title, total, unit, self._clock)
        self._working.append((meter, time.time()))
        try:
            with self._shown_by(title, total, unit) as advance:
                self._write_if_due()

                def step(amount: int = 1, **columns: float) -> None:
                    meter.advance(amount, columns)
                    self._write_if_due()
                    advance(amount, **columns)

                yield step
        finally:
            self._state = self._work()
            self._working.pop()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._stage = {"stage": name, "stage_started": time.time()}
        self._state = {}
        self._write()

    def ended(self, why: str) -> None:
        """The run stops before its end; the file stays and says why."""
        if self._stage["stage"] is not None:
            self._write(why)

    def remove(self) -> None:
        """The run has finished."""
        self.path.unlink(missing_ok=True)

    def _work(self) -> dict[str, Any]:
        """What goes on now, the outermost work; `inside` is the innermost where there are several."""
        if not self._working:
            return self._state
        works = [
            {
                "title": meter.title,
                "done": meter.done,
                "total": meter.total,
                "unit": meter.unit,
                "started": started,
                "rate": meter.rate(),
                "left_seconds": meter.left(),
                "columns": meter.columns,
            }
            for meter, started in self._working
        ]
        return {**works[0], "inside": works[-1] if len(works) > 1 else None}

    def _write_if_due(self) -> None:
        if self._clock() - self._written >= EVERY:
            self._write()

    def _write(self, ended: str | None = None) -> None:
        how, gib = self._memory() if self._memory else (None, None)
        state = {
            **self._stage,
            **dict.fromkeys(("title", "done", "total", "unit", "started", "rate", "left_seconds")),
            "columns": {},
            "inside": None,
            **self._work(),
            "memory_gib": gib,
            "memory": how,
            "updated": time.time(),
            "ended": ended,
            **process(),
        }
        self._written = self._clock()
        write_status(self.path, state)


def write_status(path: Path, value: Any) -> None:
    """Replace a small JSON file for onlookers by a complete new one.

    It is not flushed to the drive, which would cost more than the work that it tells of, and where it cannot
    be written, as on a full drive, the run goes on without.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        text = json.dumps(_finite(value), indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        pass


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def process() -> dict[str, Any]:
    """Which process writes: `pid`, `host`, and `born`, by which a later process of that number differs."""
    return {"pid": os.getpid(), "host": platform.node(), "born": _born(os.getpid())}


def is_alive(state: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote `state` still runs; None where that cannot be known from here."""
    pid, born = state.get("pid"), state.get("born")
    if type(pid) is not int or pid <= 0 or state.get("host") != platform.node():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    now = _born(pid)
    return now != "gone" and (now is None or born is None or now == born)


def _born(pid: int) -> str | None:
    """When a process started, in its system's own count; None off Linux, "gone" for one that has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return "gone" if state in "ZX" else fields[18]
