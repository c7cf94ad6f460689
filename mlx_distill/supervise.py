"""`--supervise`: the run happens in a process of its own, which is started again where it crashes.

Started again is what a signal killed, a fault (exit code 1), and a run that MLX stopped for want of memory or
because of the display. Not started again: what is done (0), what only the user can change (2, 70, a full
drive: 75), and what the user stopped. After the first crash there is one more try; then a try must have got
further than all before it, by a finished stage, a checkpoint, or stored answers or targets.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from mlx_distill.crashes import Cause, cause_of, told
from mlx_distill.errors import RecipeError
from mlx_distill.interrupt import SIGNALS, Interrupted
from mlx_distill.layout import FINGERPRINT
from mlx_distill.plain_json import parse_object
from mlx_distill.secrets_out import without_secrets

TRIES = 5  # of one run, the first one included
FIRST_PAUSE = 1.0  # seconds before the second try; each pause is four times the one before
KEPT = 1 << 16  # bytes of stderr that are looked through for a cause


def supervise(
    first: Sequence[str],
    again: Sequence[str],
    folders: Sequence[Path],
    stores: Sequence[Path] = (),
    *,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Run a command until it ends by itself, and give the exit code.

    Args:
        first: the command. again: the one that goes on, once `folders` are this run's.
        folders: run folders that it works in; they need not exist yet.
        stores: other folders that it fills, such as a cache that runs share.
        pause: waits for so many seconds. What a signal does meanwhile is the caller's to say.

    Returns:
        the code of the last try; 75 where MLX ended it for a known cause; 128 + the number of the signal that
        killed it.
    """
    before, reached, crashes = _opened(folders), _reached(folders, stores), 0
    while True:
        child = _Child(again if _are_opened(folders, before) else first)
        code = child.wait()
        what, cause = _outcome(code, child.said)
        if child.stopped or not _is_crash(code, cause):
            return code if code >= 0 else 128 - code
        crashes += 1
        now = _reached(folders, stores)
        further, reached = not now <= reached, reached | now
        why = _why_no_more(crashes, further, cause)
        lines = [what, *(f"-> {remedy}" for remedy in (cause.remedies if cause else ()))]
        seconds = FIRST_PAUSE * 4 ** (crashes - 1)
        if why:
            lines += [why, f"go on with: {shlex.join(again)}"]
        else:
            lines.append(f"supervisor: try {crashes + 1} of {TRIES} in {seconds:.0f} s")
        _tell(lines, folders)
        if why:
            return 75 if cause else code if code >= 0 else 128 - code
        pause(seconds)


def arguments(typed: Sequence[str], *, go_on: bool) -> list[str]:
    """Arguments of the supervised command, from those that were typed.

    Args:
        go_on: with the run that is there.
    """
    ours = {"--supervise", "--caffeinate"} | ({"--resume", "--overwrite"} if go_on else set())
    return [word for word in typed if word not in ours] + (["--resume"] if go_on else [])


def keep_awake() -> None:
    """Keep the Mac awake, on power, until this process ends; the display may sleep, and should.

    Raises:
        RecipeError: this is no Mac, or it has no `caffeinate`.
    """
    if sys.platform != "darwin":
        raise RecipeError(f"--caffeinate keeps a Mac awake, and this is {sys.platform}; leave it out")
    program = shutil.which("caffeinate")
    if program is None:
        raise RecipeError(
            "--caffeinate: there is no program `caffeinate` in PATH (macOS has /usr/bin/caffeinate)"
        )
    subprocess.Popen([program, "-s", "-w", str(os.getpid())], start_new_session=True)


class _Child:
    """A process whose stderr is shown as it is, and kept in part. stdout is ours, with its bars.

    It is in a session of its own: Ctrl-C at the terminal then reaches it once, from here. Twice would be as
    the second Ctrl-C, which does not wait for a checkpoint.
    """

    def __init__(self, command: Sequence[str]):
        self._said, self.stopped = bytearray(), False
        self._process: subprocess.Popen[bytes] | None = None
        self._command = command

    @property
    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self._said.decode(errors="replace")

    def wait(self) -> int:
        """Run it to its end, and give its return code; signals to us are handed on."""
        with self._handing_on():
            self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, start_new_session=True)
            assert self._process.stderr is not None
            reader = threading.Thread(target=self._show, args=(self._process.stderr,), daemon=True)
            reader.start()
            code = self._process.wait()
            reader.join(timeout=1.0)  # a process that it has left behind may hold the other end
        return code

    def _show(self, stream: BinaryIO) -> None:
        with stream:
            while block := os.read(stream.fileno(), 1 << 12):
                self._said = (self._said + block)[-KEPT:]
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; the run goes on
                    sys.stderr.buffer.write(block)
                    sys.stderr.flush()

    @contextlib.contextmanager
    def _handing_on(self) -> Iterator[None]:
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as by nohup
        handlers = {number: signal.signal(number, self._hand_on) for number in wanted}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is None:  # it has not begun
            raise Interrupted(number)
        self._process.send_signal(number)


def _is_crash(code: int, cause: Cause | None) -> bool:
    """Whether a return code is of a kind that another try may better."""
    if -code in SIGNALS:  # somebody wanted it to end
        return False
    return code < 0 or code == 1 or (code == 75 and cause is not None)


def _outcome(code: int, said: str) -> tuple[str, Cause | None]:
    """How a try ended, in words, and of what MLX says the cause."""
    cause = cause_of(said) if code < 0 or code in (1, 75) else None
    killed = " (kill -9, or the system was out of memory)" if code == -signal.SIGKILL else ""
    why = f": {cause.what}" if cause else killed
    return f"supervisor: the run ended by {told(code)}{why}", cause


def _why_no_more(crashes: int, further: bool, cause: Cause | None) -> str | None:
    """Why there is no other try; None if there is one."""
    if cause is not None and not cause.helps_again:
        return "supervisor: another try would end in the same way; no other is made"
    if crashes >= TRIES:
        return f"supervisor: this was try {crashes} of {TRIES}"
    if crashes > 1 and not further:
        return "supervisor: this try got no further than those before it; no other is made"
    return None


def _opened(folders: Sequence[Path]) -> list[int | None]:
    """When each run folder was last opened by a run, in nanoseconds; None for one that is none yet."""
    files = [folder / FINGERPRINT for folder in folders]
    return [file.stat().st_mtime_ns if file.exists() else None for file in files]


def _are_opened(folders: Sequence[Path], before: Sequence[int | None]) -> bool:
    """Whether all of them are this run's since then; what was there before `--overwrite` is not."""
    pairs = zip(_opened(folders), before, strict=True)
    return bool(folders) and all(now is not None and now != then for now, then in pairs)


def _reached(folders: Sequence[Path], stores: Sequence[Path]) -> set[str]:
    """Names of what is finished: stages, checkpoints, answers and targets."""
    found: set[str] = set()
    for folder in folders:
        stages = folder / "stages.json"
        with contextlib.suppress(OSError, ValueError):  # where it is damaged, the run itself says so
            names = parse_object(stages.read_bytes()) if stages.is_file() else {}
            found |= {f"{folder} {stage}" for stage in names}
    filled = [folder / place for folder in folders for place in ("checkpoints", "cache", "samples/written")]
    for place in [*filled, *stores]:
        for path, names, files in os.walk(place):  # which passes over what others remove meanwhile
            names[:] = [name for name in names if not name.startswith(".")]  # as what is being written has
            found |= {os.path.join(path, name) for name in [*names, *files] if not name.startswith(".")}
    return found


def _tell(lines: Sequence[str], folders: Sequence[Path]) -> None:
    """Say lines on stderr, and in the log.txt of the run that was going on."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()
    logs = [log for log in (folder / "log.txt" for folder in folders) if log.exists()]
    if logs:
        newest = max(logs, key=lambda log: log.stat().st_mtime)
        with contextlib.suppress(OSError), open(newest, "a", encoding="utf-8") as file:  # as on a full drive
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.writelines(f"{now}  {without_secrets(line)}\n" for line in lines)
