"""What the stages of one run share."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_distill import models
from mlx_distill.files import write_folder
from mlx_distill.models import Loaded
from mlx_distill.preflight import Prepared
from mlx_distill.recipe import Recipe
from mlx_distill.run import Run
from mlx_distill.student import make_student
from mlx_distill.teacher import LiveTeacher

PROBE = 64  # tokens; logits of all positions are kept


@dataclass
class Work:
    """A run that is going on: its folder, its recipe, its data, and the teacher once it is loaded."""

    run: Run
    recipe: Recipe
    prepared: Prepared
    _teacher: Loaded | None = None

    def teacher(self) -> Loaded:
        """The teacher, loaded when first needed."""
        if self._teacher is None:
            assert self.recipe.teacher is not None  # stages ask only where there is one
            self._teacher = models.load(self.recipe.teacher.model, "teacher.model")
        return self._teacher

    def live_teacher(self) -> LiveTeacher | None:
        return None if self.recipe.teacher is None else LiveTeacher(self.teacher(), self.prepared.vocabulary)

    def save(self, name: str, loaded: Loaded) -> None:
        """Write `models/NAME`, and beside it what the model in memory computes for the probe."""
        write_folder(self.run.model(name), lambda folder: models.save(folder, loaded))
        (self.run.folder / "probes").mkdir(exist_ok=True)
        np.save(self.run.folder / "probes" / f"{name}.npy", self.probed(loaded))

    def probed(self, loaded: Loaded) -> np.ndarray:
        """Logits (T, V) in float32 for the probe."""
        return np.array(loaded.model(mx.array(self.probe())[None])[0].astype(mx.float32))

    def probe(self) -> list[int]:
        """Token ids by which a saved model is compared with the one in memory: the first row there is.

        Not of `data.test`, which may be another when a run goes on.
        """
        rows = self.prepared.train
        return (rows[0].tokens if rows else self.prepared.prompts[0][1])[:PROBE]

    def new_student(self) -> Loaded:
        """The student before training. A loaded one still has its own tokenizer and chat template."""
        return make_student(self.recipe.student, self.prepared.tokenizer, self.recipe.seed)
