"""A student and its teachers put together for the training loop, whichever stage asks."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distill import models
from mlx_distill.cache import CachedTeacher
from mlx_distill.cache.ahead import Ahead
from mlx_distill.cache.stage import cache_folder
from mlx_distill.data.template import encode, encode_prompt, end_of_turn_ids
from mlx_distill.difficulty import difficulties
from mlx_distill.distributed import ALONE, Ranks
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.lessons import Lessons, labels, make_batches
from mlx_distill.losses.menu import MENU
from mlx_distill.matching import teacher_layers
from mlx_distill.models import Loaded
from mlx_distill.on_policy import OwnRows
from mlx_distill.options import Teacher, Term
from mlx_distill.prune.sparse import masks_of
from mlx_distill.recipe import Recipe
from mlx_distill.self_teacher import Average
from mlx_distill.spans import ForeignTeacher
from mlx_distill.stage_log import StageLog
from mlx_distill.student import widen
from mlx_distill.teacher import LiveTeacher, Teaches
from mlx_distill.train import HasBatches, Trained, train
from mlx_distill.work import Work


def learn(
    work: Work, stage: str, student: Loaded, learned: Lessons, recipe: Recipe, ranks: Ranks = ALONE
) -> Trained:
    """Train a student in place by the objective of `recipe`; adapters are merged into its weights at the end.

    Args:
        stage: names its checkpoints and its lines in the log: `student`, `baseline`, `round-1`, ...
        student: not the one that `work` keeps for another stage.
        recipe: of the run, or with another objective, other steps, or no teacher.
        ranks: that share the training, each of which calls this.
    """
    dtype = widen(student.model) if recipe.student.method == "full" else None
    # Difficulties are those of the student's rows; the baseline takes its own in random order.
    batches: HasBatches = []
    if not recipe.all_own:
        batches = make_batches(learned, recipe, difficulties(work) if stage != "baseline" else None)
    deal = ranks.deal(recipe)
    batches = deal.batches(batches)
    if recipe.self_taught:
        work.lend(student)
    asked = asked_in(recipe)
    averages = {
        place: Average(student.model, teacher.ema)
        for place, teacher in asked.items()
        if teacher.ema is not None
    }
    teachers = [teaches(work, place, student, learned, averages.get(place)) for place in asked]
    if any(isinstance(teacher, CachedTeacher) for teacher in teachers):
        batches = Ahead(batches, teachers, recipe.train.steps * deal.each)
    # A cached teacher was unloaded to make room, and is not loaded again while the student trains.
    watching = work.prepared.valid and recipe.teacher and recipe.teacher.source == "live"
    compared = work.comparable_teacher() if watching else None

    def validate(model: nn.Module) -> dict[str, float]:
        return fidelity(
            model,
            work.prepared.valid,
            work.prepared.vocabulary,
            teacher=compared,
            title=f"{stage}: validation",
            progress=work.run.progress,
        )[0]

    with work.run.interrupts.deferred():
        used = train(
            student.model,
            teachers,
            batches,
            recipe,
            work.prepared.vocabulary,
            StageLog(work.run, stage, recipe.train.keep),
            validate if work.prepared.valid else None,
            own_rows(work, recipe, ranks),
            list(averages.values()),
            masks(recipe, student),
            [row.origin for row in learned.rows],
            ranks,
        )
        models.fused(student)
        if dtype is not None:
            student.model.set_dtype(dtype)
    return used


def without_teacher(recipe: Recipe) -> Recipe:
    """A recipe by which the same student learns from the user's labels alone: the baseline's."""
    given = recipe.generate.model_copy(update={"on_policy": None})
    changes = {"objective": {"cross_entropy": Term()}, "teacher": None, "generate": given}
    return recipe.model_copy(update=changes)


def asked_in(recipe: Recipe) -> dict[str, Teacher]:
    """The teachers that run while the student trains.

    Where no loss asks them, as on answers that one of them wrote before, none does.
    """
    return recipe.teachers if any(MENU[name].needs_teacher for name in recipe.objective) else {}


def masks(recipe: Recipe, student: Loaded) -> dict[str, mx.array]:
    """Where the weights of a student that was made sparse may move; empty for one that was not."""
    sparse = recipe.student.prune is not None and recipe.student.prune.sparsity is not None
    return masks_of(student.model) if sparse else {}


def own_rows(work: Work, recipe: Recipe, ranks: Ranks = ALONE) -> OwnRows | None:
    """What lets the student answer the questions of the data itself; None where it is not to."""
    options, prepared = recipe.generate.on_policy, work.prepared
    if options is None:
        return None
    asked = [*labels(work).rows, *(asked.row for asked in prepared.prompts)]
    return OwnRows(
        options,
        [encode_prompt(row, prepared.tokenizer) for row in asked if row.text is None],
        steps=recipe.train.steps,
        batch_tokens=recipe.train.batch_tokens,
        seed=recipe.seed,
        ends=end_of_turn_ids(prepared.tokenizer),
        vocabulary=prepared.vocabulary,
        ranks=ranks,
    )


def teaches(
    work: Work, place: str, student: Loaded, learned: Lessons, average: Average | None = None
) -> Teaches:
    """A teacher of the student, on these rows."""
    rows = learned.encoded
    options, files = work.recipe.teachers[place], work.prepared.teachers[place]
    if options.source == "cache":
        made_of = work.prepared.caches[place]
        return CachedTeacher(cache_folder(work, place), rows, made_of, tail=options.tail)
    loaded = work.teacher(place) if average is None else student._replace(model=average.model)
    if files.foreign:
        theirs = [encode(row, files.tokenizer, count=work.recipe.data.count) for row in learned.rows]
        tokenizer, size = work.prepared.tokenizer, work.prepared.vocabulary
        origins = [row.origin for row in learned.rows]
        return ForeignTeacher(loaded, files.vocabulary, rows, theirs, tokenizer, size, origins)
    terms = work.recipe.objective
    depths: list[Any] = [student.model.layers, loaded.model.layers]
    layers = teacher_layers(terms, *map(len, depths))
    return LiveTeacher(loaded, files.vocabulary, layers)
