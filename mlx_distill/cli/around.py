"""What happens around the work of a command: what is read first, said aloud, and said when it stops."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlx_distill.errors import DistillError, RecipeError, RunFolderError
from mlx_distill.interrupt import RESUMABLE
from mlx_distill.terminal import Lasting

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe


def load(recipe: str, overrides: list[str] | None) -> "Recipe":
    """A recipe by its file or bundled name, with its overrides, checked."""
    from mlx_distill.bundled import find_recipe
    from mlx_distill.recipe import load

    return load(find_recipe(recipe), overrides or ())


def load_several(words: Sequence[str]) -> list["Recipe"]:
    """The recipes among words of which some are overrides, for all of them."""
    overrides = [word for word in words if "=" in word]
    return [load(word, overrides) for word in words if "=" not in word]


def refuse_if_launched(what: str) -> None:
    """Raises `RecipeError` where this process is one of several of `mlx.launch`."""
    from mlx_distill.distributed.joining import launched

    if launched():
        raise RecipeError(f"`{what}` works in one process; start it without mlx.launch")


def supervised(words: Sequence[str], *, supervise: bool, caffeinate: bool, several: bool = False) -> None:
    """Keep the Mac awake, and let another process do the work, where that is asked for.

    Args:
        words: recipes and overrides.
        several: each recipe makes all the runs of its `compress` section.

    Raises:
        typer.Exit: the other process has ended; with its code.
    """
    from mlx_distill import supervise as supervisor

    if caffeinate:
        supervisor.keep_awake()
    if not supervise:
        return
    refuse_if_launched("--supervise")
    runs = load_several(words)
    if several:
        from mlx_distill.compress import derived

        runs = [run for recipe in runs for run in derived(recipe)]
    from mlx_distill.layout import ROOT

    caches = [teacher.cache for run in runs for teacher in run.teachers.values()]
    stores = [Path(os.path.expanduser(cache)) for cache in caches if cache is not None]
    first, again = (supervisor.arguments(sys.argv[1:], go_on=go_on) for go_on in (False, True))
    script = Path(sys.argv[0])
    named = script.name == "mlx-distill" and script.is_file()
    program = [str(script)] if named else [sys.executable, "-m", "mlx_distill"]
    folders = [ROOT / run.name for run in runs]
    raise typer.Exit(supervisor.supervise([*program, *first], [*program, *again], folders, stores))


def check_temporary() -> None:
    """Refuse a folder for temporary files that is none: MLX compiles there, in the midst of a run.

    Raises:
        RunFolderError: with the variable that names it.
    """
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # of which C++ takes the first that is set
    name = next((name for name in names if name in os.environ), None)
    if name is not None and not os.access(os.path.join(os.environ[name], ""), os.W_OK | os.X_OK):
        what = f"{name}={os.environ[name]}: no folder that can be written"
        raise RunFolderError(f"{what}, and MLX compiles there; make it, or unset {name}")


def told(trust: bool) -> bool:
    """Whether code of models may run; if so, it is said aloud, whatever else is shown."""
    if trust:
        tell("--trust-remote-code: tokenizers of these models may run Python code, with all that you may do")
    return trust


def tell(line: str) -> None:
    """Print to stderr, if anybody is still there."""
    print(line, file=Lasting(sys.stderr))


@contextmanager
def going_on(folder: Path | None = None, *, again: bool = False) -> Iterator[None]:
    """Where the block stops so that it can go on, say with which command: the one that was typed.

    Args:
        folder: must be there; without it nothing has begun that could go on.
        again: the command goes on by itself.
    """
    try:
        yield
    except DistillError as error:
        if error.exit_code in RESUMABLE and (folder is None or folder.exists()):
            words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
            tell(f"go on with: {_program()} {shlex.join(words + ([] if again else ['--resume']))}")
        raise


def _program() -> str:
    """How this program was started, for commands to copy."""
    if Path(sys.argv[0]).name == "mlx-distill":
        return "mlx-distill"
    return shlex.join([sys.executable, "-m", "mlx_distill"])
