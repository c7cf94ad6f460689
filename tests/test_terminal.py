"""A terminal that goes away does not take the run along."""

import io
import os

import pytest

from mlx_distill.console import Console
from mlx_distill.terminal import Lasting


class Closed(io.StringIO):
    """A terminal that is closed after some writes."""

    def __init__(self, writes: int):
        super().__init__()
        self.left = writes

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("writes", [0, 2])
def test_lines_go_nowhere_and_are_still_recorded(writes: int) -> None:
    stream, recorded = Closed(writes), list[str]()
    console = Console(stream)
    console.record = recorded.append
    for number in range(4):
        console.say(f"line {number}")
    assert stream.getvalue().splitlines() == [f"line {number}" for number in range(writes)]
    assert len(recorded) == 4


def test_a_pipe_without_a_reader_is_left_alone() -> None:
    """And what Python still has in its buffer is no error at the end either."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        stream = Lasting(pipe)
        for _ in range(3):
            print("x" * 10, file=stream)
            stream.flush()
    with pytest.raises(ValueError, match="closed"):
        pipe.write("")


def test_other_mistakes_are_seen() -> None:
    with pytest.raises(TypeError):
        Lasting(io.StringIO()).write(1)  # type: ignore[arg-type]
    assert not Lasting(io.StringIO()).isatty()
