"""stdin, stdout and stderr that are closed, left, or without a letter for what is said."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import workshop
from workshop import command

from mlx_distill import chat


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["recipes"], ["--help"]])
def test_a_reader_that_wants_no_more_is_no_fault(arguments: list[str], unbuffered: str) -> None:
    """Not code 1, a fault of ours, nor 120 with words about a broken pipe, as Python has it."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_distill", *arguments],
            cwd=workshop.REPOSITORY,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=nobody,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_are_opened_before_a_file_takes_their_numbers(tmp_path: Path) -> None:
    """MLX reads nothing from file 0, and a print into file 1 would go into weights."""
    program = """
import os, sys
from mlx_distill.cli import streams
streams.prepare()
with open("file", "w") as file:
    print(file.fileno(), sys.stdin.read() == "", os.system("echo child"), file=file)
    print("said")
    os.write(1, b"by a library")
    os.write(2, b"too")
"""
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    environment = {**os.environ, "PYTHONPATH": str(workshop.REPOSITORY)}
    subprocess.run([*closing, sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    number, rest = (tmp_path / "file").read_text(encoding="utf-8").split(" ", 1)
    assert int(number) > 2 and rest == "True 0\n"


def test_a_usage_error_without_stderr_is_code_2() -> None:
    closing = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh"]
    done = subprocess.run(
        [*closing, sys.executable, "-m", "mlx_distill", "rum"],
        cwd=workshop.REPOSITORY,
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout) == (2, b"")


def test_letters_that_stdout_lacks_are_written_as_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with PYTHONIOENCODING=ascii, where a verdict has its ± and the end of a run would be a traceback."""
    monkeypatch.setattr("mlx_distill.bundled.list_recipes", lambda: [("mine", "1 ± 2")])
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert command(tmp_path, capsys, "recipes").code == 0
    assert written.getvalue().split() == [b"mine", b"1", rb"\xb1", b"2"]


def test_prompts_are_utf_8_whatever_the_locale_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("né\n".encode()), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert chat._read_stdin() == "né"
    assert chat.checked("n\udcc3\udca9", "--prompt") == "né"  # what LC_ALL=C makes of an argument
