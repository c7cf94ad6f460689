"""What the console prints, with a clock that the tests move."""

import io
import re
import subprocess
import sys

import pytest

from mlx_distill.console import Console, clock_time, step_line


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain(clock: Clock) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, clock), stream


def test_the_line_of_a_step_is_the_one_of_the_style_guide():
    values = {"forward_kl": 0.412, "cross_entropy": 1.874, "tok/s": 2113, "peak": 11.4}
    assert step_line(100, 1000, values, 890) == (
        "step   100/1000  forward_kl 0.412  cross_entropy 1.874  tok/s 2113  peak 11.4 GiB  left 00:14:50"
    )


def test_columns_keep_their_places_while_numbers_shrink():
    lines = [
        step_line(step, 1000, {"forward_kl": loss, "cross_entropy": loss / 2, "peak": 1.25}, 60)
        for step, loss in ((1, 123.45), (20, 9.9997), (300, 0.4), (1000, 0.0051))
    ]
    assert len({tuple(match.start() for match in re.finditer(r"  \S", line[12:])) for line in lines}) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (2.5e-5, "2.5e-05"), (0.0, "0.000")]
)
def test_odd_numbers_are_shown_as_they_are(value: float, text: str):
    assert step_line(1, 2, {"loss": value}).endswith(f"loss {text}")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00"), (59.6, "00:01:00"), (890, "00:14:50"), (360_000, "100:00:00")]
)
def test_clock_time(seconds: float, text: str):
    assert clock_time(seconds) == text


def test_short_work_is_silent(clock: Clock):
    console, stream = plain(clock)
    with console.progress("reading", 10, "rows") as advance:
        for _ in range(10):
            clock.now += 0.19
            advance()
    assert stream.getvalue() == ""


def test_a_log_gets_a_line_every_ten_seconds_and_a_closing_one(clock: Clock):
    console, stream = plain(clock)
    with console.progress("teacher answers", 1200, "rows") as advance:
        for _ in range(120):
            clock.now += 0.29325
            advance(10, tokens_per_second=812.3)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "teacher answers   350/1200 rows   29%  34.1 rows/s  left 00:00:25  tok/s 812"
    assert lines[-1] == "teacher answers  1200 rows  tok/s 812  34.1 rows/s  in 00:00:35"
    assert len(lines) == 4


def test_work_that_fails_has_no_closing_line(clock: Clock):
    console, stream = plain(clock)
    with pytest.raises(KeyError), console.progress("reading", 10, "rows"):  # noqa: PT012
        clock.now += 5
        raise KeyError("row")
    assert stream.getvalue() == ""


def test_nothing_to_do_and_more_done_than_said_are_no_trouble(clock: Clock):
    console, stream = plain(clock)
    for total in (0, 2):
        with console.progress("odd", total, "rows") as advance:
            for _ in range(3):
                clock.now += 11
                advance()
    assert stream.getvalue().count("odd  3 rows") == 2


def test_a_terminal_shows_a_bar_then_keeps_the_closing_line(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    console = Console(stream, clock)
    with console.progress("fidelity", 100, "rows") as advance:
        advance(10)
        clock.now += 1.5
        console._bars._live.refresh()  # pyright: ignore[reportOptionalMemberAccess]
        assert "fidelity" not in stream.getvalue()
        clock.now += 1.0
        console._bars._live.refresh()  # pyright: ignore[reportOptionalMemberAccess]
        drawn = stream.getvalue()
        console.say("[bold]half[/bold] a word: 3 %")
        with console.progress("inner", 3, "rows"):
            pass
    assert "━" in drawn and "10/100 rows" in drawn and "left 00:00:22" in drawn
    # What stays on the screen: of each line, that which comes after it was last erased.
    left = [line.rpartition("\x1b[2K")[2] for line in stream.getvalue().split("\n")]
    said = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in left]
    assert "[bold]half[/bold] a word: 3 %" in said  # a line of its own, and no markup
    assert said[-2].startswith("fidelity  10 rows  4.00 rows/s  in 00:00:02")
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")  # cursor is back


def test_the_cursor_is_back_after_a_failure(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    console = Console(stream, clock)
    with pytest.raises(KeyboardInterrupt), console.progress("a", 2, "rows"), console.progress("b", 2, "rows"):
        raise KeyboardInterrupt
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0
    console.say("still here")
    assert stream.getvalue().endswith("still here\n")


def test_a_dumb_terminal_gets_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(stream, clock).progress("reading", 2, "rows") as advance:
        clock.now += 11
        advance()
    assert stream.getvalue().startswith("reading  1/2 rows   50%")
    assert "\x1b" not in stream.getvalue()


def test_rich_is_not_imported_before_a_bar_is_drawn():
    code = "import sys, mlx_distill.console as c; c.Console().say('x'); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_columns_stand_in_the_order_in_which_they_were_last_given(clock: Clock):
    """The bar of a training stage knows no loss before the first line of metrics."""
    console, stream = plain(clock)
    with console.progress("student", 100, "steps") as advance:
        advance(1, memory=1.25)
        clock.now += 10
        advance(9, loss=0.412, memory=1.35)
    assert "left 00:01:30  loss 0.412  memory 1.4 GiB" in stream.getvalue()


def test_what_is_said_is_recorded_and_steps_are_not(clock: Clock):
    console, _ = plain(clock)
    lines: list[str] = []
    console.record = lines.append
    console.say("a warning")
    console.step("student   step     1/4  loss 0.5")
    with console.progress("reading", 30, "rows") as advance:
        for _ in range(3):
            clock.now += 11
            advance(10)
    assert lines == ["a warning", "reading  30 rows  0.91 rows/s  in 00:00:33"]
