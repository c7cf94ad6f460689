"""The run folder: what a run leaves behind, and what it shows while it works."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlx_distill
from mlx_distill import checkpoint, recipe
from mlx_distill.console import Console, step_line
from mlx_distill.doctor import memory_gib
from mlx_distill.errors import DistillError, RunFolderError
from mlx_distill.files import write_json, write_text
from mlx_distill.interrupt import Interrupts
from mlx_distill.mistakes import shown
from mlx_distill.recipe import Recipe

ROOT = Path("runs")
FINGERPRINT = "fingerprint"  # the file that makes a folder a run's


class Run:
    """An open run folder. Make one with `open_run`."""

    def __init__(self, folder: Path, console: Console, interrupts: Interrupts | None = None):
        self.folder, self.console = folder, console
        self.progress = console.progress
        self.interrupts = interrupts or Interrupts()

    def stage(self, name: str, work: Callable[[], dict[str, Any]], options: Any = None) -> dict[str, Any]:
        """The result of a stage: from the folder if it has finished before, else by doing it.

        Args:
            options: plain values on which the result depends, beside the fingerprint of the run. Finished
                with others, the stage and those after it are forgotten.
        """
        finished = self.stages()
        if name in finished and finished[name].get("options") == options:
            return finished[name]
        if name in finished:
            order = list(finished)
            self.forget(set(order[order.index(name) :]))
        result = work() if options is None else {**work(), "options": options}
        write_json(self.folder / "stages.json", {**self.stages(), name: result})
        return result

    def stages(self) -> dict[str, Any]:
        """Finished stages and their results, in the order in which they finished."""
        path = self.folder / "stages.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def forget(self, names: set[str]) -> None:
        """Let stages be done again."""
        kept = {name: result for name, result in self.stages().items() if name not in names}
        write_json(self.folder / "stages.json", kept)

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write `samples/NAME.jsonl`, one object a line."""
        (self.folder / "samples").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.folder / "samples" / f"{name}.jsonl", lines)

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        text = (self.folder / "samples" / f"{name}.jsonl").read_text(encoding="utf-8")
        # Not `splitlines`, which also splits at U+2028 and others that a string in JSON may hold.
        return [json.loads(line) for line in text.split("\n") if line]


@dataclass
class Counters:
    """Where a training run stands; a checkpoint keeps it."""

    step: int = 0
    tokens: int = 0  # counted labels so far
    seconds: float = 0.0  # spent in the loop, over all resumptions
    window_tokens: int = 0  # counted labels since the last line of metrics
    window_seconds: float = 0.0
    window_losses: dict[str, float] = field(default_factory=dict)  # sums in nats over the same labels

    def add(self, step: int, losses: dict[str, mx.array], tokens: int, seconds: float) -> None:
        self.window_seconds += seconds - self.seconds
        self.step, self.seconds = step, seconds
        self.tokens += tokens
        self.window_tokens += tokens
        for name, nats in losses.items():
            self.window_losses[name] = self.window_losses.get(name, 0.0) + float(nats)

    def close_window(self) -> None:
        self.window_tokens, self.window_seconds, self.window_losses = 0, 0.0, {}


class StageLog:
    """Metrics, console lines and checkpoints of one training stage: `student` or `baseline`."""

    def __init__(self, run: Run, stage: str):
        self.run, self.stage, self.interrupts = run, stage, run.interrupts
        self._prefix = "" if stage == "student" else f"{stage}-"
        self._checkpoints = run.folder / "checkpoints"

    def metrics(self, counters: Counters, recipe: Recipe, gradient_norm: float, learning_rate: float) -> None:
        """Log the means since the last line, in nats a counted label, and close the window."""
        tokens = max(1, counters.window_tokens)
        losses = {name: nats / tokens for name, nats in counters.window_losses.items()}
        loss = sum(recipe.objective[name].weight * value for name, value in losses.items())
        speed = counters.window_tokens / max(1e-9, counters.window_seconds)
        counters.close_window()
        self._write(
            counters.step,
            {
                "loss": loss,
                **losses,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_per_second": speed,
                "tokens": counters.tokens,
                "seconds": counters.seconds,
            },
        )
        left = counters.seconds / counters.step * (recipe.train.steps - counters.step)
        shown = {**losses, "tok/s": speed, "peak": mx.get_peak_memory() / 2**30}
        self.run.console.step(f"{self.stage:9} {step_line(counters.step, recipe.train.steps, shown, left)}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        values = {f"valid_{name}": value for name, value in values.items()}
        self._write(step, values)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.run.console.say(f"{self.stage:9} step {step:5d}  {shown}")

    def save(self, student: nn.Module, optimizer: Any, counters: Counters) -> None:
        folder = self._checkpoints / f"{self._prefix}step-{counters.step:06d}"
        checkpoint.save(folder, student, optimizer, asdict(counters))
        checkpoint.keep_newest(self._checkpoints, self._prefix)

    def restore(self, student: nn.Module, optimizer: Any) -> Counters:
        """Counters of the newest checkpoint, after putting its weights in place; new ones without."""
        found = checkpoint.newest(self._checkpoints, self._prefix)
        counters = Counters() if found is None else Counters(**checkpoint.load(found, student, optimizer))
        self._drop_after(counters.step)
        if found is not None:
            self.run.console.say(f"{self.stage}: going on from step {counters.step}")
        return counters

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, "stage": self.stage, **values})
        with open(self.run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _drop_after(self, step: int) -> None:
        """Forget metrics of steps that will be taken again."""
        path = self.run.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut off
            if values["stage"] != self.stage or values["step"] <= step:
                kept.append(line + "\n")
        write_text(path, "".join(kept))


def check_folder(options: Recipe, *, resume: bool, overwrite: bool, root: Path = ROOT) -> None:
    """Refuse a folder that is taken or cannot be written, before anything is read.

    Raises:
        RunFolderError: it exists and neither `resume` nor `overwrite` is given, it is no run folder, or
            it cannot be written.
    """
    folder = root / options.name
    if folder.is_dir() and not _holds_run(folder):
        what = "--overwrite will not remove it" if overwrite else "choose another name with name=..."
        raise RunFolderError(f"{folder} holds other files and is no run folder; {what}")
    if folder.is_dir() and not (resume or overwrite):
        raise RunFolderError(
            f"{folder} holds a run already: go on with --resume, replace it with --overwrite, "
            f"or choose another name with name={options.name}-2"
        )
    parent = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "check its permissions, or run elsewhere" if parent.is_dir() else "it is no folder"
        raise RunFolderError(f"{folder}: {parent} cannot be written; {why}")


def _holds_run(folder: Path) -> bool:
    """Whether a folder is a run's, or empty, as one is that was stopped right after it was made."""
    names = {path.name for path in folder.iterdir()}
    return FINGERPRINT in names or names <= {f".{FINGERPRINT}.part"}


def open_run(
    options: Recipe,
    fingerprint: str,
    console: Console,
    interrupts: Interrupts | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    root: Path = ROOT,
) -> Run:
    """Make `root/NAME`, or open it to go on.

    Args:
        fingerprint: of the recipe and what it reads; a run only goes on with its own.
        interrupts: the signals that the run heeds.

    Raises:
        RunFolderError: as `check_folder`, or it holds another recipe's run.
    """
    check_folder(options, resume=resume, overwrite=overwrite, root=root)
    folder = root / options.name
    known = folder / FINGERPRINT
    if known.exists() and not overwrite and known.read_text().strip() != fingerprint:
        raise RunFolderError(
            f"{folder} was made {_difference(folder, options)}; "
            "start anew with --overwrite, or choose another name with name=..."
        )
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(known, fingerprint + "\n")
        write_text(folder / "recipe.yaml", recipe.dump(options))
        write_json(folder / "environment.json", environment())
    except OSError as error:
        why = f"{folder}: cannot be written ({error.strerror or error}); check its permissions"
        raise RunFolderError(why) from None
    return Run(folder, console, interrupts)


def _difference(folder: Path, options: Recipe) -> str:
    """In what a run differs from the one that would go on: the first option, or what it read."""
    try:
        before = recipe.determining(recipe.load(folder / "recipe.yaml"))
    except DistillError:  # an unreadable recipe differs as a whole
        return "by another recipe"

    def walk(left: Any, right: Any, path: str) -> str | None:
        if isinstance(left, dict) and isinstance(right, dict):
            keys = [*left, *(key for key in right if key not in left)]
            pairs = (walk(left.get(key), right.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
            return next((found for found in pairs if found), None)
        return None if left == right else f"`{path}` was {shown(left)} and is {shown(right)}"

    found = walk(before, recipe.determining(options), "")
    return (
        f"by another recipe ({found})" if found else "with other data or other weights under the same names"
    )


def environment() -> dict[str, Any]:
    """What ran and where, for the folder and every report."""
    info = mx.device_info()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "mlx_distill": mlx_distill.__version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": f"{mx.default_device().type.name} {info.get('device_name', '')}".strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib(), 2),
        "blas": mlx_distill.BLAS,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this package's own checkout; null where it was installed without one."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
