"""Checkpoints: everything that a resumed run needs to end with the same bits.

The order of batches and every random number are functions of (seed, purpose, step), so weights,
optimizer and counters are all there is to keep.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.files import write_folder, write_json

MANIFEST = "manifest.json"


def save(folder: Path, student: nn.Module, optimizer: Any, counters: dict[str, float]) -> None:
    """Write a checkpoint folder, complete or absent.

    Args:
        counters: plain numbers; they come back from `load` as they are.
    """

    def fill(temporary: Path) -> None:
        weights = dict(tree_flatten(student.trainable_parameters()))
        mx.save_safetensors(str(temporary / "weights.safetensors"), weights)
        mx.save_safetensors(str(temporary / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
        files = {file.name: _digest(file) for file in sorted(temporary.glob("*.safetensors"))}
        write_json(temporary / MANIFEST, {"files": files, "counters": counters})

    write_folder(folder, fill)


def newest(folder: Path, prefix: str) -> Path | None:
    """The newest undamaged checkpoint named `prefix` + `step-NNNNNN`, if there is one."""
    found = sorted(folder.glob(f"{prefix}step-[0-9]*"), reverse=True)
    return next((checkpoint for checkpoint in found if is_complete(checkpoint)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file has the digest that the manifest gives."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return all(_digest(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def load(checkpoint: Path, student: nn.Module, optimizer: Any) -> dict[str, float]:
    """Put weights and optimizer state back in place, and give the counters."""
    student.load_weights(str(checkpoint / "weights.safetensors"), strict=False)
    optimizer.state = tree_unflatten(list(mx.load(str(checkpoint / "optimizer.safetensors")).items()))
    mx.eval(student.parameters(), optimizer.state)
    return json.loads((checkpoint / MANIFEST).read_text())["counters"]


def keep_only(checkpoint: Path, prefix: str) -> None:
    """Remove the other checkpoints of a stage, once this one is on the drive."""
    for other in checkpoint.parent.glob(f"{prefix}step-[0-9]*"):
        if other != checkpoint:
            shutil.rmtree(other, ignore_errors=True)


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
