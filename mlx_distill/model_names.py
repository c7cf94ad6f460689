"""What a user calls a model, and what `models.load` opens for it.

    embedded                                         the teacher that comes with the package
    path/to/folder                                   a model folder
    organisation/name                                a repository on the Hub
    quickstart, runs/quickstart                      the student of a run
    quickstart/student-4bit, runs/quickstart/...     another model of that run; `teacher` is the one that its
                                                     recipe names, as it lies on disk

What lies here goes before what may lie on the Hub.
"""

import difflib
import os
from pathlib import Path
from typing import Any

from mlx_distill import recipe
from mlx_distill.errors import ModelError, NotFound
from mlx_distill.hub import is_name
from mlx_distill.odd_files import check_own
from mlx_distill.plain_json import parse_object
from mlx_distill.run_folder import FINGERPRINT, ROOT

STUDENT = "student"
_MADE_BY = {  # beginning of a model's name -> the stage that makes it
    "student-exit": "train",
    "student-": "quantize",
    STUDENT: "train",
    "baseline": "baseline",
    "pruned": "prune",
}


def find_model(name: str, root: Path = ROOT) -> str:
    """The model folder or Hub repository that `name` stands for; nothing is fetched or loaded.

    Args:
        root: where runs lie.

    Raises:
        NotFound: nothing of that name, with the nearest one; or a run that has not made this model yet.
        ModelError: a run without a teacher of its own was asked for it.
    """
    path = Path(os.path.expanduser(name))
    if name == "embedded" or os.path.exists(path / "config.json"):
        return name
    for folder, model in _places(path, root):
        if os.path.isfile(folder / FINGERPRINT):
            check_own(folder)
            return _teacher_of(folder) if model == "teacher" else _model_of(folder, model)
    if name and (os.path.exists(path) or is_name(name)):
        return name
    raise NotFound(
        f"MODEL: no model folder, run or Hub repository (organisation/name) {name!r}{near(name, root)}"
    )


def near(name: str, root: Path = ROOT) -> str:
    """The model here that was probably meant, as the end of a message."""
    runs = {folder.name: folder for folder in _folders(root) if (folder / FINGERPRINT).is_file()}
    models = [f"{run}/{model}" for run, folder in runs.items() for model in _models(folder)]
    here = [folder.name for folder in _folders(Path()) if (folder / "config.json").is_file()]
    found = difflib.get_close_matches(name, ["embedded", *runs, *models, *here], n=1, cutoff=0.6)
    return f"; did you mean `{found[0]}`?" if found else ""


def _places(path: Path, root: Path) -> list[tuple[Path, str]]:
    """The run folders, each with one of its models, that a name may mean."""
    whole = [(folder, STUDENT) for folder in (path, root / path)]
    parts = [folder / path.parent for folder in (Path(), root)]
    parts = [folder.parent if folder.name == "models" else folder for folder in parts]
    return whole + [(folder, path.name) for folder in parts]


def _model_of(folder: Path, model: str) -> str:
    found = folder / "models" / model
    if (found / "config.json").is_file():
        return str(found)
    stage = next((stage for start, stage in _MADE_BY.items() if model.startswith(start)), None)
    stages = _stages(folder)
    if stage is not None and stage not in stages:
        raise NotFound(
            f"MODEL: {folder} has no {model} yet: its stage `{stage}` has not finished; "
            f"go on with `mlx-distill run {folder / 'recipe.yaml'} --resume`"
        )
    if stage is not None and "why" in stages[stage]:
        raise NotFound(f"MODEL: {folder} has no {model}: {stages[stage]['why']}")
    known = ", ".join([*_models(folder), "teacher"])
    raise NotFound(f"MODEL: {folder} has no model {model!r}; there are: {known}")


def _teacher_of(folder: Path) -> str:
    teacher = recipe.load(folder / "recipe.yaml").teacher
    if teacher is None or teacher.model == "student":
        whose = "none" if teacher is None else "the student itself"
        raise ModelError(f"MODEL: the teacher of {folder} is {whose}; name one of its other models")
    return teacher.model


def _stages(folder: Path) -> dict[str, Any]:
    try:
        found = parse_object((folder / "stages.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: result for name, result in found.items() if isinstance(result, dict)}


def _models(folder: Path) -> list[str]:
    return [found.name for found in _folders(folder / "models") if (found / "config.json").is_file()]


def _folders(folder: Path) -> list[Path]:
    """What lies in a folder by a name that a user would give, in order; nothing where there is none."""
    if not folder.is_dir():
        return []
    return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
