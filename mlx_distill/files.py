"""Files that are complete or absent, whatever kills the process."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What MLX says where a write, or opening a file for it, fails; it gives no reason.
_MLX_CANNOT_WRITE = ("Unable to write", "Failed to open")


def write_text(path: Path, text: str) -> None:
    """Replace a file by a complete new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by a complete new one; where that fails, as on a full drive, nothing is left behind."""
    temporary = partial(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            flush(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a failed write names no file
        raise
    flush_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it stands in, each name of them on the drive."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_path(folder.parent)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` appear whole: filled under another name, flushed, then renamed.

    An older folder of that name is removed last. Where the drive does not take it all, nothing is left
    behind, and the older one stays; so it does where a kill came between the two renames, once this is tried
    again.

    Raises:
        OSError: with the drive's own reason, also where MLX wrote, which gives none.
    """
    make_folder(folder.parent)
    temporary, old = partial(folder), folder.with_name(f".{folder.name}.old")
    _put_back(old, folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        for path in sorted(temporary.rglob("*")):
            flush_path(path)
        flush_path(temporary)
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _MLX_CANNOT_WRITE):
            error = _reason(temporary, error)
        shutil.rmtree(temporary, ignore_errors=True)
        raise error
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except Exception:  # a drive that fails, or a signal
        _put_back(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, folder: Path) -> None:
    """Give a folder that was put aside its name again, if no other has taken it."""
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def partial(path: Path) -> Path:
    """What a file or folder is called until it is whole."""
    return path.with_name(f".{path.name}.part")


def flush(descriptor: int) -> None:
    """Put what was written on the drive; on macOS plain fsync leaves it in the drive's own cache."""
    if sys.platform != "darwin":
        os.fsync(descriptor)
        return
    import fcntl

    try:
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    except OSError as error:
        # Shares of other machines and foreign file systems may not know it.
        if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
            raise
        os.fsync(descriptor)


def flush_path(path: Path) -> None:
    """Put a file on the drive, or the names that a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def _reason(folder: Path, error: RuntimeError) -> OSError:
    """Why MLX could not write: what the drive says to a small file, or else that it fails."""
    try:
        write_bytes(folder / "probe", bytes(2**20))
    except OSError as found:
        return found
    return OSError(errno.EIO, str(error), str(folder))
