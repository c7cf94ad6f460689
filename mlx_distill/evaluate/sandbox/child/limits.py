"""Limits that a process sets itself for good: time, memory, files, processes; and no rights beyond them."""

import ctypes
import math
import os
import resource
import signal
import sys

MEMORY = 1 << 30  # bytes of address space (Linux; elsewhere `watch.py` looks at what is used)
FILE_SIZE = 1 << 20  # bytes in one file
OPEN_FILES = 32

LINUX = sys.platform == "linux"


def limit_all(seconds: float) -> None:
    """Of the processor `seconds` and a little more; of the rest what the constants say."""
    limit(resource.RLIMIT_CPU, math.ceil(seconds) + 1)
    limit(resource.RLIMIT_FSIZE, FILE_SIZE)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, 0)  # no further process; root is exempt
    if LINUX:  # macOS refuses RLIMIT_AS
        limit(resource.RLIMIT_AS, MEMORY)


def limit(which: int, value: int) -> None:
    """Set the soft and the hard limit, or leave a stricter one in place."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def hide() -> None:
    """Linux: no process of the same user may look into this one, nor into those that it forks."""
    if LINUX:
        prctl(4, 0)  # PR_SET_DUMPABLE


def give_up_rights() -> None:
    """Linux: die with the parent, gain nothing by executing, and drop every capability.

    Raises:
        OSError: the kernel refuses.
    """
    parent = os.getppid()
    prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it died before that
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    if _libc().capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def prctl(option: int, value: int) -> None:
    number = ctypes.c_ulong
    if _libc().prctl(option, number(value), number(0), number(0), number(0)):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
