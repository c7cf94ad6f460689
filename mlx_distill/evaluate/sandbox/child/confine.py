"""How each backend confines the process of a program, and that of its referee."""

import ctypes
import fcntl
import os
import sys
from typing import Any

from . import calls, landlock, limits, root
from .limits import LINUX

HIGH = 100  # descriptors from here on are ours until a process has confined itself


class Guards:
    """What the server prepared once, and each process that it starts then puts on."""

    def __init__(self, setting: dict[str, Any]):
        """Enter the new root, where the backend has one, or make the rules that its processes will get.

        Args:
            setting: `backend`, `scratch` (a folder), `readable` (paths) and `profile` (macOS, or null).

        Raises:
            OSError: this machine does not have the backend.
        """
        self.backend: str = setting["backend"]
        self.profile: str | None = setting["profile"]
        self.work: str = os.path.join(setting["scratch"], "work")
        self.rules: int | None = None  # of a program
        self.referee_rules: int | None = None
        limits.hide()
        if self.backend == "unshare":
            root.enter(setting["readable"], setting["scratch"])
            self.work = root.WORK
        elif self.backend == "bubblewrap":
            self.work = root.WORK  # made by bwrap, as is the new root
        elif self.backend == "landlock":
            os.makedirs(self.work, exist_ok=True)
            readable = [*setting["readable"], *root.DEVICES]
            self.rules = _high(landlock.ruleset(readable, [self.work]))
            self.referee_rules = _high(landlock.ruleset(readable, []))

    @property
    def alone(self) -> bool:
        """The server is process 1 of a namespace: whatever else lives there is a program's."""
        return self.backend in ("unshare", "bubblewrap")

    @property
    def watched(self) -> str | None:
        """The folder whose size somebody has to look at."""
        return None if self.backend == "unshare" else self.work

    def put_on(self, seconds: float, *, referee: bool) -> None:
        """Give up, for good, what a function that computes a value has no need of.

        Raises:
            OSError: the kernel refuses, and the backend stands on it.
        """
        limits.limit_all(seconds)
        try:
            if LINUX:
                limits.give_up_rights()
            rules = self.referee_rules if referee else self.rules
            if rules is not None:
                landlock.restrict(rules)
            if self.profile is not None:
                seatbelt(self.profile)
            os.closerange(HIGH, HIGH + 64)
            if LINUX:
                calls.allow_only()
        except OSError:
            if self.backend != "limits":  # which promises nothing
                raise


def seatbelt(profile: str) -> None:
    """macOS: what `sandbox-exec` does to a process before it executes it.

    Raises:
        OSError: the profile is not accepted.
    """
    library = ctypes.CDLL("/usr/lib/libSystem.B.dylib" if sys.platform == "darwin" else None)
    if not hasattr(library, "sandbox_init"):
        raise OSError("this system has no sandbox_init")
    message = ctypes.c_char_p()
    if library.sandbox_init(profile.encode(), ctypes.c_uint64(0), ctypes.byref(message)):
        raise OSError(f"sandbox_init: {(message.value or b'').decode(errors='replace')}")


def _high(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH)
    os.close(descriptor)
    return moved
