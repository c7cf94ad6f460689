"""What tests of the sandbox share: its backends, and copies of its code with a guard removed."""

import functools
import shutil
from pathlib import Path

import pytest

from mlx_distill.evaluate.sandbox import backends, worker

# The last way is what stays of "limits" on macOS, where there is neither seccomp nor RLIMIT_AS.
WAYS = ["bubblewrap", "unshare", "landlock", "limits", "limits as on macOS"]
AS_ON_MACOS = ("limits.py", 'LINUX = sys.platform == "linux"', "LINUX = False")


def broken(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """A copy of the code that runs in the sandbox, with changes (file, text, what stands there instead)."""
    code = folder / "code"
    shutil.copytree(worker.CODE / "child", code / "child")
    for name, old, new in changes:
        path = code / "child" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new), encoding="utf-8")
    return code


def skip_without(kind: str) -> None:
    why = why_not(kind)
    if why is not None:
        pytest.skip(f"no {kind} here: {why}")


@functools.cache
def why_not(kind: str) -> str | None:
    return backends.missing(kind) or backends.hole(kind)


def use(way: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make `sandbox.run` use one backend."""
    if not way.startswith("limits"):
        skip_without(way)
    if way == "limits as on macOS":
        monkeypatch.setattr(worker, "CODE", broken(folder, AS_ON_MACOS))
    monkeypatch.setattr(backends, "require", lambda unsafe: way.split()[0])
