"""How `mlx-distill watch` looks: one picture on a terminal, a line for each change elsewhere."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from mlx_distill.console import clock_time, column, five_places, work_parts
from mlx_distill.layout import STAGES
from mlx_distill.look import Look
from mlx_distill.metrics import number

Show = Callable[[Look], None]

EVERY = 10.0  # seconds between two plain lines about the same work
WIDTH = 32  # places of a curve
BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_ASIDE = ("step", "stage", "learning_rate", "gradient_norm", "tokens", "seconds")  # in a line of metrics


@contextmanager
def shown_on(stream: TextIO) -> Iterator[Show]:
    """A function that shows what a look found, and on a terminal takes the place of the one before."""
    if stream.isatty():
        from rich.console import Console as RichConsole
        from rich.live import Live

        rich = RichConsole(file=stream, highlight=False)
        if rich.is_terminal and not rich.is_dumb_terminal:
            blocks = BLOCKS if rich.encoding.lower().startswith("utf") else ASCII
            with Live(console=rich, auto_refresh=False, vertical_overflow="crop") as live:
                yield lambda look: live.update(picture(look, blocks), refresh=True)
            return
    seen = Changes()

    def show(look: Look) -> None:
        for line in seen.lines(look):
            stream.write(line + "\n")
        stream.flush()

    yield show


class Changes:
    """What has changed since the last look, in lines."""

    def __init__(self) -> None:
        self._finished: list[str] = []
        self._stage: str | None = None
        self._metrics: int | None = None  # lines that were told, here and below; None: at the first look
        self._said: int | None = None
        self._told = float("-inf")  # when a line about work was last told
        self._work: tuple[Any, Any] | None = None

    def lines(self, look: Look) -> list[str]:
        lines = []
        for name in look.stages:
            if name not in self._finished:
                took = look.times.get(name)
                lines.append(f"{name}: done" + (f" in {clock_time(took)}" if took is not None else ""))
        self._finished = list(look.stages)
        if look.state == "working" and look.stage != self._stage:
            lines.append(f"{look.stage}: begun")
            self._stage = look.stage
        # Steps that are taken again after a stop are told again; those up to the checkpoint are not.
        new = newest(look.metrics) if self._metrics is None else look.metrics[self._metrics :]
        said = look.said[-5:] if self._said is None else look.said[self._said :]
        if look.state != "finished":  # the last lines are the verdict, which is said anyway
            lines += [printable(line) for line in said]
        lines += [_metrics_line(line) for line in new]
        self._metrics, self._said = len(look.metrics), len(look.said)
        if new:
            self._told = look.now
        work = (look.progress.get("title"), look.progress.get("done"))
        if look.state == "working" and work[0] and work != self._work and look.now - self._told >= EVERY:
            lines.append("  ".join([printable(str(work[0])), *_parts(look, look.progress)]))
            self._told, self._work = look.now, work
        return lines


def newest(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last line of each stage about training, and about validation."""
    last = {(line["stage"], "loss" in line): line for line in metrics}
    return list(last.values())


def _metrics_line(line: Mapping[str, Any]) -> str:
    parts = [f"{printable(str(line['stage'])):9} step {line['step']:5}", *_columns(line)]
    return "  ".join(parts)


def _columns(line: Mapping[str, Any]) -> list[str]:
    shown = {name: x for name, x in line.items() if name not in _ASIDE and isinstance(x, int | float)}
    if "valid_nll" in line or "valid_kl" in line:
        shown = {name: value for name, value in shown.items() if name in ("valid_nll", "valid_kl")}
    return [column(printable(name), value) for name, value in shown.items()]


def _parts(look: Look, work: Mapping[str, Any]) -> list[str]:
    """How far work has come, with the time left as it is now."""
    left, rate = number(work.get("left_seconds")), number(work.get("rate"))
    updated = number(look.progress.get("updated"))
    if look.state != "working":
        left = rate = None
    elif left is not None and updated is not None:
        left = max(0.0, left - max(0.0, look.now - updated))
    columns = work.get("columns")
    numbers = (
        {str(k): v for k, v in columns.items() if number(v) is not None} if isinstance(columns, dict) else {}
    )
    done, total = (int(number(work.get(key)) or 0) for key in ("done", "total"))
    return work_parts(done, total, str(work.get("unit", "")), rate, left, numbers)


def picture(look: Look, blocks: str = BLOCKS) -> Any:
    """A run as rich draws it: stages, the work that goes on, curves of training, and what was said last."""
    from rich.console import Group
    from rich.text import Text

    memory = number(look.progress.get("memory_gib"))
    head = Text(str(look.folder), "bold", overflow="ellipsis", no_wrap=True)
    head.append(f"  {look.state}", _STYLES[look.state])
    if look.state == "working" and memory is not None:
        head.append(f"  {look.progress.get('memory')} {memory:.1f} GiB", "not bold")
    age = look.now - (number(look.progress.get("updated")) or look.now)
    if look.state == "working" and age > 60:
        head.append(f"  no word for {clock_time(age)}", style="not bold yellow")
    last = look.said[-5:] if look.state != "finished" else []  # the verdict is said below
    said = [Text(printable(line), style="dim", overflow="ellipsis", no_wrap=True) for line in last]
    parts = [head, _stages(look, blocks), *_works(look), *_curves(look, blocks)]
    return Group(*parts, *([Text("")] if said else []), *said)


_STYLES = {
    "working": "green",
    "finished": "bold green",
    "stopped": "yellow",
    "killed": "red",
    "idle": "yellow",
}


def _stages(look: Look, blocks: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    going, done, later = "▸✓·" if blocks == BLOCKS else ">+-"
    ahead = [name for name in STAGES if name not in look.stages and name != look.stage]
    for name in [name for name in STAGES if name in look.stages or name == look.stage]:
        seconds = look.seconds(name)
        going_on = name == look.stage and name not in look.stages
        mark = Text(going if going_on else done, style=_STYLES[look.state] if going_on else "green")
        result = look.stages.get(name)
        why = result.get("why") if isinstance(result, dict) else None
        note = Text(printable(str(why)) if why else "", style="dim", overflow="ellipsis", no_wrap=True)
        table.add_row(mark, Text(name), Text(clock_time(seconds) if seconds is not None else ""), note)
    if ahead and look.state != "finished":
        table.add_row(Text(later), Text("then", style="dim"), "", Text(", ".join(ahead), style="dim"))
    return table


def _works(look: Look) -> list[Any]:
    """The work that goes on, and the one inside it where there is one."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    inside = look.progress.get("inside")
    works = [work for work in (look.progress, inside) if isinstance(work, dict) and work.get("title")]
    if look.state == "finished" or not works:
        return []
    table = Table.grid(padding=(0, 2, 0, 0))
    for work in works:
        done, total = (number(work.get(key)) or 0.0 for key in ("done", "total"))
        bar = ProgressBar(total=total or 1.0, completed=min(done, total), width=24)
        numbers = Text("  ".join(_parts(look, work)), overflow="ellipsis", no_wrap=True)
        table.add_row(Text(printable(str(work["title"]))), bar, numbers)
    return [Text(""), table]


def _curves(look: Look, blocks: str) -> list[Any]:
    """Of each training stage: the newest numbers, and how loss and validation went."""
    from rich.table import Table
    from rich.text import Text

    if not look.metrics:
        return []
    table = Table.grid(padding=(0, 2, 0, 0))
    for stage in dict.fromkeys(str(line["stage"]) for line in look.metrics):
        lines = [line for line in look.metrics if line["stage"] == stage]
        speed = next((x for x in map(_speed, reversed(lines)) if x is not None), None)
        head = f"{printable(stage)} step {lines[-1]['step']}"
        for name in ("loss", "valid_nll", "valid_kl"):
            points = {line["step"]: number(line.get(name)) for line in lines}
            values = [value for value in points.values() if value is not None]
            if not values:
                continue
            before = f"from {five_places(values[0])}, lowest {five_places(min(values))}"
            rate = f"  tok/s {speed:.0f}" if name == "loss" and speed is not None else ""
            cells = (head, name, five_places(values[-1]), curve(values, blocks), before + rate)
            table.add_row(*(Text(cell, overflow="ellipsis", no_wrap=True) for cell in cells))
            head = ""
    return [Text(""), table]


def _speed(line: Mapping[str, Any]) -> float | None:
    return number(line.get("tokens_per_second"))


def curve(values: Sequence[float], blocks: str = BLOCKS, width: int = WIDTH) -> str:
    """Values as heights of `width` characters at most, each the mean of its share of them."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def printable(line: str) -> str:
    """The line without characters that would move the cursor or ring a bell."""
    return "".join(letter if letter.isprintable() else " " for letter in line)
