"""A stream that may go away: a closed terminal, or the end of a pipe, is no reason to stop a night's work."""

import contextlib
import os
from typing import Any, TextIO


class Lasting:
    """A text stream whose failures are nobody's: after the first one what is written goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                self._stream.write(text)
            except OSError:
                self._leave()
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except OSError:
                self._leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _leave(self) -> None:
        self._gone = True
        # What is still in the stream's buffer, which Python writes at its end, goes nowhere too.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
