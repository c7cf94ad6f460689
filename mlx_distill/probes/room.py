"""Whether the drive has room for what a run leaves behind, before its first stage."""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from mlx_distill.errors import RunFolderError
from mlx_distill.memory import Estimate
from mlx_distill.recipe import Recipe

GIB = 2**30


def check_room(
    folder: Path, recipe: Recipe, needed: Mapping[str, float], *, guessed: Collection[str] = ()
) -> str | None:
    """A line where a run will take more than four fifths of the free space.

    Args:
        folder: of the run, which may hold a part of it already, or one that will be replaced.
        needed: GiB of caches, checkpoints and models.
        guessed: which of them may be less in the end, and so are no reason to refuse.

    Raises:
        RunFolderError: it takes more than there is.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = (shutil.disk_usage(place).free + _size(folder)) / GIB
    parts = ", ".join(f"{name} {gib:.2g}" for name, gib in needed.items() if gib)
    whole = sum(needed.values())
    told = f"{folder}: {whole:.2g} GiB are needed on the drive ({parts}), and {free:.2g} GiB are free"
    if whole - sum(needed.get(name, 0.0) for name in guessed) > free:
        fewer = f", keep fewer checkpoints with train.keep=1 (now {recipe.train.keep})"
        raise RunFolderError(
            f"{told}; make room{fewer if recipe.train.keep > 1 else ''}, or run on another drive"
        )
    return told if whole > 0.8 * free else None


def needed_gib(recipe: Recipe, memory: Estimate) -> dict[str, float]:
    """What a run keeps on the drive at its fullest, in GiB: of each kind."""
    averaged = sum(teacher.ema is not None for teacher in recipe.teachers.values())
    checkpoint = memory.gradients * (1 + averaged) + memory.moments  # as many weights move as have gradients
    saves = recipe.train.steps // recipe.train.save_every if recipe.train.save_every else 0
    baseline = recipe.evaluate.baseline and recipe.teacher is not None
    # One more than are kept, while the newest is being written. A stage's stay when the next begins.
    kept = min(saves, recipe.train.keep) * (1 + baseline) + (saves > 0)
    models = 1 + baseline + (recipe.student.prune is not None)
    widths = [] if recipe.quantize is None else recipe.quantize.widths
    few = [(bits + 1) / 32 for bits in widths]  # with scales
    return {"checkpoints": kept * checkpoint, "models": (models + sum(few)) * memory.weights}


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    found = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(path, name)).st_size
            except OSError:  # gone in the meantime
                continue
    return found
