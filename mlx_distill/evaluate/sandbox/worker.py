"""A server process, its pipes and its folder, and what comes back from it."""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from mlx_distill.errors import Fault
from mlx_distill.evaluate.sandbox.child.plain import decode
from mlx_distill.evaluate.sandbox.commands import command
from mlx_distill.evaluate.sandbox.programs import Failed, Outcome, Program, Refereed, Runnable, Within

CODE = Path(__file__).parent  # holds the package `child`
GRACE = 5.0  # seconds beyond a problem's own, after which its server is taken for dead
_LONGEST = 8 << 20  # bytes in one answer: VALUES of child/monitor.py, escaped as JSON


class ServerDied(Exception):
    """The server of a worker went away, or hung, with a problem in hand."""


class DoesNotStart(ServerDied):
    """With the reason. This machine does not have the backend, or has no room for a process."""


class Worker:
    """Runs one problem at a time. Its server is started at the first one, and again when it died."""

    def __init__(self, backend: str):
        self.backend = backend
        self.process: subprocess.Popen[bytes] | None = None
        self.scratch: tempfile.TemporaryDirectory[str] | None = None
        self.received = b""
        self.running: list[int] = []  # process ids of a program, as far as they are ours to see

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, one: Runnable, seconds: float) -> Outcome:
        """Run it, on a new server if the first one dies: it may have died of the problem before.

        Raises:
            Fault: the server does not start any more. That says nothing about the program.
        """
        for again in (True, False):
            try:
                return self.ask(one, seconds)
            except ServerDied as error:
                self.stop()
                if isinstance(error, DoesNotStart) and not again:
                    raise Fault(f"sandbox: no process can be started any more ({error})") from None
        return Outcome(None, "killed the process that ran it")

    def ask(self, one: Runnable, seconds: float) -> Outcome:
        if self.process is None:
            self.start()
        request: dict[str, Any] = {"source": one.source, "seconds": seconds}
        token = secrets.token_hex(16) if isinstance(one, Within) else None
        match one:
            case Program():
                judged_by = None
                request |= {"kind": "program", "calls": one.calls}
            case Refereed():
                judged_by = {"setup": one.setup, "tests": one.tests, "names": one.names}
                request["kind"] = "refereed"
            case Within():
                judged_by = {"setup": one.setup, "tests": one.tests, "token": token}
                request["kind"] = "within"
        deadline = time.monotonic() + seconds + GRACE
        self.send(request, deadline)
        reply = self.receive(deadline)
        if "pids" in reply:
            self.running = [] if self.backend in ("unshare", "bubblewrap") else reply["pids"]
            if judged_by is not None:
                self.send(judged_by, deadline)
            reply = self.receive(deadline)
            self.running = []
        self.receive(deadline)  # ready for the next one: nothing of this one is left
        return _outcome(reply, len(one.calls if isinstance(one, Program) else one.tests), token)

    def start(self) -> None:
        """Start the server.

        Raises:
            DoesNotStart: with the reason.
        """
        self.scratch = tempfile.TemporaryDirectory(prefix="mlx_distill-", ignore_cleanup_errors=True)
        folder = os.path.realpath(self.scratch.name)
        try:
            self.process = subprocess.Popen(
                command(self.backend, str(CODE), folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise DoesNotStart(str(error)) from None
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        try:
            said = self.receive(time.monotonic() + 10)
        except ServerDied:
            raise DoesNotStart(self.last_words()) from None
        if "failed" in said:
            raise DoesNotStart(said["failed"])

    def last_words(self) -> str:
        assert self.process is not None
        assert self.process.stderr is not None
        pipe = self.process.stderr.fileno()
        words = os.read(pipe, 1 << 16) if select.select([pipe], [], [], 0.1)[0] else b""
        lines = words.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it does not start"

    def send(self, message: dict[str, Any], deadline: float) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        pipe = self.process.stdin.fileno()
        data = json.dumps(message).encode() + b"\n"
        while data:
            if not select.select([], [pipe], [], max(0, deadline - time.monotonic()))[1]:
                raise ServerDied
            try:
                data = data[os.write(pipe, data) :]
            except BrokenPipeError:
                raise ServerDied from None

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next line."""
        assert self.process is not None
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.received:
            if not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
                raise ServerDied
            piece = os.read(pipe, 1 << 16)
            if not piece or len(self.received) > _LONGEST:
                raise ServerDied
            self.received += piece
        line, self.received = self.received.split(b"\n", 1)
        return json.loads(line)

    def stop(self) -> None:
        """End the server, with it whatever it runs, and remove the folder."""
        if self.process is not None:
            for group in (self.process.pid, *self.running):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            with self.process:  # closes the pipes and waits
                pass
        if self.scratch is not None:
            self.scratch.cleanup()
        self.process, self.scratch, self.received, self.running = None, None, b"", []


def _outcome(reply: dict[str, Any], wanted: int, token: str | None) -> Outcome:
    """The values in what the program sent, or the verdicts of its referee. A program may send anything."""
    sent = reply["lines"].split("\n")[:-1]  # what follows the last line end was cut off
    lines = [_value(line, token if place else None, reply) for place, line in enumerate(sent[: wanted + 1])]
    lines += [_failed(reply["ending"])] * (wanted + 1 - len(lines))
    why = next((line.why for line in lines if isinstance(line, Failed)), None)
    return Outcome(None if isinstance(lines[0], Failed) else lines[1:], why)


def _value(line: str, token: str | None, reply: dict[str, Any]) -> Any:
    try:
        kind, content = json.loads(line)
        if kind == "value" and token is None:
            return decode(content)
        if kind == token and token is not None:
            return True if content is True else _failed(content)
        if kind == "gone" and reply["program"]:
            return _failed(f"no value: the program {reply['program']}")
        return _failed(content)
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError, RecursionError):
        return Failed("no value: what came back is not readable")


def _failed(why: object) -> Failed:
    """In one line that any file and any terminal takes: the words may be the program's."""
    text = " ".join(str(why).split())[:500]
    shown = (one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return Failed("".join(shown))
