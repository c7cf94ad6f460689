"""What a user sees while a run works: progress bars, plain lines, and the line of a training step.

On a terminal work that lasts longer than two seconds gets a bar. Elsewhere (a log file, a pipe) it gets a
plain line every ten seconds. Both end in the same closing line. Everything goes to stdout, so that
`mlx-distill run recipe.yaml > log` keeps it; errors are the command line's.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from mlx_distill.progress import Advance

QUIET = 2.0  # seconds that work may last without a word
EVERY = 10.0  # seconds between two plain lines of the same work

# Columns that are no plain `name value`: name -> (before, format, after).
_COLUMNS = {
    "tok/s": ("tok/s ", "{:.0f}", ""),
    "tokens_per_second": ("tok/s ", "{:.0f}", ""),
    "peak": ("peak ", "{:.1f}", " GiB"),
    "peak_memory_gib": ("peak ", "{:.1f}", " GiB"),
    "learning_rate": ("learning_rate ", "{:.1e}", ""),
    "unfinished": ("unfinished ", "{:.0f}", ""),
}


def step_line(step: int, steps: int, values: Mapping[str, float], left: float | None = None) -> str:
    """The console line of a training step, in columns that keep their places from step to step.

    Args:
        values: name -> value, in the order of the columns.
        left: seconds to the end; None leaves the column out.
    """
    parts = [f"step {step:>{max(5, len(str(steps)))}}/{steps}"]
    parts += [_column(name, value) for name, value in values.items()]
    if left is not None:
        parts.append(f"left {clock_time(left)}")
    return "  ".join(parts)


def clock_time(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    whole = max(0, round(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Console:
    """Prints lines and draws bars that do not garble each other."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        """
        Args:
            stream: where to print; None: stdout.
            clock: seconds, ever growing.
        """
        self._stream = stream or sys.stdout
        self._clock = clock
        self._bars: _Bars | None = None
        self._said = float("-inf")  # when the last line was printed

    def say(self, line: str) -> None:
        """Print a line, above the bars where there are any."""
        self._said = self._clock()
        if self._bars:
            self._bars.say(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def step(self, line: str) -> None:
        """Print the line of a training step, as `step_line` makes it."""
        self.say(line)

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """Show how far work has come; see `progress.py` for how library code calls this."""
        meter = _Meter(title, total, unit, self._clock)
        with self._shown(meter) as shown:

            def advance(amount: int = 1, **columns: float) -> None:
                meter.done += amount
                meter.columns.update(columns)
                if not shown and meter.due(self._said):
                    self.say(meter.line())

            yield advance
        # Not in a `finally`: work that an error ended has no closing line.
        if meter.elapsed() > QUIET:
            self.say(meter.closing_line())

    @contextmanager
    def _shown(self, meter: "_Meter") -> Iterator[bool]:
        """True where a bar shows the meter; bars of nested work stand below each other."""
        if self._bars is None:
            bars = _Bars(self._stream) if self._stream.isatty() else None
            if bars is None or not bars.works:
                yield False
                return
            self._bars = bars
        bars = self._bars
        bars.add(meter)
        try:
            yield True
        finally:
            if not bars.remove(meter):
                self._bars = None


class _Meter:
    """One piece of work: how far it is, how fast, how long still."""

    def __init__(self, title: str, total: int, unit: str, clock: Callable[[], float]):
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.columns: dict[str, float] = {}
        self._clock = clock
        self._start = self._last = clock()

    def elapsed(self) -> float:
        return self._clock() - self._start

    def due(self, said: float) -> bool:
        """Whether a plain line is due, the last line of any kind having been `said` then.

        Asking counts as printing it.
        """
        now = self._clock()
        if now - max(self._last, said) < EVERY:
            return False
        self._last = now
        return True

    def rate(self) -> str:
        elapsed = self.elapsed()
        if elapsed <= 0:
            return ""
        rate = self.done / elapsed
        return f"{rate:.{0 if rate >= 1000 else 1 if rate >= 10 else 2}f} {self.unit}/s"

    def left(self) -> str:
        """Time left at the speed so far; nothing before the first advance."""
        if not self.done or self.done > self.total:
            return ""
        return f"left {clock_time(self.elapsed() * (self.total - self.done) / self.done)}"

    def parts(self) -> list[str]:
        """What stands behind the title; a narrow terminal cuts off the end."""
        width = len(str(self.total))
        share = f"{self.done / self.total:4.0%}" if self.total else ""
        columns = [_column(name, value) for name, value in self.columns.items()]
        parts = [f"{self.done:>{width}}/{self.total} {self.unit}", share, self.rate(), self.left(), *columns]
        return [part for part in parts if part]

    def line(self) -> str:
        return "  ".join([self.title, *self.parts()])

    def closing_line(self) -> str:
        columns = [_column(name, value) for name, value in self.columns.items()]
        took = f"in {clock_time(self.elapsed())}"
        return "  ".join([self.title, f"{self.done} {self.unit}", *columns, self.rate(), took])


class _Bars:
    """The bars at the foot of a terminal, redrawn by rich four times a second."""

    def __init__(self, stream: TextIO):
        # Here, not above: rich takes a tenth of a second to import, and `--help` has half a second.
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._rich = RichConsole(file=stream, highlight=False)
        self.works = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._meters: list[_Meter] = []
        # Transient: what stays behind is the closing line, not a bar.
        self._live = Live(get_renderable=self._draw, console=self._rich, refresh_per_second=4, transient=True)

    def add(self, meter: _Meter) -> None:
        self._meters.append(meter)
        if len(self._meters) == 1:
            self._live.start()

    def remove(self, meter: _Meter) -> bool:
        """Whether bars remain; without any, the terminal is as it was before."""
        self._meters.remove(meter)
        if not self._meters:
            self._live.stop()
        return bool(self._meters)

    def say(self, line: str) -> None:
        self._rich.print(line, markup=False, emoji=False, soft_wrap=True)

    def _draw(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = 24 if self._rich.width >= 110 else 10
        table = Table.grid(padding=(0, 2, 0, 0))
        for meter in [meter for meter in self._meters if meter.elapsed() > QUIET]:
            bar = ProgressBar(total=meter.total or 1, completed=min(meter.done, meter.total), width=width)
            numbers = Text("  ".join(meter.parts()), overflow="ellipsis", no_wrap=True)
            table.add_row(Text(meter.title), bar, numbers)
        return table if table.rows else Text("", end="")


def _column(name: str, value: float) -> str:
    before, form, after = _COLUMNS.get(name, (f"{name} ", "", ""))
    return before + (form.format(value) if form else _five_places(value)) + after


def _five_places(value: float) -> str:
    """A number in five characters (0.412, 12.35, 113.0, 2113), so that columns keep their places."""
    size = abs(value)
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    digits = 3 if size < 9.9995 else 2 if size < 99.995 else 1 if size < 999.95 else 0
    return f"{value:.{digits}f}"
