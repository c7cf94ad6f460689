"""How the server of each backend is started."""

import json
import os
import shutil
import sys
from collections.abc import Sequence

from mlx_distill.evaluate.sandbox import places
from mlx_distill.evaluate.sandbox.child.root import DEVICES, FOLDER_BYTES, WORK
from mlx_distill.evaluate.sandbox.seatbelt import profile

_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from child.server import main; main()"
_UNSHARE = (
    "--user",
    "--map-root-user",
    "--mount",
    "--net",
    "--ipc",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
)


def missing(backend: str) -> str | None:
    """What a backend lacks on this machine, as far as that shows before it is tried."""
    if (sys.platform == "darwin") != (backend == "seatbelt"):
        return "not on this system"
    program = {"bubblewrap": "bwrap", "unshare": "unshare"}.get(backend)
    return None if program is None or shutil.which(program) else f"{program} is not installed"


def command(backend: str, code: str, scratch: str) -> list[str]:
    """What to execute.

    Args:
        code: folder that holds the package `child`.
        scratch: an empty folder of this server's own.
    """
    readable = places.readable()
    setting = {"backend": backend, "scratch": scratch, "readable": readable, "profile": None}
    if backend == "seatbelt":
        setting["profile"] = profile(readable, os.path.join(scratch, "work"))
    # Not -I: it would ignore the hash seed, and sets of strings would differ in order from run to run.
    python = [places.interpreter(), "-s", "-P", "-S", "-B", "-c", _START, code, json.dumps(setting)]
    if backend == "unshare":
        return [shutil.which("unshare") or "unshare", *_UNSHARE, *python]
    if backend == "bubblewrap":
        return [
            shutil.which("bwrap") or "bwrap",
            *bubblewrap([*readable, places.interpreter(), code]),
            *python,
        ]
    return python


def bubblewrap(readable: Sequence[str]) -> list[str]:
    """Arguments of bwrap up to the command: an empty root with `readable` in it, and a folder in memory.

    See https://github.com/containers/bubblewrap/blob/main/bwrap.xml.
    """
    arguments = ["--unshare-all", "--unshare-user", "--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"]
    for path in readable:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind", path, path]
    for device in DEVICES:
        arguments += ["--dev-bind", device, device]
    arguments += ["--size", str(FOLDER_BYTES), "--tmpfs", WORK]
    return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]
