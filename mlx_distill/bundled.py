"""The recipes that come with the package: found by name, listed, copied."""

import shutil
from pathlib import Path

from mlx_distill.errors import NotFound, RecipeError


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
    """A recipe file: `name` itself where it is one, else the bundled recipe of that name."""
    path = Path(name)
    if not path.is_file() and path.suffix not in (".yaml", ".yml") and not path.is_absolute():
        bundled = recipes_folder() / f"{name}.yaml"
        if bundled.is_file():
            return bundled
    return path


def copy_recipe(name: str, to: Path) -> Path:
    """Copy a bundled recipe into a folder, and give its new path.

    Raises:
        NotFound: no such recipe. RecipeError: a file of that name is there already.
    """
    source = recipes_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not source.is_file():
        known = ", ".join(found for found, _ in list_recipes())
        raise NotFound(f"no bundled recipe `{name}`; there are: {known}")
    target = to / source.name
    if target.exists():
        raise RecipeError(f"{target} exists already; move it away first")
    shutil.copy(source, target)
    return target
