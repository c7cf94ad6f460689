"""What a program uses that no limit of the kernel bounds: memory on a Mac, files in a folder on a disk."""

import ctypes
import os
import subprocess
import sys

from .limits import MEMORY
from .root import FOLDER_BYTES, FOLDER_FILES

TICK = 0.02  # seconds between two looks


def too_much(pids: list[int], folder: str | None) -> str | None:
    """Why these processes have to end now, None if they may go on.

    Args:
        folder: where they write, None if that is bounded otherwise.
    """
    if any(memory(pid) > MEMORY for pid in pids):
        return f"used more than {MEMORY >> 20} MiB of memory"
    if folder is not None and not fits(folder):
        return f"wrote more than {FOLDER_BYTES >> 20} MiB or {FOLDER_FILES} files"
    return None


def memory(pid: int) -> int:
    """Bytes of memory that a process uses, 0 if it is gone or cannot be seen.

    On a Mac that is what Activity Monitor shows, compressed memory included.
    """
    if sys.platform == "darwin":
        usage = (ctypes.c_uint64 * 12)()  # struct rusage_info_v0: uuid, then ten numbers
        if ctypes.CDLL(None).proc_pid_rusage(pid, 0, ctypes.byref(usage)) == 0:
            return usage[9]  # ri_phys_footprint
        shown = subprocess.run(["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
        return int(shown.stdout.strip() or 0) << 10
    try:
        with open(f"/proc/{pid}/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def fits(folder: str) -> bool:
    """Whether all in `folder` is little enough. Looks at no more files than may be there."""
    files, size, folders = 0, 0, [folder]
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except OSError:  # gone, or the path is too long
            files += 1
            continue
        with entries:
            for entry in entries:
                files += 1
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    try:
                        size += entry.stat(follow_symlinks=False).st_size
                    except OSError:
                        continue
                if files > FOLDER_FILES or size > FOLDER_BYTES:
                    return False
    return True


def renew(folder: str) -> None:
    """Make `folder` empty again, however deep what was left in it is nested."""
    os.makedirs(folder, exist_ok=True)
    lifted, mark = 0, os.urandom(8).hex()  # names that nobody has taken
    while names := os.listdir(folder):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, 0o700)
                for inner in os.listdir(path):  # a level up, so that no path grows long
                    lifted += 1
                    os.rename(os.path.join(path, inner), os.path.join(folder, f"{mark}-{lifted}"))
                os.rmdir(path)
            else:
                os.unlink(path)
