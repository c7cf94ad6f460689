"""macOS: the rules by which the kernel holds a program, in the language of `sandbox-exec`.

They are put on by each program's process after it was forked (`child/confine.py`), not by `sandbox-exec`
around the server: the server has to fork and to end programs, and they may do neither. `sandbox_init` is
the function of the system that stands behind `sandbox-exec`.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

_NUMBERS = ("hw.activecpu", "hw.logicalcpu", "hw.logicalcpu_max", "hw.ncpu", "hw.pagesize", "kern.osrelease")


def profile(readable: Sequence[str], work: str) -> str:
    """The rules for a program. Later ones win.

    Args:
        readable: folders that it may read and load libraries from.
        work: the one folder in which it may write; its real path, such as /private/var/... .
    """
    folders = "\n".join(f"  (subpath {quoted(path)})" for path in readable)
    above = sorted({str(one) for path in (*readable, work) for one in PurePosixPath(path).parents})
    ancestors = "\n".join(f"  (literal {quoted(path)})" for path in above)
    numbers = "\n".join(f"  (sysctl-name {quoted(name)})" for name in _NUMBERS)
    return f"""(version 1)
(deny default)
(allow file-read*
{folders})
(allow file-map-executable
{folders})
(allow file-read-metadata
{ancestors})
(allow file-read*
  (literal "/dev/null")
  (literal "/dev/random")
  (literal "/dev/urandom")
  (literal "/dev/zero"))
(allow file-write-data
  (literal "/dev/null"))
(allow file-read* file-write-create file-write-data file-write-unlink
  (subpath {quoted(work)}))
(allow sysctl-read
{numbers})
(allow process-info* (target self))
(allow signal (target self))
(deny process-fork)
(deny process-exec*)
(deny network*)
(deny mach-lookup)
(deny mach-register)
(deny ipc-posix*)
(deny ipc-sysv*)
"""


def quoted(path: str) -> str:
    """A string of the rules' language, which is a Scheme: a backslash stands before `"` and itself.

    Raises:
        ValueError: a control character, for which there is no sure way to write it.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ValueError(f"{path!r}: no rule can be written for a path with control characters")
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
