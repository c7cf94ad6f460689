"""Checkpoints: everything that a resumed run needs to end with the same bits.

The order of batches and every random number are functions of (seed, purpose, step), so weights,
optimizer and counters are all there is to keep; and, where a run has them, moving averages of the weights
and what an on-policy student wrote, which the counters hold.
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
from mlx_distill.self_teacher import Average

MANIFEST = "manifest.json"


def save(
    folder: Path, student: nn.Module, optimizer: Any, counters: dict[str, Any], *averages: Average
) -> None:
    """Write a checkpoint folder, complete or absent.

    Args:
        counters: plain values; they come back from `load` as they are.
        averages: of the student's weights.
    """

    def fill(temporary: Path) -> None:
        weights = dict(tree_flatten(student.trainable_parameters()))
        mx.save_safetensors(str(temporary / "weights.safetensors"), weights)
        mx.save_safetensors(str(temporary / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
        for place, average in enumerate(averages):
            mx.save_safetensors(str(temporary / f"average-{place}.safetensors"), average.weights)
        files = {file.name: _digest(file) for file in sorted(temporary.glob("*.safetensors"))}
        manifest = {"files": files, "counters": counters}
        write_json(temporary / MANIFEST, {**manifest, "sha256": _digest_of(manifest)})

    write_folder(folder, fill)


def newest(folder: Path, prefix: str) -> Path | None:
    """The newest undamaged checkpoint named `prefix` + `step-NNNNNN`, if there is one."""
    return next((found for found in _of_stage(folder, prefix) if is_complete(found)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file has the digest that the manifest gives, and the manifest its own."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        own = manifest.pop("sha256")
        right = all(_digest(checkpoint / name) == digest for name, digest in manifest["files"].items())
        return right and own == _digest_of(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def load(checkpoint: Path, student: nn.Module, optimizer: Any, *averages: Average) -> dict[str, Any]:
    """Put weights, optimizer state and averages back in place, and give the counters."""
    student.load_weights(str(checkpoint / "weights.safetensors"), strict=False)
    state: Any = mx.load(str(checkpoint / "optimizer.safetensors"))
    optimizer.state = tree_unflatten(list(state.items()))
    for place, average in enumerate(averages):
        stored: Any = mx.load(str(checkpoint / f"average-{place}.safetensors"))
        average.put(stored)
    mx.eval(student.parameters(), optimizer.state, [average.weights for average in averages])
    return json.loads((checkpoint / MANIFEST).read_text())["counters"]


def keep_newest(folder: Path, prefix: str, count: int = 2) -> None:
    """Remove all but the newest checkpoints of a stage: if the last is damaged, the one before stands in."""
    for old in _of_stage(folder, prefix)[count:]:
        shutil.rmtree(old, ignore_errors=True)


def _of_stage(folder: Path, prefix: str) -> list[Path]:
    """Checkpoints named `prefix` + `step-NNNNNN`, the newest first."""
    found = folder.glob(f"{prefix}step-[0-9]*")
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
