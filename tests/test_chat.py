"""Talking to a model: through pipes, at a terminal, and with all that can be wrong."""

import builtins
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import talkers
import workshop
from workshop import command

from mlx_distill import chat as chat_module
from mlx_distill.chat import Conversation, Screen, chat, checked
from mlx_distill.errors import DataError
from mlx_distill.interrupt import Interrupted
from mlx_distill.speaker import Said, Speaker
from mlx_distill.speech import Speech

DOCSTRING = "Keep the numbers above 4, multiply each number by 3, then sum the numbers."
ASKED = f'def solve(numbers):\n    """{DOCSTRING}"""\n'
ANSWER = """\
    numbers = [x for x in numbers if x > 4]
    numbers = [x * 3 for x in numbers]
    return sum(numbers)
"""  # by the embedded teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.make(tmp_path_factory.mktemp("talkers"))


def screen() -> tuple[Screen, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Screen(out, err), out, err


def test_the_embedded_teacher_answers_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = command(folder, capsys, "chat", "embedded", "--prompt", ASKED)
    assert ended.code == 0
    assert ended.out == ANSWER
    [note] = ended.err
    assert " tokens, the first after " in note
    assert note.endswith(" tokens/s")


def test_stdin_is_one_prompt(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(ASKED + "\n"))
    ended = command(folder, capsys, "chat", "embedded")
    assert (ended.code, ended.out) == (0, ANSWER)


def test_a_run_is_its_student(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(folder / "plain", run / "models" / "student")
    (run / "fingerprint").write_text("0\n", encoding="utf-8")
    ask = ("--prompt", "def", "--max-tokens", "9", "--temperature", "0.9", "--min-p", "0.1", "--seed", "4")
    by_run = command(tmp_path, capsys, "chat", "mine", *ask)
    by_folder = command(folder, capsys, "chat", "plain", *ask)
    assert (by_run.code, by_run.out) == (0, by_folder.out)
    assert command(folder, capsys, "chat", "plain", *ask).out == by_folder.out
    assert command(folder, capsys, "chat", "plain", *ask[:-1], "5").out != by_folder.out


def test_several_prompts_are_turns_of_one_chat(folder: Path) -> None:
    def ask(*prompts: str) -> str:
        to, out, _ = screen()
        chat(str(folder / "chatty"), Speech(max_tokens=8), prompts, to)
        return out.getvalue()

    both, first, second = ask("def add", "jump"), ask("def add"), ask("jump")
    assert both.startswith(first)
    assert both != first + second  # the second was asked behind the first


def test_a_conversation_keeps_its_turns(folder: Path) -> None:
    talk = Conversation(Speaker(str(folder / "chatty"), Speech(max_tokens=5, system="jump")))
    shown: list[str] = []
    said = talk.ask("def add", "test", shown.append)
    assert talk.turns == [
        {"role": "user", "content": "def add"},
        {"role": "assistant", "content": said.text},
    ]
    alone = talk.speaker.loaded.tokenizer.decode(talk.encode("Größe", "test"))
    assert alone.startswith("<system>jump</s><user>def add</s><assistant>")
    talk.ask("zebras", "test", shown.append, stopped=lambda: True)  # before a word was said
    assert len(talk.turns) == 2
    talk.reset()
    assert talk.turns == []
    plain = Conversation(Speaker(str(folder / "plain"), Speech(max_tokens=5)))
    plain.ask("def", "test", shown.append)
    assert plain.turns == []


class Keyboard:
    """A person at a terminal: what is typed, line by line, then Ctrl-D."""

    def __init__(self, *lines: str):
        self.lines = iter(lines)

    def __call__(self, mark: str = "") -> str:
        try:
            return next(self.lines)
        except StopIteration:
            raise EOFError from None

    def isatty(self) -> bool:
        return True


def typed(
    monkeypatch: pytest.MonkeyPatch, name: Path, *lines: str, **options: Any
) -> tuple[list[str], list[str]]:
    """Lines of answers, and of notes, for what is typed."""
    keyboard = Keyboard(*lines)
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr(builtins, "input", keyboard)
    to, out, err = screen()
    chat(str(name), Speech(max_tokens=6, **options), (), to)
    notes = [line for line in err.getvalue().splitlines() if line not in ("> ", ". ")]
    return out.getvalue().splitlines(), notes


def test_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, notes = typed(
        monkeypatch,
        folder / "chatty",
        "def add", "/reset", "/system  be brief", "/system", "/help", "/nosuch", "  ", "/exit", "never",
    )  # fmt: skip
    assert notes[0].endswith("chatty answers. /help says more, Ctrl-D ends.")
    assert " tokens, the first after " in notes[1]
    help_ = chat_module.HELP.splitlines()
    assert notes[2:] == [
        "a new chat",
        "a new chat, with this message",
        "a new chat, without a system message",
        *help_,
        "no command /nosuch",
        *help_,
    ]


def test_after_a_reset_the_answer_is_the_first_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder / "chatty"
    [once] = ["\n".join(typed(monkeypatch, model, "def add")[0])]
    assert "\n".join(typed(monkeypatch, model, "def add", "/reset", "def add")[0]) == f"{once}\n{once}"
    twice = "\n".join(typed(monkeypatch, model, "def add", "def add")[0])
    assert twice.startswith(once) and twice != f"{once}\n{once}"
    system = "\n".join(typed(monkeypatch, model, "/system jump", "def add")[0])
    assert system == "\n".join(typed(monkeypatch, model, "def add", system="jump")[0])
    assert system != once


def test_a_path_is_no_command_and_a_backslash_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(self: Any, text: str, *_: Any, **__: Any) -> Said:
        asked.append(text)
        return Said("x", [1], "turn", 1, 1, 0.1, None)

    monkeypatch.setattr(Conversation, "ask", ask)
    typed(monkeypatch, folder / "plain", "/etc/hosts is what?", "def f(x):\\", "    return\\", "")
    assert asked == ["/etc/hosts is what?", "def f(x):\n    return\n"]


def test_a_wrong_turn_is_told_and_the_chat_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, notes = typed(monkeypatch, folder / "strict", "zebras " * 100, "/system x", "def add", "q" * 100)
    assert notes[1].startswith("error: your text: ")
    assert notes[1].endswith("reads fewer than 128; shorten it")
    assert notes[2].startswith("error: /system: the chat template refuses")
    assert " tokens, the first after " in notes[3]
    assert notes[4].endswith("shorten it; /reset begins a new chat")
    assert answers


def test_a_base_model_goes_on_with_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, notes = typed(monkeypatch, folder / "plain", "/system x")
    assert "plain goes on with each text; it has no chat template. /help" in notes[0]
    assert notes[1] == "there is no chat template, and so no system message"
    _, notes = typed(monkeypatch, folder / "chatty", raw=True)
    assert notes[0].endswith("chatty goes on with each text. /help says more, Ctrl-D ends.")


def test_what_a_model_writes_obeys_no_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in an answer, nor in a note that repeats a name."""

    def answer(self: Speaker, prompt: list[int], show: Callable[[str], None], **_: Any) -> Said:
        for piece in ("\x1b", "[2J\x1b]0;owned\x07", "ok\r\n", "\x9b31m\tend"):
            show(piece)
        return Said("...", [1], "turn", 1, 1, 0.1, None)

    monkeypatch.setattr(Speaker, "answer", answer)
    to, out, err = screen()
    chat(str(folder / "plain"), Speech(), ["x"], to)
    assert out.getvalue() == "[2J]0;ownedok\n31m\tend\n"
    to.note("\x1b[31m[bold]name")
    assert err.getvalue().splitlines()[-1] == "[31m[bold]name"


def test_a_signal_stops_the_answer_and_a_second_one_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, and SIGTERM, which stops the program at once."""

    def pressed(*signals: signal.Signals) -> Any:
        def answer(self: Speaker, prompt: Any, show: Any, stopped: Callable[[], bool]) -> Said:
            assert not stopped()
            for number in signals:
                os.kill(os.getpid(), number)
            assert stopped()
            return Said("so far", [1], "stopped", 1, 1, 0.1, None)

        monkeypatch.setattr(Speaker, "answer", answer)
        return typed(monkeypatch, folder / "plain", "def", "/reset")

    before = signal.getsignal(signal.SIGINT)
    _, notes = pressed(signal.SIGINT)
    assert notes[-2:] == ["a new chat", ""]  # it went on
    for signals, code in (((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGTERM,), 143)):
        with pytest.raises(Interrupted) as caught:
            pressed(*signals)
        assert caught.value.exit_code == code
    assert signal.getsignal(signal.SIGINT) is before


WRONG = {
    "unknown": (["nosuch", "--prompt", "x"], "no model folder, run or Hub repository"),
    "no model": (["runs", "--prompt", "x"], "MODEL: runs: no config.json; a model folder holds"),
    "a file": (["file", "--prompt", "x"], "MODEL: file is a file; name the folder that it lies in"),
    "not there yet": (["begun", "--prompt", "x"], "has no student yet: its stage `train` has not finished"),
    "truncated": (["truncated", "--prompt", "x"], "MODEL: truncated/model.safetensors: truncated: "),
    "empty": (["plain", "--prompt", " \n"], "--prompt: empty; there is nothing to answer"),
    "one of two": (["plain", "--prompt", "x", "--prompt", ""], "--prompt: empty"),
    "no stdin": (["plain"], "stdin: empty; there is nothing to answer"),
    "temperature": (["plain", "--temperature", "-1"], "--temperature: greater than or equal to 0; got -1.0"),
    "raw system": (
        ["plain", "--raw", "--system", "x"],
        "--system is for the chat template, and --raw",
    ),
    "Hub": (
        ["nosuch/model", "--prompt", "x"],
        "nosuch/model is not in the cache, and the Hub",
    ),
}
WRONG_FOR_THE_MODEL = {
    "too long": (
        ["plain", "--prompt", "zebras " * 100],
        "tokens, and plain reads fewer than 128; shorten it",
    ),
    "no template": (["plain", "--prompt", "x", "--system", "x"], "--system: plain has no chat template"),
}


@pytest.fixture(scope="module")
def bad(folder: Path) -> Path:
    """The models, with some beside them that cannot be used."""
    run = folder / "runs" / "begun"
    run.mkdir(parents=True)
    (run / "fingerprint").write_text("0\n", encoding="utf-8")
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "truncated").mkdir()
    for file in (folder / "plain").iterdir():
        end = -100 if file.suffix == ".safetensors" else None
        (folder / "truncated" / file.name).write_bytes(file.read_bytes()[:end])
    return folder


@pytest.mark.parametrize("case", [*WRONG, *WRONG_FOR_THE_MODEL])
def test_a_wrong_input_is_one_line(
    case: str, bad: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = {**WRONG, **WRONG_FOR_THE_MODEL}[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(Speaker, "wake", lambda _: pytest.fail("weights were read"))
    ended = command(bad, capsys, "chat", *arguments)
    assert (ended.code, ended.out, len(ended.err)) == (2, "", 1)
    assert ended.err[0].startswith("error: ")
    assert message in ended.err[0]


def test_wrong_inputs_are_found_before_the_slow_imports(bad: Path) -> None:
    program = """
import json, sys
import mlx_distill.cli as cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mlx-distill", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        slow = {"transformers", "mlx_lm"} & set(sys.modules)
        if ended.code != 2 or slow:
            print(arguments, ended.code, slow)
"""
    late = ("no model", "a file", "truncated")  # models.load looks at files, and imports mlx-lm for that
    asked = [["chat", *arguments] for case, (arguments, _) in WRONG.items() if case not in (*late, "Hub")]
    asked += [["compare", "plain"], ["compare", "plain", "begun", "--prompt", "x"]]
    environment = {"PYTHONPATH": str(workshop.REPOSITORY), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(asked)],
        cwd=bad,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == len(asked)


def test_prompts_that_no_tokenizer_reads() -> None:
    assert checked(" x\n", "here") == " x\n"
    with pytest.raises(DataError, match="here: not readable as UTF-8"):
        checked("a\udcff", "here")


def test_who_stops_reading_gets_no_traceback(folder: Path) -> None:
    ask = ["chat", "endless", "--prompt", "def", "--max-tokens", "100000"]
    child = subprocess.Popen(
        [sys.executable, "-m", "mlx_distill", *ask],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(workshop.REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(3)
    child.stdout.close()
    assert child.wait(timeout=60) == 141
    assert child.stderr.read() == b""
    child.stderr.close()


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str, columns: int = 100):
        self.here, there = os.openpty()
        termios.tcsetwinsize(there, (30, columns))
        self.child = subprocess.Popen(
            [sys.executable, "-m", "mlx_distill", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(workshop.REPOSITORY), "TERM": "xterm"},
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
        )
        os.close(there)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.here, text.encode())

    def until(self, text: str) -> str:
        """What the terminal shows next, up to `text`."""
        self._wait(lambda: text in self.seen)
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def more(self, letters: int) -> None:
        """Wait until it shows so many letters more."""
        self._wait(lambda: len(self.seen) >= letters)

    def _wait(self, enough: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not enough() and time.monotonic() < end:
            if select.select([self.here], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.here, 65536).decode(errors="replace")
                except OSError:  # how Linux says that the other end is closed
                    break
        assert enough(), self.seen


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: Any, **how: Any) -> Terminal:
        opened.append(Terminal(*arguments, **how))
        return opened[-1]

    yield start
    for one in opened:
        one.child.kill()
        one.child.wait()
        os.close(one.here)


def test_a_chat_at_a_terminal(folder: Path, terminal: Callable[..., Terminal]) -> None:
    """An answer as it comes, another that is stopped, the chat that goes on, and Ctrl-C at the prompt."""
    talk = terminal(folder, "chat", "endless", "--max-tokens", "1000000")
    talk.until("Ctrl-D ends.")
    talk.until("> ")
    talk.type("def add\n")
    talk.until("def add")  # the terminal's echo
    talk.more(50)
    talk.child.send_signal(signal.SIGINT)
    talk.until(", stopped")
    talk.until("> ")
    talk.type("/reset\n")
    talk.until("a new chat")
    talk.until("> ")
    talk.child.send_signal(signal.SIGINT)
    try:
        talk.child.wait(timeout=5)
    except subprocess.TimeoutExpired:  # readline misses a signal that comes just before it waits for a key
        talk.child.send_signal(signal.SIGINT)
    assert talk.child.wait(timeout=60) == 130


def test_the_end_of_a_chat_at_a_terminal(folder: Path, terminal: Callable[..., Terminal]) -> None:
    talk = terminal(folder, "chat", "embedded")
    talk.until("> ")
    talk.type(ASKED.replace("\n", "\\\n") + "\n")
    assert "return sum(numbers)" in talk.until(" tokens/s")
    talk.until("> ")
    talk.type("\x04")
    assert talk.child.wait(timeout=60) == 0


@pytest.mark.parametrize("name", ["chat", "compare"])
def test_the_command_line_has_every_option_with_its_default(name: str) -> None:
    from typer.main import get_command

    from mlx_distill.cli import app

    command = getattr(get_command(app), "commands")[name]  # noqa: B009 - typer's own group, or click's
    defaults = {parameter.name: parameter.default for parameter in command.params}
    for option, field in Speech.model_fields.items():
        assert defaults[option] == field.default, option
