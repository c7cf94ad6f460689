"""What a program may read: the libraries of the system, and Python's own. Nothing of yours."""

import os
import sys
import sysconfig

LINUX = (
    "/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib",
    "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/nix/store", "/gnu/store",
)  # fmt: skip
MACOS = (
    "/usr/lib", "/usr/share/zoneinfo", "/System/Library", "/System/Volumes/Preboot/Cryptexes",
    "/private/var/db/dyld", "/private/var/db/timezone", "/opt/homebrew/Cellar", "/opt/homebrew/opt",
    "/opt/homebrew/lib", "/usr/local/Cellar", "/usr/local/opt", "/usr/local/lib",
)  # fmt: skip


def interpreter() -> str:
    """The Python that programs run on: the one under a virtual environment, which may lie at home."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def readable() -> list[str]:
    """Files, folders and symbolic links, as they are called on this machine; no folder within another."""
    paths = [path for path in (MACOS if sys.platform == "darwin" else LINUX) if os.path.lexists(path)]
    own = (
        os.path.join(sys.base_prefix, "lib"),
        os.path.join(sys.base_exec_prefix, "lib"),
        sysconfig.get_path("stdlib"),
        sysconfig.get_config_var("DESTSHARED") or "",
    )
    for path in map(os.path.realpath, filter(None, own)):
        if os.path.isdir(path) and path not in paths:
            paths.append(path)
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]
