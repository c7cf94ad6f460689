"""stdin, stdout and stderr: there, fit for every letter, and left in peace by those who read no further."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def prepare() -> None:
    """Open what of the three is closed, and let stdout write `\\u2192` where its encoding has no arrow.

    The number of a closed one would go to the next file that is opened: MLX can read no file 0, and what a
    library prints to 1 or 2 would stand in a file of the run.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python has it for stderr


@contextmanager
def left_quietly() -> Iterator[None]:
    """Where the program behind a pipe wants no more, as `| head`: the shell's code for it, and no word."""
    try:
        yield
    except SystemExit as ended:
        broken = isinstance(ended.__context__, BrokenPipeError)  # of which typer makes a plain 1
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            broken = True
        if not broken:
            raise
        leave()
        sys.exit(128 + signal.SIGPIPE)


def leave() -> None:
    """What is still in stdout's buffer, which Python writes at its end, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
