"""What a run leaves on the drive, known before it begins."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.cache.tokens import TokenCode
from mlx_distill.cache.values import BITS
from mlx_distill.preflight import Prepared
from mlx_distill.probes.room import needed_gib
from mlx_distill.recipe import Recipe

GIB = 2**30


def needed(recipe: Recipe, prepared: Prepared) -> dict[str, float]:
    """GiB of caches, checkpoints and models; nothing where there are none."""
    found = needed_gib(recipe, prepared.memory)
    places = counted_labels(recipe, prepared)
    cached = sum(places * bytes_of(made_of) for made_of in prepared.caches.values())
    return {name: gib for name, gib in {"caches": cached / GIB, **found}.items() if gib}


def guessed(prepared: Prepared) -> set[str]:
    """What of that may be less in the end: caches of answers still to be written, or that others fill."""
    shared = any(prepared.recipe.teachers[place].cache is not None for place in prepared.caches)
    return {"caches"} if prepared.prompts or shared else set()


def counted_labels(recipe: Recipe, prepared: Prepared) -> int:
    """Labels whose targets are stored; of answers still to be written, as if each had its full length."""
    rows = [row for rows in (prepared.train, *(rows for _, rows in prepared.replay.values())) for row in rows]
    answers = len(prepared.prompts) * recipe.generate.samples * recipe.generate.max_tokens
    return sum(len(row.tokens) - row.start for row in rows) + answers


def bytes_of(made_of: dict[str, Any]) -> float:
    """Bytes that a cache takes for a label, by the formulas of its own codes.

    Which tokens are frequent nobody knows yet; numbered by frequency they take less.

    Args:
        made_of: the manifest.
    """
    size, kept = made_of["vocabulary"], made_of["top_k"] or made_of["sampled"]
    code = TokenCode.plain(size, kept)
    share = 2.0**code.widths / np.sum(2.0**code.widths)  # of the tokens in each run
    low = kept / 8 * np.sum(share * code.widths)
    found = code.high_bytes(kept) + float(low)
    if made_of["precision"] == "exact":
        found += 4 * kept + 4
    elif made_of["precision"] == "compact":
        found += -(-kept * BITS // 8) + 1 + 2
    return found


def free_gib(folder: Path) -> float:
    """GiB that are free on the drive of a folder, which need not exist."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free / GIB
