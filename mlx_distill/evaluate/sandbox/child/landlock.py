"""Linux: Landlock, which lets a process give up files for good without any rights or namespaces.

See Documentation/userspace-api/landlock.rst of the kernel; the numbers are the same on all processors.
"""

import ctypes
import os
from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
# What it watches over, by version: 1 files, 2 moving between folders, 3 truncating, 4 TCP, 5 devices,
# 6 abstract sockets and signals.
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_FILES = (1 << 16) - 1
_EXECUTE, _DEVICES = 1 << 0, (1 << 6) | (1 << 9) | (1 << 11) | (1 << 15)  # made as devices, sockets; ioctl


def version() -> int:
    """The kernel's version of Landlock.

    Raises:
        OSError: it has none, or it is turned off.
    """
    return _call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def ruleset(readable: Sequence[str], writable: Sequence[str]) -> int:
    """A descriptor for `restrict`: all but these files and folders is to be given up.

    Raises:
        OSError: the kernel refuses.
    """
    known = version()
    files = _FILES.get(known, _ALL_FILES)
    network = 3 if known >= 4 else 0
    scope = 3 if known >= 6 else 0  # abstract sockets of others, signals to others
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    attributes = (ctypes.c_uint64 * 3)(files, network, scope)
    rules = _call(_CREATE, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    for path in readable:
        if os.path.exists(path):
            _add(rules, path, _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0))
    for path in writable:
        _add(rules, path, files & ~(_EXECUTE | _DEVICES))
    return rules


def _add(rules: int, path: str, rights: int) -> None:
    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]

    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(
            _ADD,
            ctypes.c_int(rules),
            ctypes.c_int(1),
            ctypes.byref(Beneath(rights, folder)),
            ctypes.c_uint32(0),
        )
    finally:
        os.close(folder)


def restrict(rules: int) -> None:
    """Give the rest up. Needs PR_SET_NO_NEW_PRIVS.

    Raises:
        OSError: the kernel refuses.
    """
    _call(_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0))


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.syscall(ctypes.c_long(number), *arguments)
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return answer
