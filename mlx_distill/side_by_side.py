"""What `mlx-distill compare` shows: in columns on a wide terminal, else one answer below the other."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from mlx_distill.chat import Screen
from mlx_distill.data.rows import Row
from mlx_distill.differences import Difference
from mlx_distill.speaker import Said
from mlx_distill.spelling import printable

NARROWEST = 36  # letters of a column


class View(Protocol):
    """Shows the answers to one prompt after the other."""

    def prompt(self, place: int, row: Row) -> AbstractContextManager[None]:
        """While it is open, the answers to this prompt come."""
        ...

    def piece(self, model: int, text: str) -> None:
        """More of the answer of a model, by its number."""
        ...

    def answered(self, model: int, said: Said, difference: Difference | None) -> None:
        """The answer is complete; the first model's differs from nothing."""
        ...


def view(screen: Screen, names: Sequence[str], prompts: int) -> View:
    """Columns where the terminal has room for them."""
    from rich.console import Console

    console = Console(file=screen.out, highlight=False)
    wide = console.is_terminal and not console.is_dumb_terminal and console.width >= NARROWEST * len(names)
    return Columns(console, names, prompts) if wide else Stacked(screen, names, prompts)


class Stacked:
    """Plain text, as it comes."""

    def __init__(self, screen: Screen, names: Sequence[str], prompts: int):
        self._write, self._names, self._prompts = screen.write, names, prompts
        self._begun: int | None = None  # the model whose answer has begun

    @contextmanager
    def prompt(self, place: int, row: Row) -> Iterator[None]:
        self._write(asked(place, self._prompts, row) + "\n")
        yield
        self._write("\n")

    def piece(self, model: int, text: str) -> None:
        if self._begun != model:
            self._write(f"\n== {self._names[model]}\n")
            self._begun = model
        self._write(text)

    def answered(self, model: int, said: Said, difference: Difference | None) -> None:
        start = "" if said.text.endswith("\n") else "\n"
        self._write(f"{start}-- {'; '.join(footer(said, difference))}\n")
        self._begun = None


class Columns:
    """A column a model; while answers come, as much of their ends as the terminal is high."""

    def __init__(self, console: Any, names: Sequence[str], prompts: int):
        self._console, self._names, self._prompts = console, names, prompts
        self._texts: list[str] = []
        self._feet: list[str] = []
        self._parts: list[int | None] = []  # where a text leaves the first one

    @contextmanager
    def prompt(self, place: int, row: Row) -> Iterator[None]:
        from rich.live import Live
        from rich.text import Text

        count = len(self._names)
        self._texts, self._feet, self._parts = [""] * count, [""] * count, [None] * count
        self._console.print(Text(printable(asked(place, self._prompts, row)), style="bold"))
        with Live(get_renderable=self._ends, console=self._console, refresh_per_second=8, transient=True):
            yield
        self._console.print(self._table(None))

    def piece(self, model: int, text: str) -> None:
        self._texts[model] += printable(text)

    def answered(self, model: int, said: Said, difference: Difference | None) -> None:
        self._feet[model] = "\n".join(footer(said, difference))
        if difference is not None and difference.character is not None:
            self._parts[model] = len(printable(said.text[: difference.character]))

    def _ends(self) -> Any:
        return self._table(max(1, self._console.height - 8))

    def _table(self, most: int | None) -> Any:
        """All answers, or the last `most` lines of each."""
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        count = len(self._names)
        width = (self._console.width - count - 1) // count - 2  # less lines between, and a space on each side
        table = Table(box=SIMPLE, show_footer=True, padding=(0, 1), footer_style="")
        cells = []
        for name, text, foot, part in zip(self._names, self._texts, self._feet, self._parts, strict=True):
            table.add_column(Text(printable(name)), Text(printable(foot), style="dim"), width=width)
            cell = Text(text)
            if part is not None:
                cell.stylize("yellow", part)
            lines = cell.wrap(self._console, width)
            cells.append(Text("\n").join(lines[-most:] if most else lines))
        table.add_row(*cells)
        return table


def asked(place: int, prompts: int, row: Row) -> str:
    """The prompt, and the answer that the data gives, if it gives one."""
    number = f"prompt {place + 1} of {prompts}: " if prompts > 1 else "prompt: "
    reference = row.answer() or next(iter(row.references), None)
    return number + row.question() + (f"\nreference: {reference}" if reference is not None else "")


def footer(said: Said, difference: Difference | None) -> list[str]:
    """What is told of an answer, below it."""
    return [said.told()] if difference is None else [said.told(), difference.told]
