"""The packages that `train.log_to` names, each imported when it is first asked for.

Each is a `Tracker` of `trackers.py`. What a package would add to the numbers by itself is turned off.
"""

import contextlib
import io
import os
import platform
import shlex
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mlx_distill.files import write_json
from mlx_distill.plain_json import parse_object
from mlx_distill.recipe import Recipe, dump

PROJECT = "mlx_distill"
PATIENCE = 30  # seconds that a network may hold up the beginning and the end of a run


class TensorBoard:
    """Event files in `tensorboard/`, a folder for each stage, so that a chart has all stages in it."""

    def __init__(self, recipe: Recipe, folder: Path):
        # The proto classes and the record format alone: tensorboard's own writer loads TensorFlow where it is
        # installed, and writes in a thread that prints a traceback when the drive is full.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary, self._writer = Event, SessionLog, Summary, RecordWriter
        self._folder = folder / "tensorboard"
        self._open: dict[str, Any] = {}
        shown = shlex.quote(str(self._folder))
        self.where = f"event files in {self._folder}; look with `tensorboard --logdir {shown}`"

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(stage, step=step, summary=self._summary(value=entries))

    def restart(self, stage: str, step: int) -> None:
        # TensorBoard drops what it has read of the steps from this one on.
        self._add(stage, step=step + 1, session_log=self._session(status=self._session.START))

    def scores(self, model: str, values: Mapping[str, float]) -> None:
        self.restart(f"evaluation/{model}", -1)
        self.write(f"evaluation/{model}", 0, values)

    def close(self, finished: bool) -> None:
        for writer in self._open.values():
            writer.close()

    def _add(self, place: str, **content: Any) -> None:
        if place not in self._open:
            folder = self._folder / place
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            count, now = sum(1 for _ in folder.iterdir()), int(time.time())
            name = f"events.out.tfevents.{now:010d}.{platform.node()}.{os.getpid()}.{count:06d}"
            self._open[place] = self._writer(open(folder / name, "xb"))  # noqa: SIM115 - `close` closes it
            first = self._event(wall_time=time.time(), file_version="brain.Event:2")
            self._open[place].write(first.SerializeToString())
        event = self._event(wall_time=time.time(), **content)
        self._open[place].write(event.SerializeToString())
        self._open[place].flush()


class Wandb:
    """A run of Weights & Biases, by the name of the recipe; what the package would add by itself is off."""

    def __init__(self, recipe: Recipe, folder: Path):
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=PATIENCE,
            finish_timeout=PATIENCE,
            finish_timeout_raises=True,
            reinit="create_new",
        )
        self._run = wandb.init(
            project=PROJECT,
            name=recipe.name,
            id=_identity(folder),
            resume="allow",
            dir=str(folder),
            config=_plain(recipe),
            settings=settings,
        )
        self._stages: set[str] = set()
        here = f"scalars and the recipe stay in {folder / 'wandb'} until `wandb sync` sends them"
        mode = self._run.settings.mode
        nobody = "nothing is kept: WANDB_MODE is disabled"
        self.where = {"offline": here, "disabled": nobody}.get(
            str(mode), f"scalars and the recipe are SENT to {self._run.url}"
        )

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        # An axis of its own for each stage: the axis of the whole run may only grow.
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": x for name, x in values.items()}})

    def restart(self, stage: str, step: int) -> None:
        """Nothing can be taken back: steps that are taken again are there twice."""

    def scores(self, model: str, values: Mapping[str, float]) -> None:
        self._run.summary.update({f"evaluation/{model}/{name}": value for name, value in values.items()})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """A run of trackio, on this machine unless its own environment variables name a Space or a server."""

    def __init__(self, recipe: Recipe, folder: Path):
        import trackio

        self._trackio = trackio
        # Trackio knows runs by their names.
        name = f"{recipe.name}-{_identity(folder)}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=PROJECT,
                name=name,
                resume="allow",
                config=_plain(recipe),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        where = f"SENT to {self._run.url}" if self._run.url else "kept on this machine"
        self.where = (
            f"scalars and the recipe are {where}, as {name}; look with `trackio show --project {PROJECT}`"
        )

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def restart(self, stage: str, step: int) -> None:
        """Nothing can be taken back: steps that are taken again are there twice."""

    def scores(self, model: str, values: Mapping[str, float]) -> None:
        self._run.log({f"evaluation/{model}/{name}": value for name, value in values.items()}, step=0)

    def close(self, finished: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values, as recipe.yaml has it."""
    return yaml.safe_load(dump(recipe))


def _identity(folder: Path) -> str:
    """What tells this run from all others of its name: a resumed run has the same, a replaced one another."""
    path = folder / "trackers.json"
    try:
        known = parse_object(path.read_bytes()).get("id")
    except (OSError, ValueError):
        known = None
    if not isinstance(known, str):
        known = uuid.uuid4().hex[:12]
        write_json(path, {"id": known})
    return known
