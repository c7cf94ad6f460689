"""A model folder seen by a fresh process, which opens it with plain `mlx_lm.load`.

`python -m mlx_distill.evaluate.fresh FOLDER SCRATCH` is the child; `fresh_look` starts it. In a process of
its own a folder cannot lean on what is left in memory, and memory can be measured.
"""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.errors import Fault
from mlx_distill.files import write_text


class FreshLook(NamedTuple):
    """What a fresh process found."""

    logits: np.ndarray  # (T, V) float32, for the probe
    tokens: list[int]  # what its tokenizer makes of `text`


class Scratch(NamedTuple):
    """The folder through which a fresh process is asked and answers."""

    folder: Path

    def request(self) -> dict[str, Any]:
        return json.loads((self.folder / "request.json").read_text(encoding="utf-8"))

    def answer(self, found: dict[str, Any]) -> None:
        """Answer, or answer anew with more: what was said stays if the process ends here."""
        write_text(self.folder / "answer.json", json.dumps(found))

    @property
    def logits(self) -> Path:
        return self.folder / "logits.npy"


def ask(module: str, folder: Path, request: dict[str, Any], scratch: Scratch) -> tuple[dict[str, Any], str]:
    """Run a module on a model folder in a fresh process.

    Returns:
        its last answer; and why the process failed, "" if it did not.

    Raises:
        Fault: it failed before it answered anything.
    """
    (scratch.folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", module, str(folder), str(scratch.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    why = ""
    if done.returncode < 0:
        why = f"its process was ended by signal {-done.returncode} ({signal.strsignal(-done.returncode)})"
    elif done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    try:
        return json.loads((scratch.folder / "answer.json").read_text(encoding="utf-8")), why
    except FileNotFoundError:
        raise Fault(f"{folder}: plain mlx_lm.load cannot open what was exported ({why})") from None


def fresh_look(folder: Path, probe: list[int], *, text: str = "") -> FreshLook:
    """Open a model folder in a fresh process with plain `mlx_lm.load`.

    Args:
        probe: token ids to compute logits for.
        text: for its tokenizer.

    Raises:
        Fault: the folder cannot be opened there, or not computed with.
    """
    with tempfile.TemporaryDirectory() as made:
        scratch = Scratch(Path(made))
        found, _ = ask("mlx_distill.evaluate.fresh", folder, {"probe": probe, "text": text}, scratch)
        return FreshLook(np.load(scratch.logits, allow_pickle=False), found["tokens"])


def check_equal(folder: Path, expected: np.ndarray, found: np.ndarray) -> float:
    """Compare logits of a reloaded folder with those of the model in memory.

    Returns:
        the largest difference, as a share of the largest logit.

    Raises:
        Fault: they differ by more than a thousandth.
    """
    if expected.shape != found.shape:
        raise Fault(f"{folder}: reloaded logits have shape {found.shape}, not {expected.shape}")
    gap = float(np.abs(expected - found).max() / max(1e-9, np.abs(expected).max()))
    if not gap <= 1e-3:
        raise Fault(
            f"{folder}: reloaded in a fresh process its logits differ by {gap:.2g} of the largest one"
        )
    return gap


def _child(folder: str, scratch: Scratch) -> None:
    import mlx.core as mx
    import mlx_lm

    request = scratch.request()
    model, tokenizer, *_ = mlx_lm.load(folder)
    logits = model(mx.array(request["probe"])[None])[0].astype(mx.float32)
    np.save(scratch.logits, np.array(logits))
    scratch.answer({"tokens": tokenizer.encode(request["text"])})


if __name__ == "__main__":
    _child(sys.argv[1], Scratch(Path(sys.argv[2])))
