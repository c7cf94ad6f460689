"""A server that forks, for each problem, a monitor; the monitor forks the program and its referee.

Python starts once, not once a program. The server itself never reads a request, so that no program
inherits anything of another's, or of its own tests, in its memory: the monitor reads one after
it was forked, and the tests after it has forked the program. Requests and answers are JSON objects, one a
line, on the descriptors 0 and 1; a program sees neither, only pipes of its own.
"""

import contextlib
import gc
import json
import os
import select
import signal
import sys
from typing import Any

from .confine import Guards
from .monitor import supervise
from .talk import write
from .watch import renew

_NOBODY_ASKS = 3  # exit code of a monitor that found the requests at their end


def main() -> None:
    sys.path.pop(0)  # where this package was found; a program finds the standard library only
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the harness decides when to stop
    try:
        guards = Guards(json.loads(sys.argv[1]))
    except OSError as error:
        send({"failed": str(error)})
        return
    sys.argv[:] = sys.orig_argv[:] = [""]
    os.environ.clear()
    gc.freeze()
    renew(guards.work)
    send({"ready": guards.backend})
    while True:
        select.select([0], [], [])
        monitor = os.fork()
        if monitor == 0:
            try:
                request = read_line()
                if request is None:
                    os._exit(_NOBODY_ASKS)
                send(supervise(guards, request, started))
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(monitor, 0)[1])
        if guards.alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of the namespace but us: nothing slips through
            with contextlib.suppress(ChildProcessError):
                while True:  # as process 1 we inherit every orphan, so this waits for all of them
                    os.waitpid(-1, 0)
        if status != 0:
            os._exit(0 if status == _NOBODY_ASKS else 1)
        renew(guards.work)
        send({"ready": guards.backend})


def send(message: dict[str, Any]) -> None:
    write(1, json.dumps(message).encode() + b"\n")


def read_line() -> dict[str, Any] | None:
    """The next request. Reads no further than its end: the harness sends the next one when asked to."""
    data = b""
    while not data.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return None
        data += piece
    return json.loads(data)


def started(pids: list[int], judged: bool) -> dict[str, Any]:
    """Say so, and get what the program is judged by, which it thus was forked too early to inherit."""
    send({"pids": pids})  # should this process be killed, the harness can still end the program
    if not judged:
        return {}
    return read_line() or os._exit(_NOBODY_ASKS)
