"""Checkpoints: everything that a resumed run needs to end with the same bits.

The order of batches and every random number are functions of (seed, purpose, step), so weights,
optimizer and counters are all there is to keep; and, where a run has them, moving averages of the weights
and what an on-policy student wrote, which the counters hold.

`manifest.json` names each file with its size and SHA-256, says with what they were made, and closes with a
digest of itself: a checkpoint is whole or it does not count.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

import mlx_distill
from mlx_distill.blas import threads
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

    Raises:
        OSError: the drive does not take it; checkpoints from before stay as they are.
    """

    def fill(temporary: Path) -> None:
        weights = dict(tree_flatten(student.trainable_parameters()))
        mx.save_safetensors(str(temporary / "weights.safetensors"), weights)
        mx.save_safetensors(str(temporary / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
        for place, average in enumerate(averages):
            mx.save_safetensors(str(temporary / f"average-{place}.safetensors"), average.weights)
        write_manifest(temporary, counters)

    write_folder(folder, fill)


def write_manifest(checkpoint: Path, counters: dict[str, Any]) -> None:
    """Answer for the files that lie in `checkpoint`."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted(checkpoint.glob("*.safetensors"))
    }
    manifest = {"files": files, "made_with": made_with(), "counters": counters}
    write_json(checkpoint / MANIFEST, {**manifest, "sha256": _digest_of(manifest)})


@cache
def made_with() -> dict[str, str]:
    """What the bits depend on beside recipe and data: the same are promised where all of these are equal."""
    device = mx.default_device().type.name
    return {
        "mlx_distill": mlx_distill.__version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "numpy": version("numpy"),  # draws the order of the rows
        "device": f"{device} {mx.device_info().get('device_name', '')}".strip(),
        "os": platform.platform(),
        "blas": mlx_distill.BLAS,
        "blas_threads": str(threads()),
    }


def newest(
    folder: Path, prefix: str, passed_over: Callable[[Path, str], None] = lambda *_: None
) -> Path | None:
    """The newest undamaged checkpoint named `prefix` + `step-NNNNNN`, if there is one.

    Args:
        passed_over: is told of each damaged one that is newer, and what is wrong with it.
    """
    for found in _of_stage(folder, prefix):
        wrong = damage(found)
        if wrong is None:
            return found
        passed_over(found, wrong)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Every byte of it is read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        own, files = manifest.pop("sha256"), manifest["files"]
        if own != _digest_of(manifest):
            return f"{MANIFEST} is not as it was written"
        if not {"weights.safetensors", "optimizer.safetensors"} <= files.keys():
            return f"{MANIFEST} names no weights"
        for name, told in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != told["bytes"]:
                return f"{name} has {file.stat().st_size} bytes in place of {told['bytes']}"
            if _digest(file) != told["sha256"]:
                return f"{name} has another SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def load(checkpoint: Path, student: nn.Module, optimizer: Any, *averages: Average) -> dict[str, Any]:
    """Put weights, optimizer state and averages back in place, and give the counters.

    Raises:
        ValueError: its weights have other names or shapes than those of the student that train.
    """
    weights: Any = mx.load(str(checkpoint / "weights.safetensors"))
    trained: Any = tree_flatten(student.trainable_parameters())
    ours, theirs = ({name: array.shape for name, array in some} for some in (trained, weights.items()))
    if ours != theirs:
        differ = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        raise ValueError(f"{len(differ)} weights differ, such as {differ[0]}")
    student.load_weights(list(weights.items()), strict=False)
    state: Any = mx.load(str(checkpoint / "optimizer.safetensors"))
    optimizer.state = tree_unflatten(list(state.items()))
    for place, average in enumerate(averages):
        stored: Any = mx.load(str(checkpoint / f"average-{place}.safetensors"))
        average.put(stored)
    mx.eval(student.parameters(), optimizer.state, [average.weights for average in averages])
    return _manifest(checkpoint)["counters"]


def differences(checkpoint: Path) -> list[str]:
    """In what this machine differs from the one that made it, such as "mlx 0.32.3, now 0.32.4"."""
    then, now = _manifest(checkpoint).get("made_with", {}), made_with()
    return [f"{name} {then.get(name)}, now {value}" for name, value in now.items() if then.get(name) != value]


def keep_newest(newest: Path, prefix: str, count: int) -> None:
    """Remove a stage's checkpoints but for `newest`, which was just made, and the `count` - 1 before it.

    If the last is damaged, the one before stands in. Those of later steps go too: had they been whole, the
    run had gone on from them.
    """
    every = _of_stage(newest.parent, prefix)
    place = every.index(newest)
    for old in [*every[:place], *every[place + count :]]:
        shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path, prefix: str) -> None:
    """Remove what a killed process left of the checkpoint that it was writing, or replacing."""
    for left in folder.glob(f".{prefix}step-[0-9]*"):
        shutil.rmtree(left, ignore_errors=True)


def _of_stage(folder: Path, prefix: str) -> list[Path]:
    """Checkpoints named `prefix` + `step-NNNNNN`, the newest first."""
    found = [path for path in folder.glob(f"{prefix}step-[0-9]*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
