"""The run folder: what a run leaves behind, and what it shows while it works."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distill import checkpoint
from mlx_distill.console import Console, step_line
from mlx_distill.files import write_json, write_text
from mlx_distill.following import Following
from mlx_distill.interrupt import Interrupts
from mlx_distill.losses.menu import MENU
from mlx_distill.recipe import Recipe
from mlx_distill.resident import memory_in_use
from mlx_distill.self_teacher import Average


class Run:
    """An open run folder; `run_folder.open_run` makes one."""

    def __init__(self, folder: Path, console: Console, interrupts: Interrupts | None = None):
        self.folder, self.console = folder, console
        self.following = Following(folder, console)
        self.progress = self.following.progress
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
        with self.following.stage(name):
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
        self.following.forget(names)

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
    window_weight: float = 0.0  # of these labels; their number where no row has a weight of its own
    window_losses: dict[str, float] = field(default_factory=dict)  # weighted sums in nats over these labels
    window_labels: float = 0.0  # weight of the labels that losses on labels count
    window_own: dict[str, int] = field(default_factory=dict)  # what an on-policy student wrote
    own: dict[str, Any] = field(default_factory=dict)  # state of `OwnRows`, when a checkpoint was made

    def add(
        self,
        step: int,
        losses: dict[str, mx.array],
        weight: float,
        tokens: int,
        seconds: float,
        labels: float | None = None,
    ) -> None:
        """Add up a step.

        Args:
            seconds: since the first step.
            labels: weight of the labels in rows of the data; None: all of `weight`.
        """
        self.window_seconds += seconds - self.seconds
        self.step, self.seconds = step, seconds
        self.tokens += tokens
        self.window_tokens += tokens
        self.window_weight += weight
        self.window_labels += weight if labels is None else labels
        for name, nats in losses.items():
            self.window_losses[name] = self.window_losses.get(name, 0.0) + float(nats)

    def add_own(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            self.window_own[name] = self.window_own.get(name, 0) + count

    def means(self, recipe: Recipe) -> tuple[float, dict[str, float]]:
        """The objective and each of its losses, in nats a label that it counts; none without such a label."""
        weights = {
            name: self.window_labels if MENU[name].on_labels else self.window_weight
            for name in self.window_losses
        }
        losses = {name: nats / weights[name] for name, nats in self.window_losses.items() if weights[name]}
        whole = sum(recipe.objective[name].weight * nats for name, nats in self.window_losses.items())
        return whole / (self.window_weight or 1.0), losses

    def own_means(self) -> dict[str, float]:
        """Share of the micro-batches that the student wrote; length and unfinished share of new answers."""
        counts = self.window_own
        means = {"own_share": counts.get("own", 0) / counts["micro_batches"]} if counts else {}
        if counts.get("answers"):
            means["own_length"] = counts["tokens"] / counts["answers"]
            means["own_unfinished"] = counts["unfinished"] / counts["answers"]
        return means

    def close_window(self) -> None:
        self.window_tokens, self.window_seconds, self.window_weight, self.window_losses = 0, 0.0, 0.0, {}
        self.window_labels, self.window_own = 0.0, {}


class StageLog:
    """Metrics, console lines and checkpoints of one training stage: `student` or `baseline`."""

    def __init__(self, run: Run, stage: str):
        self.run, self.stage, self.interrupts = run, stage, run.interrupts
        self._prefix = "" if stage == "student" else f"{stage}-"
        self._checkpoints = run.folder / "checkpoints"
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
        speed = counters.window_tokens / max(1e-9, counters.window_seconds)
        counters.close_window()
        self._newest = {"loss": loss}
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
                **own,
            },
        )
        left = counters.seconds / counters.step * (recipe.train.steps - counters.step)
        shown = {**losses, **own, "tok/s": speed}
        if mx.default_device() == mx.gpu:  # on the CPU MLX's counter counts buffers never touched
            shown["peak"] = mx.get_peak_memory() / 2**30
        self.run.console.step(f"{self.stage:9} {step_line(counters.step, recipe.train.steps, shown, left)}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        self._write(step, {f"valid_{name}": value for name, value in values.items()})
        shown = "  ".join(f"valid_{name} {values[name]:.3f}" for name in ("nll", "kl") if name in values)
        self.run.console.step(f"{self.stage:9} step {step:5d}  {shown}")

    def say(self, line: str) -> None:
        self.run.console.say(f"{self.stage}: {line}")

    def save(self, student: nn.Module, optimizer: Any, counters: Counters, *averages: Average) -> None:
        folder = self._checkpoints / f"{self._prefix}step-{counters.step:06d}"
        checkpoint.save(folder, student, optimizer, asdict(counters), *averages)
        checkpoint.keep_newest(self._checkpoints, self._prefix)

    def restore(self, student: nn.Module, optimizer: Any, *averages: Average) -> Counters:
        """Counters of the newest checkpoint, after putting its weights in place; new ones without."""
        found = checkpoint.newest(self._checkpoints, self._prefix)
        counters = Counters()
        if found is not None:
            counters = Counters(**checkpoint.load(found, student, optimizer, *averages))
        self._drop_after(counters.step)
        self.run.following.restarted(self.stage, counters.step)
        if found is not None:
            self.run.console.say(f"{self.stage}: going on from step {counters.step}")
        return counters

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, "stage": self.stage, **values})
        with open(self.run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.run.following.metrics(self.stage, step, values)

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
