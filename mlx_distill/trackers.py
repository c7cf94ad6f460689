"""`train.log_to`: metrics.jsonl and evaluation.json for TensorBoard, Weights & Biases and trackio.

Scalars and the recipe go there, nothing else: no row, no answer, no console line, nothing of the machine. A
tracker that fails while the run goes on is told of once and then left alone.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_distill.errors import DistillError, MissingExtra, RecipeError
from mlx_distill.plain_json import parse_object
from mlx_distill.recipe import Recipe
from mlx_distill.tracker_packages import TensorBoard, Trackio, Wandb


class Tracker(Protocol):
    """Somewhere that keeps numbers of runs. Any method may raise; `Trackers` sees to it."""

    where: str  # where the numbers go, in words

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def restart(self, stage: str, step: int) -> None:
        """The steps of `stage` after `step` are taken again; what was written of them does not count."""

    def scores(self, model: str, values: Mapping[str, float]) -> None:
        """What was measured of a model at the end; replaces what was measured before."""

    def close(self, finished: bool) -> None:
        """No more numbers come from this process."""


class Trackers:
    """Hands every number on to each tracker, and keeps a tracker's trouble away from the run."""

    def __init__(self, say: Callable[[str], None], trackers: Mapping[str, Tracker] | None = None):
        self._say, self._trackers = say, dict(trackers or {})

    def open(self, names: Sequence[str], recipe: Recipe, folder: Path) -> None:
        """Open those that are not open yet, and say where the numbers go."""
        for name in names:
            if name in self._trackers:
                continue
            with self._unless_it_fails(name):
                self._trackers[name] = OPEN[name](recipe, folder)
                self._say(f"{name}: {self._trackers[name].where}")

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.write(stage, step, values))

    def restart(self, stage: str, step: int) -> None:
        self._each(lambda tracker: tracker.restart(stage, step))

    def scores(self, path: Path) -> None:
        """Hand on the scores of an evaluation.json; nothing if there is none."""
        if not self._trackers or not path.exists():
            return
        models = parse_object(path.read_bytes())["models"]  # just written
        for model, metrics in models.items():
            numbers = {name: float(value) for name, value in metrics.items() if _is_number(value)}
            self._each(lambda tracker, model=model, numbers=numbers: tracker.scores(model, numbers))

    def close(self, finished: bool) -> None:
        self._each(lambda tracker: tracker.close(finished))
        self._trackers.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._unless_it_fails(name):
                act(tracker)

    @contextlib.contextmanager
    def _unless_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except DistillError:  # a signal to the run, which happened to come here
            raise
        except Exception as error:
            self._trackers.pop(name, None)
            first = (str(error).splitlines() or [""])[0]
            self._say(
                f"{name} gets no more numbers: {type(error).__name__}: {first}; the run goes on, and "
                "metrics.jsonl has them all"
            )


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers that cannot work, before anything long is done.

    Raises:
        MissingExtra: a package is not installed.
        RecipeError: Weights & Biases would have to ask for a key.
    """
    names = list(dict.fromkeys(recipe.train.log_to))
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        packages = "a package that is" if len(missing) == 1 else "packages that are"
        raise MissingExtra(
            f"`train.log_to` [{', '.join(missing)}] needs {packages} missing: "
            f"pip install 'mlx-distill[{','.join(missing)}]'"
        )
    if "wandb" in names and (why := _why_no_wandb()):
        raise RecipeError(
            f"`train.log_to` [wandb]: {why}; run `wandb login`, or keep the numbers here with "
            "WANDB_MODE=offline"
        )


def _why_no_wandb() -> str | None:
    """Why numbers cannot be sent to Weights & Biases; it would ask for a key in the middle of a run."""
    try:
        import wandb

        mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
        known = mode != "online" or wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key of the wrong form, a package that is broken
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if known else "nobody is logged in"


def _is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name, such as wandb leaves behind, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


OPEN: dict[str, Callable[[Recipe, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
