"""`mlx-distill chat`: a model answers, in turns, as its text comes.

Answers go to stdout, everything else to stderr, so that a pipe gets the text alone.
"""

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.interrupt import Interrupted, Interrupts
from mlx_distill.speaker import Said, Speaker
from mlx_distill.speech import Speech
from mlx_distill.spelling import printable

HELP = """\
/reset          a new chat
/system TEXT    a new chat that opens with this message; without TEXT, with none
/exit           the end, as Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""


class Screen:
    """Where answers and notes go."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None):
        """
        Args:
            out: for answers; None: stdout. err: for notes; None: stderr.
        """
        from rich.console import Console

        self.out = sys.stdout if out is None else out
        reconfigure: Any = getattr(self.out, "reconfigure", None)
        if reconfigure is not None:  # an answer may hold what the terminal has no letters for
            reconfigure(errors="replace")
        self._notes = Console(file=err, stderr=True, highlight=False)

    def write(self, text: str) -> None:
        """Show a piece of an answer at once, whatever the model wrote in it."""
        self.out.write(printable(text))
        self.out.flush()

    def note(self, line: str) -> None:
        """A line that is no part of an answer, in faint letters where there are such."""
        from rich.text import Text

        self._notes.print(Text(printable(line), style="dim"), soft_wrap=True)

    def wake(self, *speakers: Speaker) -> None:
        """Read the weights of models, and say so meanwhile on a terminal."""
        from rich.text import Text

        for speaker in speakers:
            with self._notes.status(Text(f"{speaker.name}: reading its weights")):
                speaker.wake()


class Conversation:
    """The turns of a chat; a model without a chat template has none, and each text stands alone."""

    def __init__(self, speaker: Speaker):
        self.speaker, self.system = speaker, speaker.options.system
        self.turns: list[dict[str, Any]] = []

    def encode(self, text: str, origin: str) -> list[int]:
        """What the model is given when this is asked next."""
        if not self.speaker.chats:
            return self.speaker.encode(Row(prompt=text, origin=origin))
        asked = (*self.turns, {"role": "user", "content": text})
        return self.speaker.encode(Row(messages=asked, origin=origin), self.system)

    def ask(self, text: str, origin: str, show: Callable[[str], None], **how: Callable[[], bool]) -> Said:
        """Let the model answer; both become turns, unless it was stopped before it said a word."""
        said = self.speaker.answer(self.encode(text, origin), show, **how)
        if self.speaker.chats and (said.text or said.end != "stopped"):
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": said.text}]
        return said

    def reset(self) -> None:
        self.turns.clear()


def chat(name: str, options: Speech, prompts: Sequence[str] = (), screen: Screen | None = None) -> None:
    """Answer `prompts`, which are turns of one chat; without any, what stdin says.

    A terminal is asked line by line; of anything else the whole text is one prompt.

    Raises:
        DistillError: no such model, or a prompt that it cannot be asked.
    """
    asked = [("--prompt", checked(text, "--prompt")) for text in prompts]
    if not asked and not sys.stdin.isatty():
        asked = [("stdin", checked(_read_stdin(), "stdin"))]
    screen = screen or Screen()
    talk = Conversation(Speaker(name, options))
    if not asked:
        _interact(talk, screen)
        return
    for origin, text in asked:
        talk.encode(text, origin)  # each alone: what is too long already is told before a weight is read
    screen.wake(talk.speaker)
    for origin, text in asked:
        said = talk.ask(text, origin, screen.write)
        _end_line(said, screen)
        screen.note(said.told())


def checked(text: str, origin: str) -> str:
    """A prompt that a tokenizer can read.

    Raises:
        DataError: nothing in it, or bytes that were no UTF-8.
    """
    if not text.strip():
        raise DataError(f"{origin}: empty; there is nothing to answer")
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()  # as LC_ALL=C takes the bytes of a letter one by one
        except UnicodeError:
            raise DataError(f"{origin}: not readable as UTF-8") from None
    return text


def _read_stdin() -> str:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # as files are, whatever the locale is
    try:
        return sys.stdin.read().removesuffix("\n")  # with which every text file ends
    except UnicodeDecodeError:
        raise DataError("stdin: not readable as UTF-8") from None


def _interact(talk: Conversation, screen: Screen) -> None:
    """Ask a terminal for one prompt after the other, until it has no more."""
    screen.wake(talk.speaker)
    how = "answers" if talk.speaker.chats else "goes on with each text; it has no chat template"
    if talk.speaker.options.raw:
        how = "goes on with each text"
    screen.note(f"{talk.speaker.name} {how}. /help says more, Ctrl-D ends.")
    while (text := _line(screen)) is not None:
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text.strip(), flags=re.DOTALL)
        if command is not None and command[1] == "exit":
            return
        try:
            if command is not None:
                _obey(command[1], command[2], talk, screen)
            elif text.strip():
                _turn(checked(text, "your text"), talk, screen)
        except DataError as error:
            screen.note(f"error: {error}" + ("; /reset begins a new chat" if talk.turns else ""))


def _turn(text: str, talk: Conversation, screen: Screen) -> None:
    """One answer. The first Ctrl-C ends it, a second one the program."""
    interrupts = Interrupts()
    with interrupts.caught(), interrupts.deferred():
        said = talk.ask(text, "your text", screen.write, stopped=lambda: interrupts.number is not None)
    if interrupts.number not in (None, signal.SIGINT):
        interrupts.check()
    _end_line(said, screen)
    screen.note(said.told())


def _obey(command: str, text: str | None, talk: Conversation, screen: Screen) -> None:
    if command == "reset":
        talk.reset()
        screen.note("a new chat")
    elif command == "system" and talk.speaker.chats:
        talk.speaker.encode(Row(prompt="?", origin="/system"), text)  # some templates refuse one
        talk.system = text
        talk.reset()
        screen.note("a new chat, with this message" if text else "a new chat, without a system message")
    elif command == "system":
        screen.note("there is no chat template, and so no system message")
    else:
        screen.note(HELP if command == "help" else f"no command /{command}\n{HELP}")


def _line(screen: Screen) -> str | None:
    """The next prompt from the terminal; None at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history, and keys that move
    lines, mark = list[str](), "> "
    while True:
        try:
            if not screen.out.isatty():  # the answers go to a file, and so would the mark
                screen.note(mark)
                mark = ""
            lines.append(input(mark))
        except EOFError:
            screen.note("")
            return None
        except Interrupted:
            screen.note("")
            raise
        if not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1], mark = lines[-1][:-1], ". "


def _end_line(said: Said, screen: Screen) -> None:
    if not said.text.endswith("\n"):
        screen.write("\n")
