"""Making, opening and replacing run folders, with all that may be in the way."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_distill
from mlx_distill import recipe
from mlx_distill.console import Console
from mlx_distill.doctor import memory_gib
from mlx_distill.drive import stopped_by
from mlx_distill.errors import DistillError, RunFolderError
from mlx_distill.files import make_folder, partial, write_json, write_text
from mlx_distill.interrupt import Interrupts
from mlx_distill.layout import FINGERPRINT, ROOT
from mlx_distill.lock import LOCK
from mlx_distill.mistakes import shown
from mlx_distill.odd_files import check_own
from mlx_distill.recipe import Recipe
from mlx_distill.run import Run
from mlx_distill.secrets_out import without_secrets

BEFORE = {FINGERPRINT, "recipe.yaml", "environment.json", "memory.json", "probes.json", LOCK}  # any stage


def check_folder(options: Recipe, *, resume: bool, overwrite: bool, root: Path = ROOT) -> None:
    """Refuse a folder that is taken or cannot be written, before anything is read.

    Raises:
        RunFolderError: it exists and neither `resume` nor `overwrite` is given, it is no run folder, or
            it cannot be written; or what no run leaves lies in one that is to go on.
    """
    folder = root / options.name
    parent = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        why = "check its permissions, or run elsewhere" if parent.is_dir() else "it is no folder"
        raise RunFolderError(f"{folder}: {parent} cannot be written; {why}")
    if folder.is_dir() and not _holds_run(folder):
        what = "--overwrite will not remove it" if overwrite else "choose another name with name=..."
        raise RunFolderError(f"{folder} holds other files and is no run folder; {what}")
    if folder.is_dir() and not (resume or overwrite) and os.listdir(folder) != [LOCK]:
        raise RunFolderError(
            f"{folder} holds a run already: go on with --resume, replace it with --overwrite, "
            f"or choose another name with name={options.name}-2"
        )
    for path in folder.iterdir() if folder.is_dir() else ():  # or the first checkpoint would be lost
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise RunFolderError(f"{path} cannot be written; check its permissions")
    if resume:
        check_own(folder)


def _holds_run(folder: Path) -> bool:
    """Whether a folder is a run's, or empty, as one is that was stopped right after it was made."""
    names = {path.name for path in folder.iterdir()}
    return FINGERPRINT in names or names <= {partial(Path(FINGERPRINT)).name, LOCK}


def open_run(
    options: Recipe,
    fingerprint: str,
    console: Console,
    interrupts: Interrupts | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    root: Path = ROOT,
) -> Run:
    """Make `root/NAME`, or open it to go on.

    Args:
        fingerprint: of the recipe and what it reads; a run only goes on with its own.
        interrupts: the signals that the run heeds.

    Raises:
        RunFolderError: as `check_folder`, or it holds another recipe's run.
    """
    check_folder(options, resume=resume, overwrite=overwrite, root=root)
    folder = root / options.name
    if not overwrite:
        check_same(folder, options, fingerprint)
    try:
        if overwrite and folder.exists():
            _refuse_own_inputs(folder, options)
            _empty(folder)
        make_folder(folder)
        write_text(folder / FINGERPRINT, fingerprint + "\n")
        write_text(folder / "recipe.yaml", recipe.dump(options))
        write_json(folder / "environment.json", environment())
    except RunFolderError:
        raise
    except OSError as error:
        why = f"{folder}: cannot be written ({error.strerror or error}); check its permissions"
        raise stopped_by(error) or RunFolderError(why) from None
    return Run(folder, console, interrupts)


def _empty(folder: Path) -> None:
    """Remove all that a run left but the lock, which is this one's.

    First the word that stages have finished, so that a kill in between leaves none that lacks its results,
    and last what makes the folder a run's.
    """
    if folder.is_symlink():
        raise OSError("it is a link")
    (folder / "stages.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == FINGERPRINT):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def nothing_left_before_a_stage(folder: Path) -> Iterator[None]:
    """Remove a run's folder again where the block is refused, or stopped, before a stage has begun.

    Nothing was made by then, so the next try, with another recipe perhaps, does not find a run in its way.
    """
    try:
        yield
    except DistillError:
        if set(os.listdir(folder)) <= BEFORE:
            with suppress(OSError):
                _empty(folder)  # the lock goes with the one who holds it, and the folder with the lock
        raise


def check_same(folder: Path, options: Recipe, fingerprint: str) -> None:
    """Refuse to go on with another recipe's run.

    Raises:
        RunFolderError: in what the two differ.
    """
    known = folder / FINGERPRINT
    try:
        found = known.read_text(errors="replace", encoding="utf-8").strip()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFolderError(
            f"{known}: cannot be read ({error.strerror}); start anew with --overwrite"
        ) from None
    if found != fingerprint:
        raise RunFolderError(
            f"{folder} was made {_difference(folder, options)}; "
            "start anew with --overwrite, or choose another name with name=..."
        )


def _refuse_own_inputs(folder: Path, options: Recipe) -> None:
    """Refuse to remove a folder that the recipe itself reads from."""
    data = [getattr(options.data, key) for key in ("train", "prompts", "valid", "test")]
    data.append(options.generate.examples)
    data += options.data.replay
    read = [options.student.model, options.student.prune and options.student.prune.model]
    read += [name for teacher in options.teachers.values() for name in (teacher.model, teacher.cache)]
    for name in [*read, *(source.source for source in data if source)]:
        if name and Path(name).resolve().is_relative_to(folder.resolve()):
            raise RunFolderError(f"{folder} holds {name}, which the recipe reads; choose another name=...")


def _difference(folder: Path, options: Recipe) -> str:
    """In what a run differs from the one that would go on: the first option, or what it read."""
    try:
        before = recipe.determining(recipe.load(folder / "recipe.yaml"))
    except DistillError:  # an unreadable recipe differs as a whole
        return "by another recipe"

    def walk(left: Any, right: Any, path: str) -> str | None:
        if isinstance(left, dict) and isinstance(right, dict):
            keys = [*left, *(key for key in right if key not in left)]
            pairs = (walk(left.get(key), right.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
            return next((found for found in pairs if found), None)
        return None if left == right else f"`{path}` was {shown(left)} and is {shown(right)}"

    found = walk(before, recipe.determining(options), "")
    return (
        f"by another recipe ({found})" if found else "with other data or other weights under the same names"
    )


def environment() -> dict[str, Any]:
    """What ran and where, for the folder and every report."""
    info = mx.device_info()
    return {
        "command": _command(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "mlx_distill": mlx_distill.__version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": f"{mx.default_device().type.name} {info.get('device_name', '')}".strip(),
        "cores": os.cpu_count(),
        "memory_gib": (gib := memory_gib()) and round(gib, 2),
        "blas": mlx_distill.BLAS,
        "commit": _commit(),
    }


def _command() -> str:
    """What was typed, so that it can be typed again; without the secrets in it."""
    program = Path(sys.argv[0]).name
    started = ["python", "-m", "mlx_distill"] if program == "__main__.py" else [program]
    typed = shlex.join([*started, *map(without_secrets, sys.argv[1:])])
    return typed.encode("utf-8", "backslashreplace").decode()  # a name may hold what is no UTF-8


def _commit() -> str | None:
    """The commit of this package's own checkout; null where it was installed without one."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
