"""The process that stands between the server and one problem: it starts, watches, ends, and answers."""

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from . import player, referee
from .confine import HIGH, Guards
from .limits import LINUX
from .watch import TICK, too_much

VALUES = 1 << 20  # bytes of values or verdicts that one problem may have


def supervise(
    guards: Guards, request: dict[str, Any], started: Callable[[list[int], bool], dict[str, Any]]
) -> dict[str, Any]:
    """Have one problem run and judged.

    Args:
        request: `kind`, `source`, `seconds`, and `calls` of a program that is not judged here.
        started: told that the program's process is there, and gives the tests if they are judged here.

    Returns:
        `lines` that the program or the referee wrote, `ending`: why there are no more, and `program`: how
        the program ended, null if it had to be ended.
    """
    deadline = time.monotonic() + request["seconds"]
    said, says = os.pipe()  # by the program
    told, feed = -1, b""
    if request["kind"] == "program":
        pids = [start(lambda: player.play(guards, request), says)]
        os.close(says)
        started(pids, False)
        wanted = 1 + len(request["calls"])
    else:
        hears, told = os.pipe()
        pids = [start(lambda: player.play(guards, request), says, hears)]
        os.close(says)
        os.close(hears)
        judge_by = started(pids, True)
        wanted = 1 + len(judge_by["tests"])
        if request["kind"] == "refereed":
            verdicts, its_verdicts = os.pipe()
            work = {"seconds": request["seconds"], **judge_by}
            pids.append(start(lambda: referee.judge(guards, work), its_verdicts, said, told))
            for descriptor in (its_verdicts, said, told):
                os.close(descriptor)
            said = verdicts
        else:
            feed = json.dumps(judge_by).encode() + b"\n"
            os.set_blocking(told, False)
    lines, ending, closed = bytearray(), None, False
    watched = None if LINUX and guards.watched is None else lambda: too_much(pids[:1], guards.watched)
    while wanted > 0:
        left = deadline - time.monotonic()
        ending = watched and watched()
        if left <= 0:
            ending = f"timed out after {request['seconds']:g} s"
        elif len(lines) > VALUES:
            ending = f"returned more than {VALUES >> 20} MiB"
        if ending:
            break
        feeding = [told] if feed and lines else []  # a program that is judged within has loaded by then
        ready = select.select([said], feeding, [], min(left, TICK) if watched else left)
        if ready[1]:
            try:
                feed = feed[os.write(told, feed) :]
            except BrokenPipeError:  # it has closed its end, and will not learn its tests
                feed = b""
        if ready[0]:
            piece = os.read(said, 1 << 16)
            closed = not piece
            if closed:
                break
            lines += piece
            wanted -= piece.count(b"\n")
    patience = 0.1 if closed or b'["gone"' in lines else 0.0
    statuses = [end(pid, patience) for pid in pids]
    if ending is None:
        who = "program" if len(pids) == 1 else "referee"
        ending = f"no value: the {who} {statuses[-1] or 'went silent'}"
    return {"lines": lines.decode("ascii", "replace"), "ending": ending, "program": statuses[0]}


def start(run: Callable[[], None], *descriptors: int) -> int:
    """Fork a process that has these descriptors, from 3 on, and no others of ours."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        wanted = [fcntl.fcntl(one, fcntl.F_DUPFD, HIGH) for one in (nothing, nothing, nothing, *descriptors)]
        for place, descriptor in enumerate(wanted):
            os.dup2(descriptor, place)
            os.close(descriptor)
        os.closerange(len(wanted), HIGH)
        run()
    finally:
        os._exit(1)


def end(pid: int, patience: float) -> str | None:
    """Kill a process and its group; how it ended by itself, None if it did not.

    Args:
        patience: seconds to wait for its end, where its pipe was closed and it is thus about to come.
    """
    until = time.monotonic() + patience
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done and time.monotonic() < until:
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        # macOS answers PermissionError where only the unreaped process is left of the group.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if os.WIFSIGNALED(status):
        return f"was killed (memory or signal {os.WTERMSIG(status)})"
    return f"ended by itself with exit code {os.waitstatus_to_exitcode(status)}"
