"""A run at one moment, as its folder shows it to another process. Nothing is written there.

Every file may be missing, half written or replaced by another at any time; what cannot be read yet counts as
not there, and is read at the next look.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlx_distill.data.rows import no_such_path
from mlx_distill.errors import RunFolderError
from mlx_distill.layout import FINGERPRINT, ROOT, STAGES
from mlx_distill.metrics import number
from mlx_distill.odd_files import check_own
from mlx_distill.progress_file import is_alive

State = Literal["working", "finished", "stopped", "killed", "idle"]


class Look(NamedTuple):
    """A run at one moment."""

    folder: Path
    state: State
    stage: str | None  # that goes on, or in which the run stopped
    stages: dict[str, Any]  # finished ones and their results
    times: dict[str, float]  # seconds that stages took; not of a process that works now, or was killed
    progress: dict[str, Any]  # progress.json
    metrics: list[dict[str, Any]]
    said: list[str]  # log.txt
    command: str | None  # with which the run was started last
    now: float  # seconds since the epoch

    def seconds(self, stage: str) -> float | None:
        """How long a stage has taken up to now; None where it has not begun, or nobody measured it."""
        seconds = self.times.get(stage)
        started, updated = (number(self.progress.get(key)) for key in ("stage_started", "updated"))
        last = {"working": self.now, "killed": updated}.get(self.state)
        if stage == self.stage and stage not in self.stages and started is not None and last is not None:
            return (seconds or 0.0) + max(0.0, last - started)
        return seconds


class Tail:
    """The whole lines of a file that grows, and now and then is replaced."""

    def __init__(self, path: Path):
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        """All of them; what stands behind the last line break is not written to its end yet."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                same = (status.st_dev, status.st_ino) == self._file
                if not same or status.st_size < self._offset:
                    self._file, self._offset, self._lines = (status.st_dev, status.st_ino), 0, []
                file.seek(self._offset)
                text = file.read()
        except OSError:
            self._file, self._offset, self._lines = None, 0, []
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._lines += whole.decode("utf-8", errors="replace").split("\n")[:-1]
        return self._lines


class Watched:
    """A run folder that is looked at again and again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metrics, self._log = Tail(folder / "metrics.jsonl"), Tail(folder / "log.txt")

    def look(self) -> Look:
        # The progress first: it is removed last, so that a run never looks stopped while it finishes.
        progress = _object(self.folder / "progress.json")
        alive = is_alive(progress) if progress else False
        stages = _object(self.folder / "stages.json")
        command = _object(self.folder / "environment.json").get("command")
        metrics = [line for line in map(_parsed, self._metrics.lines()) if isinstance(line.get("stage"), str)]
        metrics = [line for line in metrics if "rows" not in line]  # an event, which the log tells too
        state: State = "working"
        if progress.get("ended"):
            state = "stopped"
        elif alive is False:
            state = "finished" if STAGES[-1] in stages else "killed" if progress else "idle"
        return Look(
            folder=self.folder,
            state=state,
            stage=progress.get("stage") if progress else None,
            stages=stages,
            times={k: v for k, v in _object(self.folder / "times.json").items() if number(v) is not None},
            progress=progress,
            metrics=[line for line in metrics if number(line.get("step")) is not None],
            said=self._log.lines(),
            command=command if isinstance(command, str) else None,
            now=time.time(),
        )


def find_run(run: str) -> Path:
    """The folder of a run that is named by its folder, or by its name in `runs/`.

    Raises:
        NotFound: there is none. RunFolderError: the folder is no run's, or holds what no run leaves.
    """
    named = [Path(run), ROOT / run]
    for folder in named:
        if os.path.isfile(folder / FINGERPRINT):  # unlike Path's, false for a name that no file system takes
            check_own(folder)
            return folder
    if os.path.isdir(run):
        raise RunFolderError(f"{run} is no run folder: it has no file `{FINGERPRINT}`; name one in {ROOT}/")
    raise no_such_path(named[1] if len(named[0].parts) == 1 and ROOT.is_dir() else named[0])


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or none that can be read now."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
