"""How much memory each stage of a run takes, estimated from files and shapes alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_distill.doctor import memory_gib
from mlx_distill.layout import STAGES
from mlx_distill.losses.menu import MENU
from mlx_distill.memory import batches
from mlx_distill.memory.batches import Shape
from mlx_distill.memory.kernels import kernels
from mlx_distill.memory.models import Models, models_of
from mlx_distill.memory.parts import Parts
from mlx_distill.memory.phases import Rows, own_rows, stages_of, validating
from mlx_distill.memory.work import activations, features, logits, over_shapes, reading, together, with_freed
from mlx_distill.prune.plan import Planned
from mlx_distill.recipe import Recipe

GIB = 2**30
SHARE = 0.75  # of the whole memory that a run may take, where the device does not say


class Estimate(NamedTuple):
    """GiB of each part of training, and of each stage."""

    weights: float  # of the student
    gradients: float
    moments: float  # of the optimizer
    activations: float  # of the student: kept for the backward pass, and of the layer at work
    logits: float
    teachers: dict[str, float]  # weights and activations of each, by its place; all of them live
    machine: float  # what the machine lends; infinite where nobody can tell
    update: float = 0.0  # what an update holds beside all of these
    process: float = 0.0  # of the process, beside its arrays
    stages: Mapping[str, Parts] = {}  # what each of the others takes
    longest: int = 0  # width of the longest row, in tokens
    teaching: float = 0.0  # activations among `teachers`

    @property
    def student(self) -> float:
        return self.weights + self.gradients + self.moments + self.activations + self.update + self.process

    @property
    def together(self) -> float:
        """Of training."""
        return self.training.together

    @property
    def training(self) -> Parts:
        return Parts(
            sum(self.teachers.values()) - self.teaching,
            self.weights,
            self.gradients + self.moments + self.update,
            self.activations + self.teaching,
            self.logits,
            self.process,
        )

    @property
    def by_stage(self) -> dict[str, Parts]:
        """GiB of every stage at its largest, in the order in which they come."""
        found = {"train": self.training, **self.stages}
        if "probes" in found:  # they end with a step at full size
            found["probes"] = max(found["probes"], self.training, key=lambda parts: parts.together)
        return dict(sorted(found.items(), key=lambda one: STAGES.index(one[0]) if one[0] in STAGES else -1))

    @property
    def at(self) -> str:
        """The stage that takes most."""
        stages = self.by_stage
        return max(["train", *stages], key=lambda name: stages[name].together)

    @property
    def peak(self) -> float:
        """What it takes."""
        return self.by_stage[self.at].together

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine


def estimate(
    recipe: Recipe,
    folders: Mapping[str, Path],
    vocabulary: int,
    planned: Planned | None = None,
    rows: Rows | None = None,
) -> Estimate:
    """What the recipe takes, with every teacher live that is not cached by choice.

    Args:
        folders: of the models that are loaded, by `student` and the teachers' places.
        vocabulary: real size of the tokenizer, for a student that is new.
        planned: the student, if it is to be cut out.
        rows: of the data; None: every row is as long as `data.max_tokens` lets it be.
    """
    constants, train = kernels(), recipe.train
    if train.memory_gib is not None:  # a quarter of it, as `guards.limit_memory` has it
        constants = constants._replace(keeps=min(constants.keeps, train.memory_gib * GIB / 4))
    models = models_of(recipe, folders, vocabulary, planned)
    student, rows = models.student, rows or Rows()
    shapes = _shapes(recipe, rows)
    asked = any(MENU[name].needs_teacher for name in recipe.objective)
    live = {
        place: one
        for place, one in models.teachers.items()
        if recipe.teachers[place].source != "cache" and asked
    }
    shown = models._replace(teachers=live)

    def heard(shape: Shape) -> float:
        return sum(reading(one, shape, constants, student) for one in live.values())

    def step(shape: Shape) -> float:
        mine = sum(activations(models, recipe, shape, constants)) + features(shown, recipe, shape)
        return mine + heard(shape)

    largest = max(shapes, key=step)
    steps = over_shapes(shapes, step, constants)
    written = own_rows(recipe, models, rows, vocabulary, constants)
    met = {shape.tokens for shape in shapes}
    checked = validating(recipe, models, rows, vocabulary, met, constants)
    each = logits(recipe, vocabulary, len(live), shapes, constants)
    chunks, chunk = together(each, constants), max(each, default=0.0)
    layers, passing = activations(models, recipe, largest, constants)
    # The teachers read, then losses are taken, then one layer after the other goes back.
    living = layers + features(shown, recipe, largest) + max(passing, heard(largest), chunk)
    whole = together([steps, written, checked], constants) + chunks
    most = max(step(largest) + chunk, written, checked)
    at_once = validating(recipe, models, rows, vocabulary, (), constants._replace(keeps=0.0))
    kept = with_freed(most, whole, constants, max(living, written, at_once)) - chunks - heard(largest)
    teachers = {
        place: (one.bytes + reading(one, largest, constants, student)) / GIB for place, one in live.items()
    }
    update = constants.update if train.micro_batches == 1 else constants.update_apart
    work = Parts(activations=step(largest), logits=chunks)
    stages = stages_of(recipe, models, rows, vocabulary, work, constants)
    return Estimate(
        student.bytes / GIB,
        4.0 * models.moving / GIB,
        8.0 * models.moving / GIB,
        kept / GIB,
        chunks / GIB,
        teachers,
        machine_gib(),
        4.0 * (models.moving * update + largest_array(models) * constants.largest) / GIB,
        constants.base / GIB,
        {name: parts.over(GIB) for name, parts in stages.items()},
        max(shape.width for shape in shapes),
        heard(largest) / GIB,
    )


def largest_array(models: Models) -> float:
    """Numbers of the largest matrix that moves; of adapters all, which are small."""
    student = models.student
    if models.moving < student.numbers:
        return models.moving
    return max(student.vocabulary, student.wide, student.queries) * student.hidden


def machine_gib() -> float:
    """Memory that a run may take: what the GPU recommends, or else a share of all there is.

    Infinite where the system does not tell.
    """
    told = mx.device_info().get("max_recommended_working_set_size")
    if told:
        return float(told) / GIB
    has = memory_gib()
    return math.inf if has is None else SHARE * has


def _shapes(recipe: Recipe, rows: Rows) -> Sequence[Shape]:
    """Of the batches that the student learns from."""
    train, longest = recipe.train, recipe.data.max_tokens
    found: list[Shape] = []
    if rows.learned and not recipe.all_own:
        found += batches.of_training(rows.learned, train, recipe.seed)
    own = recipe.generate.on_policy
    if own is not None:
        asked = [*rows.questions, *(row.start for row in rows.learned)] or [longest]
        found += batches.of_own(asked, own.max_tokens, train)
    elif rows.questions and not rows.learned:  # else answers are taken to be as long as the user's
        found += batches.of_answers(rows.questions, recipe.generate.max_tokens, longest, train)
    return found or [batches.largest(train, longest)]
