"""Files that are complete or absent, whatever kills the process."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file by a complete new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by a complete new one; where that fails, as on a full drive, nothing is left behind."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            flush(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` appear whole: filled under another name, flushed, then renamed.

    An older folder of that name is removed last.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            flush(descriptor)
            os.close(descriptor)
    flush_folder(temporary)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(descriptor: int) -> None:
    """Put what was written on the drive; on macOS plain fsync leaves it in the drive's own cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
