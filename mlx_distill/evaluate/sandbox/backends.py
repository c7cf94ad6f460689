"""Which backend this machine has: each is tried out, and has to hold a program that tries to get out."""

import contextlib
import functools
import os
import socket
import sys
import tempfile
from pathlib import Path

from mlx_distill.errors import Fault, SandboxError
from mlx_distill.evaluate.sandbox.commands import missing
from mlx_distill.evaluate.sandbox.programs import Failed, Program
from mlx_distill.evaluate.sandbox.worker import ServerDied, Worker

PROTECTING = ("bubblewrap", "unshare", "landlock", "seatbelt")  # the best one first
UNPROTECTED = "limits"


def require(unsafe: bool = False) -> str:
    """The name of the backend that will run programs.

    Args:
        unsafe: run them even where nothing holds them.

    Raises:
        SandboxError: nothing does, and it has to.
        Fault: this machine runs no child process at all.
    """
    kind = backend()
    if kind not in PROTECTING and not unsafe:
        _, tried = _found()
        said = "; ".join(f"{name}: {why}" for name, why in tried.items() if why != "not on this system")
        advice = "" if sys.platform == "darwin" else "install bubblewrap, or allow user namespaces; "
        raise SandboxError(
            f"sandbox: nothing on this machine holds a program that a model wrote ({said}); {advice}"
            "--confirm-run-unsafe-code runs it with your rights on files and network"
        )
    return kind


def backend() -> str:
    """The best backend that works here; "limits" where none protects. Tried out once.

    Raises:
        Fault: this machine runs no child process at all.
    """
    return _found()[0]


@functools.cache
def _found() -> tuple[str, dict[str, str]]:
    """The backend, and why each better one is not it."""
    tried: dict[str, str] = {}
    for kind in PROTECTING:
        why = missing(kind) or hole(kind)
        if why is None:
            return kind, tried
        tried[kind] = why
    with Worker(UNPROTECTED) as worker:
        try:
            outcome = worker.ask(Program("", ("40 + 2",)), 5.0)
        except ServerDied as error:
            raise _no_process(str(error)) from None
    if outcome.values != [42]:
        raise _no_process(outcome.why)
    return UNPROTECTED, tried


def hole(kind: str) -> str | None:
    """What a program on this backend can do and should not, or why it runs none; None if it holds."""
    with tempfile.TemporaryDirectory(prefix="mlx_distill-") as outside, Worker(kind) as worker:
        secret = Path(outside, "secret")
        secret.write_text("secret", encoding="utf-8")
        with socket.socket() as listener:
            with contextlib.suppress(OSError):  # no loopback here
                listener.bind(("127.0.0.1", 0))
                listener.listen()
            port = listener.getsockname()[1] or 9
            attempts = {
                "read a file of yours": f"open({str(secret)!r}).read()",
                "write a file of yours": f"open({str(secret)!r}, 'a').close()",
                "list a folder of yours": f"os.listdir({outside!r})",
                "start a process": "os.fork() or os._exit(0)",
                "use the network": f"socket.create_connection(('127.0.0.1', {port}), 1).close()",
                "signal its parent": "os.kill(os.getppid(), 0)",
                "signal all processes": "os.kill(-1, 0)",
            }
            program = Program("import os, socket", ("40 + 2", *attempts.values()))
            try:
                outcome = worker.ask(program, 5.0)
            except ServerDied as error:
                return str(error) or "the server died"
    if outcome.values is None or outcome.values[0] != 42:
        return outcome.why or "no value"
    done = [what for what, value in zip(attempts, outcome.values[1:], strict=True) if not _refused(value)]
    return f"a program can {done[0]}" if done else None


def _refused(value: object) -> bool:
    errors = ("PermissionError", "FileNotFoundError", "OSError", "ProcessLookupError", "BlockingIOError")
    return isinstance(value, Failed) and value.why.startswith(errors)


def _no_process(why: str | None) -> Fault:
    return Fault(f"sandbox: the child process runs no program here ({why}); report this with your platform")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
