"""`mlx-distill watch RUN`: follows a run until it ends, and says how it ended."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from mlx_distill.errors import DistillError, NotFound
from mlx_distill.layout import ROOT, STAGES
from mlx_distill.look import Look, Watched, find_run
from mlx_distill.run_record import read_run
from mlx_distill.verdict import verdict
from mlx_distill.watch_view import shown_on

PATIENCE = 5.0  # seconds without the folder, as while a run is replaced by another
_RESUMED = ("run", "generate", "cache", "prune", "train", "compress")  # commands that need --resume to go on
_REPEATED = ("quantize", "evaluate", "export")  # commands that go on by themselves


def watch(
    run: str,
    *,
    every: float = 1.0,
    once: bool = False,
    stream: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until it ends: a picture that is redrawn on a terminal, a line for each change elsewhere.

    Args:
        every: seconds between two looks.
        once: look once.
        stream: where to show; None: stdout.

    Raises:
        NotFound, RunFolderError: there is no such run, or no more.
    """
    watched = Watched(find_run(run))
    missing = 0.0
    with shown_on(stream or sys.stdout) as show:
        while True:
            look = watched.look()
            gone = not watched.folder.is_dir()
            if not gone:
                missing = 0.0
                show(look)
            elif missing > PATIENCE:
                raise NotFound(f"{watched.folder}: the run folder is gone")
            if once or (look.state != "working" and not gone):
                break
            missing += every
            sleep(every)
    for line in ending(look):
        (stream or sys.stdout).write(line + "\n")


def ending(look: Look) -> list[str]:
    """What is said last: the verdict of a finished run, or how to go on with one that is not."""
    if look.state == "working":
        return []
    if look.state == "finished":
        return ["", *_verdict(look.folder)]
    where = f"at stage {look.stage}" if look.stage else "before its first stage"
    if look.state == "stopped":
        first = f"stopped {where}: {look.progress['ended']}"
    elif look.state == "killed":
        first = f"killed {where}: its process {look.progress.get('pid')} is no more"
    else:
        done = next((name for name in reversed(STAGES) if name in look.stages), None)
        first = (
            f"nothing works on it; done up to {done}" if done else "nothing works on it, and nothing is done"
        )
    return ["", first, f"go on with: {going_on(look)}"]


def _verdict(folder: Path) -> list[str]:
    if not (folder / "evaluation.json").exists():
        return ["finished; nothing was measured"]
    try:
        found = read_run(folder)
        lines = verdict(found.models, found.comparisons)
    except DistillError as error:
        lines = [str(error)]
    report = folder / "report.html"
    return [*lines, *([f"report: {report}"] if report.exists() else [])]


def going_on(look: Look) -> str:
    """The command that takes the run up again."""
    try:
        words = shlex.split(look.command or "")
    except ValueError:  # an apostrophe in what an older version wrote
        words = []
    known = [i for i, word in enumerate(words) if word in (*_RESUMED, *_REPEATED)]
    if known:
        words = [word for word in words if word not in ("--overwrite", "--resume")]
        if look.state == "idle":  # what was asked for is done
            words[known[0]] = "run"
        words += ["--resume"] if words[known[0]] in _RESUMED else []
    else:  # started by a program of somebody's own
        words = ["mlx-distill", "run", str(Path(ROOT, look.folder.name, "recipe.yaml")), "--resume"]
    there = look.folder.resolve().parent.parent
    command = shlex.join(words)
    return command if there == Path.cwd() else f"cd {shlex.quote(str(there))} && {command}"
