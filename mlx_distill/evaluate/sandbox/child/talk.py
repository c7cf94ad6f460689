"""Lines of JSON over a pipe."""

import json
import os
from typing import Any


def write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def write_line(descriptor: int, message: Any) -> None:
    write(descriptor, json.dumps(message).encode() + b"\n")


class Lines:
    """What comes from the other end, line by line, each of at most so many bytes."""

    def __init__(self, descriptor: int, longest: int):
        self.descriptor, self.longest = descriptor, longest
        self.received = b""

    def next(self) -> bytes | None:
        """A line without its end, None where there is none to come.

        Raises:
            OverflowError: it is too long.
        """
        pieces, size = [self.received], len(self.received)
        while b"\n" not in pieces[-1]:
            if size > self.longest:
                raise OverflowError
            piece = os.read(self.descriptor, 1 << 16)
            if not piece:
                return None
            pieces.append(piece)
            size += len(piece)
        line, self.received = b"".join(pieces).split(b"\n", 1)
        return line


def describe(error: BaseException) -> str:
    """The error in one line."""
    try:
        words = " ".join(str(error).split())[:200]
    except BaseException:  # `__str__` is the program's own
        words = ""
    return type(error).__name__ + (f": {words}" if words else "")
