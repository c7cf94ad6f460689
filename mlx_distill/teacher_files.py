"""The folders of models before their weights are read: tokenizers compared, digests, caches."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.cache.contents import contents_of
from mlx_distill.data.template import has_chat_template
from mlx_distill.data.vocabularies import token_bytes
from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.hub import model_folder
from mlx_distill.layer_checks import layers_of
from mlx_distill.losses.menu import MENU
from mlx_distill.models import load_tokenizer
from mlx_distill.models.headers import config_of
from mlx_distill.quantize.teacher import check_teachers
from mlx_distill.recipe import Recipe, fingerprint
from mlx_distill.teacher import check_same_vocabulary


@dataclass
class TeacherFiles:
    """A teacher before its weights are read."""

    folder: Path | None  # None: a new student, which stands nowhere
    tokenizer: Any
    vocabulary: int  # real size of the tokenizer
    foreign: bool  # its vocabulary is not the student's


def model_folders(
    recipe: Recipe,
    wanted: Callable[[str], bool],
    *,
    trust: bool = False,
    folder_of: Callable[..., Path] = model_folder,
) -> dict[str, Path]:
    """Folders of the models that the recipe loads, and that are wanted by name; their files are checked.

    Under `student` stands what the student is loaded from, or cut out of.

    Args:
        trust: tokenizers may be Python code.
        folder_of: finds them, as `hub.model_folder` does.
    """
    named = {key: one.model for key, one in recipe.teachers.items() if key not in recipe.self_taught}
    prune, places = recipe.student.prune, {key: f"{key}.model" for key in named}
    if recipe.student.model is not None:
        named["student"], places["student"] = recipe.student.model, "student.model"
    if prune is not None and prune.model is not None:
        named["student"], places["student"] = prune.model, "student.prune.model"
    found = {key: folder_of(name, places[key], trust=trust) for key, name in named.items() if wanted(name)}
    check_teachers(recipe, found)
    if prune is not None and prune.model is None and "teacher" in found:
        found["student"] = found["teacher"]
    return found | {key: found["student"] for key in recipe.self_taught if "student" in found}


def teachers_of(
    recipe: Recipe, folders: dict[str, Path], own: Any | None, *, trust: bool = False
) -> tuple[dict[str, TeacherFiles], Any]:
    """Each teacher with its tokenizer compared, and the tokenizer that the student trains with.

    Args:
        own: the tokenizer of a loaded student, or the one trained for a new one; None: the teacher's.
        trust: tokenizers may be Python code.
    """
    others = [key for key in recipe.teachers if key not in recipe.self_taught]
    loaded = {key: load_tokenizer(folders[key], trust=trust) for key in others}
    tokenizer = own if own is not None else loaded["teacher"]
    loaded = {key: loaded.get(key, tokenizer) for key in recipe.teachers}
    teachers = {}
    for key, theirs in loaded.items():
        foreign = tokenizer.get_vocab() != theirs.get_vocab()
        if foreign and not recipe.across_tokenizers:
            check_same_vocabulary(tokenizer, theirs)
        if foreign:
            _check_alignable(tokenizer, "student")
            _check_alignable(theirs, f"{key}.model")
        size = max(theirs.get_vocab().values()) + 1
        teachers[key] = TeacherFiles(folders.get(key), theirs, size, foreign)
    over_one = [
        name for name in recipe.objective if MENU[name].needs_teacher and MENU[name].family != "spans"
    ]
    if over_one and all(teacher.foreign for teacher in teachers.values()):
        raise RecipeError(
            f"`objective.{over_one[0]}` compares over one vocabulary, and no teacher has the student's; "
            "use `cross_tokenizer` alone"
        )
    if recipe.across_tokenizers and not any(teacher.foreign for teacher in teachers.values()):
        raise RecipeError(
            "`objective.cross_tokenizer`: teacher and student have one vocabulary; use `forward_kl`, which "
            "is exact there"
        )
    # The teacher answers in its own chat template, so the student learns that one, end of turn included.
    first = teachers.get("teacher")
    if first is None or first.foreign:
        return teachers, tokenizer
    keep = has_chat_template(tokenizer) and not has_chat_template(first.tokenizer)
    return teachers, tokenizer if keep else first.tokenizer


def caches_of(
    recipe: Recipe,
    folders: dict[str, Path],
    teachers: dict[str, TeacherFiles],
    tokenizer: Any,
    pruned: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """What the cache of each teacher that has one must be made of.

    Args:
        pruned: config of the student, if it is to be cut out.
    """
    shape = recipe.student.shape

    def depth(folder: Path | None) -> int | None:
        if folder is not None:
            return layers_of(config_of(folder))
        return None if shape is None else shape.num_hidden_layers

    own = depth(folders.get("student")) if pruned is None else layers_of(pruned)

    return {
        place: contents_of(
            recipe,
            place,
            weights=fingerprint(recipe) if files.folder is None else digest_of(files.folder),
            tokenizer=tokenizer,
            vocabulary=files.vocabulary,
            layers=(own, own if place in recipe.self_taught else depth(files.folder)),
        )
        for place, files in teachers.items()
        if recipe.teachers[place].source == "cache"
    }


def _check_alignable(tokenizer: Any, place: str) -> None:
    try:
        token_bytes(tokenizer)
    except ValueError as error:
        raise ModelError(f"`objective.cross_tokenizer`: `{place}`: {error}") from None


def check_tokenizer_files(student: Path, teacher: Path) -> None:
    """Compare two tokenizer.json, where both are there: transformers, which loads any, takes a second."""
    from tokenizers import Tokenizer

    files = [folder / "tokenizer.json" for folder in (student, teacher)]
    if all(file.is_file() for file in files):
        try:
            ours, theirs = (Tokenizer.from_file(str(file)) for file in files)
        except Exception:  # the loader, which knows more forms, will say what is wrong
            return
        check_same_vocabulary(ours, theirs)


def digest_of(folder: Path) -> str:
    """SHA-256 of a model's config and of both ends of its weight files: other weights differ everywhere."""
    whole = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        whole.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            whole.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            whole.update(file.read())
    return whole.hexdigest()
