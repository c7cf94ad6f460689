"""What a run tells those who follow it while it works: files for `mlx-distill watch`, and trackers.

    progress.json   what goes on now (`progress_file.py`)
    times.json      seconds that each stage took, all attempts together but those that were killed
    log.txt         every line of the console that is no step's, with its time

A run that finds everything done leaves all of them as they are.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill.console import Console
from mlx_distill.errors import DistillError
from mlx_distill.plain_json import parse_object
from mlx_distill.progress_file import ProgressFile, write_status
from mlx_distill.recipe import Recipe
from mlx_distill.resident import memory_in_use
from mlx_distill.secrets_out import without_secrets
from mlx_distill.trackers import Trackers


class Following:
    """Everybody who follows one run. Nothing is written until a stage is done; trackers come with `whole`."""

    def __init__(self, folder: Path, console: Console):
        self._folder, self._console, self._recipe = folder, console, None
        self._file = ProgressFile(folder / "progress.json", console.progress, memory_in_use)
        self._trackers = Trackers(console.say)
        self._held: list[str] | None = []  # lines said before the first stage that is done
        self.progress = self._file.progress

    @contextmanager
    def whole(self, recipe: Recipe) -> Iterator[None]:
        """While the block runs, lines of the console are kept, and stages open the trackers of the recipe."""
        self._recipe = recipe
        self._console.record = self._record
        finished = False
        try:
            yield
            finished = True
        except BaseException as error:
            first = (str(error).splitlines() or [""])[0]
            kind = "" if isinstance(error, DistillError) else f"{type(error).__name__}: "
            self._file.ended(without_secrets(f"{kind}{first}")[:300])
            raise
        finally:
            self._trackers.close(finished)
            self._console.record = None
        self._file.remove()

    def ended(self, why: str) -> None:
        """The run stops at once, because of another process."""
        self._file.ended(why[:300])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage is done, in the block. How long it takes is counted even if it stops before its end."""
        self._file.stage(name)
        for line in self._held or []:
            self._append(line)
        self._held = None
        if self._recipe is not None:
            self._trackers.open(self._recipe.train.log_to, self._recipe, self._folder)
        started = time.monotonic()
        try:
            yield
        finally:
            times = self.times()
            times[name] = times.get(name, 0.0) + time.monotonic() - started
            write_status(self._folder / "times.json", times)
        if name == "evaluate":
            self._trackers.scores(self._folder / "evaluation.json")

    def forget(self, names: set[str]) -> None:
        """Stages are to be done again: their times count from nothing."""
        times = self.times()
        if times.keys() & names:
            kept = {name: seconds for name, seconds in times.items() if name not in names}
            write_status(self._folder / "times.json", kept)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl was written."""
        self._trackers.write(stage, step, values)

    def restarted(self, stage: str, step: int) -> None:
        """Training goes on behind `step`; what was written of later steps does not count."""
        self._trackers.restart(stage, step)

    def times(self) -> dict[str, Any]:
        try:
            found = parse_object((self._folder / "times.json").read_bytes(), finite=True)
        except (OSError, ValueError):
            return {}
        return {name: seconds for name, seconds in found.items() if type(seconds) in (int, float)}

    def _record(self, line: str) -> None:
        if not line:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {without_secrets(line)}\n"
        if self._held is not None:
            self._held.append(line)
        else:
            self._append(line)

    def _append(self, line: str) -> None:
        try:
            with open(self._folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(line)
        except OSError:  # as on a full drive: the run itself will say so where it matters
            pass
