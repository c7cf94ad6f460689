"""Files of rank 0's run folder for the other ranks: a link where they see the same drive, else a copy."""

import os
import shutil
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from mlx_distill.distributed.links import Message
from mlx_distill.distributed.ranks import Ranks

AT_ONCE = 2**26  # bytes of a file that are sent at once


def give(ranks: Ranks, found: Mapping[str, Path]) -> None:
    """Rank 0 lets the others have files under these names in their own folders; what was there goes.

    Args:
        found: files of one folder stand in one folder there, too.
    """
    if ranks.size == 1:
        return
    known = [[name, str(path.absolute()), _known_by(path)] for name, path in sorted(found.items())]
    replies = ranks.share("find", [None, *[known] * (ranks.size - 1)])
    for name, path in sorted(found.items()):
        lacking = [reply is not None and name in reply.value for reply in replies]
        if any(lacking):
            with path.open("rb") as file:
                first = True
                while (content := file.read(AT_ONCE)) or first:
                    part = {"name": name, "first": first}
                    ranks.share("copy", [part if lacks else None for lacks in lacking], data=content)
                    first = False


def find(folder: Path, known: list[list[Any]]) -> Message:
    """Link the folders of which all files are seen from here too; the reply names the files of the others.

    Folders and not files, as a link that leads out of a cache is refused. Nothing is written in them here.
    """
    lacking: list[str] = []

    def parent(one: list[Any]) -> Path:
        return Path(one[0]).parent

    for place, files in groupby(sorted(known, key=parent), key=parent):
        told, mine = list(files), folder / place
        if mine.is_symlink():
            mine.unlink()
        else:
            shutil.rmtree(mine, ignore_errors=True)
        mine.parent.mkdir(parents=True, exist_ok=True)
        if all(is_same(Path(path), by) for _, path, by in told):
            mine.symlink_to(Path(told[0][1]).parent)
        else:
            mine.mkdir()
            lacking += [name for name, *_ in told]
    return Message(lacking)


def write(folder: Path, part: dict[str, Any], content: bytes) -> Message:
    """Take a piece of a file."""
    with open(folder / part["name"], "wb" if part["first"] else "ab") as file:
        file.write(content)
    return Message(None)


def is_same(path: Path, told: list[int]) -> bool:
    """Whether the very file that rank 0 told of is seen here: its number, its size, its last change."""
    try:
        return _known_by(path) == told and os.access(path, os.R_OK)
    except OSError:
        return False


def _known_by(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_ino, about.st_size, about.st_mtime_ns]
