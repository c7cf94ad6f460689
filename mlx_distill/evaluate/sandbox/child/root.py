"""Linux: a root folder with nothing in it but what Python needs, for a server in namespaces of its own."""

import ctypes
import os
from collections.abc import Sequence

FOLDER_BYTES = 16 << 20  # all that a program keeps in its folder
FOLDER_FILES = 1000
WORK = "/mlx_distill-work"  # the program's folder in the new root
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_BIND, _RECURSIVE, _NO_SUID_NO_DEVICES, _DETACH = 4096, 16384, 2 | 4, 2


def enter(readable: Sequence[str], scratch: str) -> None:
    """Make the new root in memory, at `scratch`, and leave the old one behind.

    Args:
        readable: files, folders and symbolic links that are there too, at the same places, read-only.

    Raises:
        OSError: the kernel is older than 5.12 or refuses.
    """
    mount("tmpfs", scratch, "tmpfs", _NO_SUID_NO_DEVICES, "size=1m,mode=755")
    for path in (*readable, *DEVICES):
        _show(path, scratch)
    os.mkdir(scratch + WORK)
    read_only = (ctypes.c_uint64 * 4)(1 | 2, 0, 0, 0)  # struct mount_attr: MOUNT_ATTR_RDONLY, _NOSUID
    here, recursive = -100, 0x8000  # AT_FDCWD, AT_RECURSIVE
    call(442, here, scratch.encode(), recursive, read_only, ctypes.c_size_t(32))  # mount_setattr
    bounds = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES}"
    mount("tmpfs", scratch + WORK, "tmpfs", _NO_SUID_NO_DEVICES, bounds)
    os.chdir(scratch)
    call(155 if os.uname().machine == "x86_64" else 41, b".", b".")  # pivot_root: the old one over the new
    if _libc().umount2(b".", _DETACH):
        raise _error("umount2")
    os.chdir("/")


def _show(path: str, root: str) -> None:
    if not os.path.lexists(path):
        return
    place = root + path
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        if not os.path.lexists(place):
            os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
    mount(path, place, "none", _BIND | _RECURSIVE, "")


def mount(source: str, place: str, kind: str, flags: int, options: str) -> None:
    number = ctypes.c_ulong(flags)
    if _libc().mount(source.encode(), place.encode(), kind.encode(), number, options.encode() or None):
        raise _error(f"mount {place}")


def call(number: int, *arguments: object) -> None:
    if _libc().syscall(ctypes.c_long(number), *arguments):
        raise _error(f"call {number}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
