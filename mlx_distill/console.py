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

from mlx_distill.progress import Advance, Meter
from mlx_distill.terminal import Lasting

QUIET = 2.0  # seconds that work may last without a word
EVERY = 10.0  # seconds between two plain lines of the same work

# Columns that are no plain `name value`: name -> (before, format, after).
_COLUMNS = {
    "tok/s": ("tok/s ", "{:.0f}", ""),
    "tokens_per_second": ("tok/s ", "{:.0f}", ""),
    "peak": ("peak ", "{:.1f}", " GiB"),
    "peak_memory_gib": ("peak ", "{:.1f}", " GiB"),
    "memory": ("memory ", "{:.1f}", " GiB"),
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
    parts += [column(name, value) for name, value in values.items()]
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
            stream: where to print; None: stdout. Where it goes away, nobody is told any more.
            clock: seconds, ever growing.
        """
        self._stream: Any = Lasting(stream or sys.stdout)
        self._clock = clock
        self._bars: _Bars | None = None
        self.record: Callable[[str], None] | None = None  # also gets each line that is no step's
        self._said = float("-inf")  # when the last line was printed

    def say(self, line: str) -> None:
        """Print a line, above the bars where there are any."""
        if self.record is not None:
            self.record(line)
        self._print(line)

    def _print(self, line: str) -> None:
        self._said = self._clock()
        if self._bars:
            self._bars.say(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def step(self, line: str) -> None:
        """Print the line of a training step, as `step_line` makes it; metrics.jsonl records it."""
        self._print(line)

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """Show how far work has come; see `progress.py` for how library code calls this."""
        meter = _Line(title, total, unit, self._clock)
        with self._shown(meter) as shown:

            def advance(amount: int = 1, **columns: float) -> None:
                meter.advance(amount, columns)
                if not shown and meter.due(self._said):
                    self._print(meter.line())

            yield advance
        # Not in a `finally`: work that an error ended has no closing line.
        if meter.elapsed() > QUIET:
            self.say(meter.closing_line())

    @contextmanager
    def _shown(self, meter: "_Line") -> Iterator[bool]:
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


class _Line(Meter):
    """A piece of work in words."""

    def __init__(self, title: str, total: int, unit: str, clock: Callable[[], float]):
        super().__init__(title, total, unit, clock)
        self._last = self._start

    def due(self, said: float) -> bool:
        """Whether a plain line is due, the last line of any kind having been `said` then.

        Asking counts as printing it.
        """
        now = self._clock()
        if now - max(self._last, said) < EVERY:
            return False
        self._last = now
        return True

    def parts(self) -> list[str]:
        """What stands behind the title; a narrow terminal cuts off the end."""
        return work_parts(self.done, self.total, self.unit, self.rate(), self.left(), self.columns)

    def line(self) -> str:
        return "  ".join([self.title, *self.parts()])

    def closing_line(self) -> str:
        columns = [column(name, value) for name, value in self.columns.items()]
        took = f"in {clock_time(self.elapsed())}"
        parts = [self.title, f"{self.done} {self.unit}", *columns, rate_text(self.rate(), self.unit), took]
        return "  ".join(part for part in parts if part)


def work_parts(
    done: int,
    total: int,
    unit: str,
    rate: float | None,
    left: float | None,
    columns: Mapping[str, float],
) -> list[str]:
    """How far work has come, in words: "350/1200 rows", " 29%", "34.1 rows/s", "left 00:00:25", columns.

    Args:
        rate: units a second. left: seconds.
    """
    share = f"{done / total:4.0%}" if total else ""
    remaining = "" if left is None else f"left {clock_time(left)}"
    shown = [column(name, value) for name, value in columns.items()]
    parts = [f"{done:>{len(str(total))}}/{total} {unit}", share, rate_text(rate, unit), remaining, *shown]
    return [part for part in parts if part]


def rate_text(rate: float | None, unit: str) -> str:
    if rate is None:
        return ""
    return f"{rate:.{0 if rate >= 1000 else 1 if rate >= 10 else 2}f} {unit}/s"


class _Bars:
    """The bars at the foot of a terminal, redrawn by rich four times a second."""

    def __init__(self, stream: Any):
        # Here, not above: rich takes a tenth of a second to import, and `--help` has half a second.
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._rich = RichConsole(file=stream, highlight=False)
        self.works = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._meters: list[_Line] = []
        # Transient: what stays behind is the closing line, not a bar.
        self._live = Live(get_renderable=self._draw, console=self._rich, refresh_per_second=4, transient=True)

    def add(self, meter: _Line) -> None:
        self._meters.append(meter)
        if len(self._meters) == 1:
            self._live.start()

    def remove(self, meter: _Line) -> bool:
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


def column(name: str, value: float) -> str:
    """A number with its name, as a console line has it."""
    before, form, after = _COLUMNS.get(name, (f"{name} ", "", ""))
    return before + (form.format(value) if form else five_places(value)) + after


def five_places(value: float) -> str:
    """A number in five characters (0.412, 12.35, 113.0, 2113), so that columns keep their places."""
    size = abs(value)
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    digits = 3 if size < 9.9995 else 2 if size < 99.995 else 1 if size < 999.95 else 0
    return f"{value:.{digits}f}"
