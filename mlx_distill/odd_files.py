"""What lies where a file is expected, asked before it is opened.

A pipe waits for a writer, and a device has no end. A folder that a run or a cache made holds neither, and a
link in it that leads outside would have us read there, or write.
"""

import os
import stat
from pathlib import Path

from mlx_distill.errors import RunFolderError

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_FILES = (".json", ".jsonl", ".safetensors", ".npy", ".sha256", ".txt", ".yaml", ".html", "fingerprint")


def odd(path: str | Path) -> str | None:
    """What a path leads to, such as "a pipe"; None for a file, a folder, and what is not there."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # whoever opens it will say why
        return None


def odd_in(folder: Path) -> str | None:
    """The first thing below `folder` that no run and no cache leaves there: "runs/x/log.txt is a pipe".

    `folder` itself may be a link, as to a bigger drive.
    """
    whole = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path):
                real = os.path.realpath(path)
                if os.path.islink(real) or os.path.commonpath((whole, real)) != whole:  # a loop, or outside
                    return f"{path} is a link that leads out of the folder"
            if found := odd(path):
                return f"{path} is {found}"
            if os.path.isdir(path) and name.endswith(_FILES):
                return f"{path} is a folder, in place of a file"
    return None


def check_own(folder: Path) -> None:
    """Refuse a run folder with what no run leaves in it; one that does not exist passes.

    Raises:
        RunFolderError: the first such thing.
    """
    if found := odd_in(folder):
        raise RunFolderError(f"{found}, which no run leaves there; remove it")
