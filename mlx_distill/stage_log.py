"""What one training stage writes into the run folder: metrics, console lines and checkpoints."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distill import checkpoint
from mlx_distill.console import step_line
from mlx_distill.counters import Counters
from mlx_distill.errors import RunFolderError
from mlx_distill.files import flush_path, write_text
from mlx_distill.plain_json import parse_object
from mlx_distill.recipe import Recipe
from mlx_distill.resident import memory_in_use
from mlx_distill.run import Run
from mlx_distill.self_teacher import Average


class StageLog:
    """Metrics, console lines and checkpoints of one training stage: `student`, `baseline`, ...

    Args:
        keep: newest checkpoints of the stage that stay.
    """

    def __init__(self, run: Run, stage: str, keep: int = 2):
        self.run, self.stage, self.keep, self.interrupts = run, stage, keep, run.interrupts
        self._prefix = "" if stage == "student" else f"{stage}-"
        self._checkpoints, self._metrics = run.folder / "checkpoints", run.folder / "metrics.jsonl"
        self._newest: dict[str, float] = {}  # of the last line of metrics, for the bar

    def steps(self, first: int, last: int) -> Iterator[int]:
        """Numbers of the steps to take, shown as progress."""
        with self.run.progress(self.stage, max(0, last + 1 - first), "steps") as advance:
            for step in range(first, last + 1):
                yield step
                how, gib = memory_in_use()
                advance(1, **self._newest, **{how: gib})

    def metrics(self, counters: Counters, recipe: Recipe, gradient_norm: float, learning_rate: float) -> None:
        """Log the means since the last line, in nats a counted label, and close the window."""
        loss, losses = counters.means(recipe)
        own = counters.own_means()
        told = {"loss": loss} if counters.window_weight else {}  # of a window of skipped steps there is none
        skipped = {"skipped": counters.skipped} if counters.skipped else {}
        speed = counters.window_tokens / max(1e-9, counters.window_seconds)
        counters.close_window()
        self._newest = told
        self._write(
            counters.step,
            {
                **told,
                **losses,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "tokens_per_second": speed,
                "tokens": counters.tokens,
                "seconds": counters.seconds,
                **own,
                **skipped,
            },
        )
        left = counters.seconds / counters.step * (recipe.train.steps - counters.step)
        shown = {**losses, **own, **skipped, "tok/s": speed}
        if mx.default_device() == mx.gpu:  # on the CPU MLX's counter counts buffers never touched
            shown["peak"] = mx.get_peak_memory() / 2**30
        self.run.console.step(f"{self.stage:9} {step_line(counters.step, recipe.train.steps, shown, left)}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        self._write(step, {f"valid_{name}": value for name, value in values.items()})
        shown = "  ".join(f"valid_{name} {values[name]:.3f}" for name in ("nll", "kl") if name in values)
        self.run.console.step(f"{self.stage:9} step {step:5d}  {shown}")

    def say(self, line: str) -> None:
        self.run.console.say(f"{self.stage}: {line}")

    def event(self, step: int, values: dict[str, float], rows: list[str]) -> None:
        """Log what was unusual about a step, with the rows that it was made of."""
        self._write(step, values, rows=rows)

    def save(self, student: nn.Module, optimizer: Any, counters: Counters, *averages: Average) -> None:
        folder = self._checkpoints / f"{self._prefix}step-{counters.step:06d}"
        if self._metrics.exists():  # the run that goes on from here writes only what follows
            flush_path(self._metrics)
            flush_path(self.run.folder)
        checkpoint.save(folder, student, optimizer, asdict(counters), *averages)
        checkpoint.keep_newest(folder, self._prefix, self.keep)

    def restore(self, student: nn.Module, optimizer: Any, *averages: Average) -> Counters:
        """Counters of the newest checkpoint, after putting its weights in place; new ones without.

        Damaged ones are passed over, each with a line.

        Raises:
            RunFolderError: it is whole, and of another student, as other versions of libraries may build it.
        """
        checkpoint.remove_partial(self._checkpoints, self._prefix)
        damaged: list[str] = []
        found = checkpoint.newest(
            self._checkpoints, self._prefix, lambda path, why: damaged.append(f"{path} is damaged: {why}")
        )
        for line in damaged:
            self.say(f"{line}; {f'{found.name} is used' if found else 'training starts anew'}")
        counters = Counters()
        if found is not None:
            try:
                counters = Counters(**checkpoint.load(found, student, optimizer, *averages))
            except (TypeError, ValueError, KeyError) as error:
                by = ", ".join(checkpoint.differences(found)) or "the same versions as these"
                raise RunFolderError(
                    f"{found}: whole, but not of this student ({error}); made with {by}; go on with the "
                    "versions that made it, or start anew with --overwrite"
                ) from None
        self._drop_after(counters.step)
        self.run.following.restarted(self.stage, counters.step)
        if found is not None:
            self.run.console.say(f"{self.stage}: going on from step {counters.step}")
            other = checkpoint.differences(found)
            if other:
                self.say(
                    f"the checkpoint was made with {', '.join(other)}; the same bits are promised only "
                    "for the same machine and versions"
                )
        return counters

    def _write(self, step: int, values: dict[str, float], **more: list[str]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no others
        line = json.dumps({"step": step, "stage": self.stage, **values, **more}, ensure_ascii=False)
        try:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            error.filename = error.filename or str(self._metrics)  # a failed write names no file
            raise
        self.run.following.metrics(self.stage, step, values)

    def _drop_after(self, step: int) -> None:
        """Forget metrics of steps that will be taken again."""
        path = self._metrics
        if not path.exists():
            return
        kept = []
        # Not `splitlines`, which also splits at U+2028 and others that the name of a file may hold.
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                values = parse_object(line)
                other = values["stage"] != self.stage or values["step"] <= step
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill cut off
            if other:
                kept.append(line + "\n")
        write_text(path, "".join(kept))
