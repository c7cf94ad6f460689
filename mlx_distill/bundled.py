"""The recipes that come with the package: found by name, listed, copied."""

import difflib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from mlx_distill.drive import stopped_by
from mlx_distill.errors import NotFound, RecipeError, RunFolderError


def recipes_folder() -> Path:
    """The folder with the bundled recipes, `README.md` files included.

    A wheel carries them inside the package; in a clone they stand beside it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise NotFound(f"{package}: the bundled recipes are missing; install mlx-distill again")


def list_recipes() -> list[tuple[str, str]]:
    """Name and first comment of each bundled recipe, such as ("summarization/pocket", "...")."""
    folder, found = recipes_folder(), []
    for file in sorted(folder.rglob("*.yaml")):
        first = file.read_text(encoding="utf-8").split("\n", 1)[0]
        found.append((str(file.relative_to(folder).with_suffix("")), first.removeprefix("#").strip()))
    return found


def find_recipe(name: str) -> Path:
    """A recipe file: `name` itself where it is one, else the bundled recipe of that name.

    Raises:
        NotFound: neither, and there is one of nearly this name.
    """
    path = Path(name)
    if not os.path.isfile(path) and path.suffix not in (".yaml", ".yml") and not path.is_absolute():
        bundled = recipes_folder() / f"{name}.yaml"
        if os.path.isfile(bundled):
            return bundled
    if not os.path.exists(path) and (near := _near(name, path.parent.glob("*.y*ml"))):
        raise NotFound(f"{name}: no such recipe; did you mean {near}?")
    return path


def _near(name: str, files: Iterable[Path] = ()) -> str:
    """The bundled recipes, or one of `files`, that were probably meant; "" where none is near."""
    bundled = [found for found, _ in list_recipes()]
    ends = [found for found in bundled if found.rpartition("/")[2] == Path(name).stem]
    bare = {str(file.with_suffix("")): str(file) for file in files} | {found: found for found in bundled}
    close = difflib.get_close_matches(re.sub(r"\.ya?ml$", "", name), bare, n=1, cutoff=0.6)
    return " or ".join(f"`{found}`" for found in ends or [bare[found] for found in close])


def copy_recipe(name: str, to: Path) -> Path:
    """Copy a bundled recipe into a folder, and give its new path.

    Raises:
        NotFound: no such recipe. RecipeError: a file of that name is there already.
        RunFolderError: the folder cannot be written.
    """
    source = recipes_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not os.path.isfile(source):
        near = _near(name)
        known = "there are: " + ", ".join(found for found, _ in list_recipes())
        raise NotFound(f"no bundled recipe `{name}`; {f'did you mean {near}?' if near else known}")
    target = to / source.name
    if target.exists():
        raise RecipeError(f"{target} exists already; move it away first")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        unwritable = RunFolderError(f"{target}: cannot be written ({error.strerror}); run elsewhere")
        raise stopped_by(error) or unwritable from None
    return target
