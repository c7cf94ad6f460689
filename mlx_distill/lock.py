"""One writer at a time in a run folder.

The lock is the system's own on the file `.lock`, and goes with the process, however that ends; the file says
which process holds it, for the one who is refused. Where a file system has no locks, what it says decides.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill.errors import RunFolderError
from mlx_distill.plain_json import parse_object
from mlx_distill.progress_file import is_alive, process

LOCK = ".lock"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Be the only one who writes in `folder`, which is made if it is not there.

    What a killed process left is taken over. A folder that is empty at the end is removed again.

    Raises:
        RunFolderError: another process writes there; or it cannot be made.
    """
    descriptor = _take(folder)
    path = folder / LOCK
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({**process(), "since": time.time()}).encode(), 0)
        yield
    finally:
        # A drive that fails here is not why the block ended, and the lock goes with the descriptor anyway.
        with contextlib.suppress(OSError):
            path.unlink()  # before it is let go: whoever waits for it sees that it is gone
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()


def refuse_if_taken(folder: Path) -> None:
    """As `one_writer`, but only looks, for a word before anything is read.

    Raises:
        RunFolderError: another process writes there.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return
    try:
        _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def _take(folder: Path) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the one before removed the empty folder just now
            continue
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            why = f"{folder}: cannot be written ({error.strerror}); check its permissions"
            raise RunFolderError(why) from None
        try:
            _lock(descriptor, folder)
            if os.fstat(descriptor).st_nlink:  # not removed by the one before, between opening and locking
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Lock an open lock file, or refuse."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunFolderError(_refusal(folder, _told(descriptor))) from None
    except OSError:  # no locks here: a process that still runs, or may run elsewhere, is believed
        told = _told(descriptor)
        if told and is_alive(told) is not False:
            raise RunFolderError(_refusal(folder, told)) from None


def _refusal(folder: Path, told: dict[str, Any]) -> str:
    who = "another process"
    if told:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(told.get("since")))
        who = f"process {told.get('pid')} on {told.get('host')}, since {when},"
    unknown = is_alive(told) is None if told else False
    gone = f"; if it has ended, remove {folder / LOCK}" if unknown else ""
    return f"{folder} is being written by {who} already; wait for it, stop it, or choose another name{gone}"


def _told(descriptor: int) -> dict[str, Any]:
    """What the holder has written; {} where that cannot be read."""
    try:
        return parse_object(os.pread(descriptor, 4096, 0), finite=True)
    except (OSError, ValueError):
        return {}
