"""Runs programs that a model wrote, each in a process of its own where it can neither cheat nor hang.

The process is forked by a server (`child.py`) that starts once a worker. It is sent the program and the
calls; plain values come back. What a call should return stays here, so neither an early exit, nor a
printed "passed", nor an object equal to everything makes a wrong program right.

What holds a program back, by backend (`backend()` says which one this machine has):

- everywhere: limits on wall and CPU time, on the size of a file and on open files; an empty environment; an
  empty folder to start in; no standard streams; no further process (macOS: root may start some).
- Linux, "limits": also 1 GiB of memory and no capabilities, and seccomp refuses new processes and threads,
  other programs, signals and sockets. It reads and writes files as you can.
- Linux, "unshare": also namespaces of its own (user, mount, network, process, IPC). It writes nowhere but in
  its folder, which is in memory, and reaches no process of yours. It reads files as you can.

On macOS a program reads and writes files as you can, may use the network, and may take memory until its
time is up. None of this is a jail for code that was written to break out.
"""

import contextlib
import functools
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.errors import Fault
from mlx_distill.progress import Progress, silent

_CHILD = Path(__file__).with_name("child.py")
_GRACE = 2.0  # seconds beyond a program's own, after which its server is taken for dead
_LONGEST = 8 << 20  # bytes in one reply: VALUES of child.py, escaped as JSON
_UNSHARE = ("--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True, slots=True)
class Program:
    source: str
    calls: tuple[str, ...]  # expressions, evaluated in turn after `source` was executed


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands where a call's value would, and says why there is none."""

    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    values: list[Any] | None  # one a call, `Failed` where it gave none; None: the program did not even load
    why: str | None  # the first thing that went wrong, None if nothing did


class _ServerDied(Exception):
    """The server of a worker went away, or hung, with a program in hand."""


def run(
    programs: Sequence[Program], *, seconds: float, workers: int = 2, progress: Progress = silent
) -> list[Outcome]:
    """What each program's calls return, in the order given.

    Args:
        seconds: wall time of one program with all of its calls.
        workers: programs that run at once.

    Raises:
        Fault: this machine runs no child process at all.
    """
    kind = backend()
    idle: queue.SimpleQueue[_Server] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack, progress("programs", len(programs), "programs") as advance:
        for _ in range(min(workers, len(programs))):
            idle.put(stack.enter_context(_Server(kind)))

        def one(program: Program) -> Outcome:
            server = idle.get()
            try:
                return server.run(program, seconds)
            finally:
                idle.put(server)

        outcomes = []
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            try:
                for outcome in pool.map(one, programs):
                    outcomes.append(outcome)
                    advance(1)
            except BaseException:  # Ctrl-C: do not run the rest first
                pool.shutdown(cancel_futures=True)
                raise
    return outcomes


@functools.cache
def backend() -> str:
    """ "unshare" where this machine lets its user make namespaces, else "limits". Tried out once.

    Raises:
        Fault: not even the second one runs a program.
    """
    kinds = ["unshare", "limits"] if sys.platform == "linux" and shutil.which("unshare") else ["limits"]
    why: str | None = "it does not start"
    for kind in kinds:
        with contextlib.suppress(_ServerDied), _Server(kind) as server:
            outcome = server.ask(Program("", ("40 + 2",)), 5.0)
            if outcome.values == [42]:
                return kind
            why = outcome.why
    raise Fault(f"sandbox: the child process runs no program here ({why}); report this with your platform")


class _Server:
    """A child process and its two pipes. Started at the first program, and again when it died."""

    def __init__(self, kind: str):
        self.kind = kind
        self.process: subprocess.Popen[bytes] | None = None
        self.scratch: tempfile.TemporaryDirectory[str] | None = None
        self.received = b""
        self.running: int | None = None  # the program's process id, where it is one of ours to see

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, program: Program, seconds: float) -> Outcome:
        """Run it, on a new server if the first one dies: it may have died of the program before."""
        for _ in range(2):
            try:
                return self.ask(program, seconds)
            except _ServerDied:
                self.stop()
        return Outcome(None, "killed the process that ran it")

    def ask(self, program: Program, seconds: float) -> Outcome:
        if self.process is None:
            self.start()
        request = {"source": program.source, "calls": program.calls, "seconds": seconds}
        deadline = time.monotonic() + seconds + _GRACE
        self.send(json.dumps(request).encode() + b"\n", deadline)
        reply = self.receive(deadline)
        if "pid" in reply:
            self.running = reply["pid"]
            reply = self.receive(deadline)
            self.running = None
        return _outcome(reply, len(program.calls))

    def start(self) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="mlx_distill-", ignore_cleanup_errors=True)
        # Not -I: it would ignore the hash seed, and sets of strings would differ in order from run to run.
        command = [sys.executable, "-s", "-P", "-S", "-B", str(_CHILD), self.kind, self.scratch.name]
        if self.kind == "unshare":
            command = [shutil.which("unshare") or "unshare", *_UNSHARE, *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=self.scratch.name,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.receive(time.monotonic() + 10)  # it says hello

    def send(self, data: bytes, deadline: float) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        pipe = self.process.stdin.fileno()
        while data:
            if not select.select([], [pipe], [], max(0, deadline - time.monotonic()))[1]:
                raise _ServerDied
            try:
                data = data[os.write(pipe, data) :]
            except BrokenPipeError:
                raise _ServerDied from None

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next line."""
        assert self.process is not None
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.received:
            if not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
                raise _ServerDied
            piece = os.read(pipe, 1 << 16)
            if not piece or len(self.received) > _LONGEST:
                raise _ServerDied
            self.received += piece
        line, self.received = self.received.split(b"\n", 1)
        return json.loads(line)

    def stop(self) -> None:
        """End the server, with it whatever it runs, and remove the folder."""
        if self.process is not None:
            for group in (self.process.pid, self.running):
                if group is not None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(group, signal.SIGKILL)
            with self.process:  # closes the pipes and waits
                pass
        if self.scratch is not None:
            self.scratch.cleanup()
        self.process, self.scratch, self.received, self.running = None, None, b"", None


def _outcome(reply: dict[str, Any], calls: int) -> Outcome:
    """The values in what the program sent. It may have sent anything."""
    sent = reply["lines"].split("\n")[:-1]  # what follows the last line end was cut off
    lines = [_value(line) for line in sent[: calls + 1]]
    lines += [Failed(reply["ending"] or "no value")] * (calls + 1 - len(lines))
    why = next((line.why for line in lines if isinstance(line, Failed)), None)
    return Outcome(None if isinstance(lines[0], Failed) else lines[1:], why)


def _value(line: str) -> Any:
    try:
        kind, content = json.loads(line)
        return _decoded(content) if kind == "value" else Failed(str(content))
    except (ValueError, TypeError, KeyError, RecursionError):
        return Failed("no value: what came back is not readable")


def _decoded(content: Any) -> Any:
    """The value that `plain` of child.py made JSON of."""
    if isinstance(content, list):
        return [_decoded(part) for part in content]
    if not isinstance(content, dict):
        return content
    if "tuple" in content:
        return tuple(_decoded(part) for part in content["tuple"])
    if "set" in content:
        return {_decoded(part) for part in content["set"]}
    return {_decoded(key): _decoded(part) for key, part in content["dict"]}
