"""Few bits that learn: `quantize.method` dwq and qad, in the training loop of every other stage.

The student with its layers swapped (`fake.py`) learns by forward KL to say what the teacher, or the student
before rounding, says. Where that is no nearer on rows that were not learned from, the rounded one is kept.
"""

import json
import math
import shutil
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mlx_distill import models
from mlx_distill.cache import CachedTeacher
from mlx_distill.cache.ahead import Ahead
from mlx_distill.cache.stage import cache_folder, filled_caches
from mlx_distill.data.batch import Encoded
from mlx_distill.errors import Diverged
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.files import write_json
from mlx_distill.keys import generator
from mlx_distill.lessons import Lessons, lessons, make_batches
from mlx_distill.losses.menu import MENU
from mlx_distill.models import Loaded
from mlx_distill.options import Quantize, Teacher, Term
from mlx_distill.plain_json import parse_object
from mlx_distill.prune.sparse import masks_of
from mlx_distill.quantize.fake import learn_scales, learn_weights, learned
from mlx_distill.quantize.learned_checks import teaches_in_the_end
from mlx_distill.quantize.levels import Level
from mlx_distill.quantize.rounding import cast, layer_grids, quantized
from mlx_distill.recipe import Recipe
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog
from mlx_distill.teacher import LiveTeacher, Teaches
from mlx_distill.teacher_files import digest_of
from mlx_distill.train import HasBatches, Trained, train
from mlx_distill.work import Work

HELD_OUT = 0.05  # of the rows to learn from, to judge by where there is no `data.valid`
Towards = Literal["teacher", "student"]


def learned_quantized(
    work: Work, level: Level, bits: Mapping[str, int] | None
) -> tuple[Loaded, dict[str, Any]]:
    """The student in few bits that have learned, or merely rounded where learning made it no better.

    Args:
        bits: width of single layers, by module path, where they differ from the level's.

    Returns:
        the model, and what was measured: `towards`; before_kl, after_kl: mean KL(target || model) on rows
        that were not learned from, in nats a counted token (null: not finite, or diverged); kept: whether
        what was learned is; train_tokens, train_seconds.
    """
    options, rows = level.options, _rows(work)
    towards = towards_of(work, options)
    recipe = recipe_of(work.recipe, options, towards, str(work.run.model("student")))
    student = in_learning(_student(work), level, bits, seed=recipe.seed)
    target = _Target(work, recipe, towards)
    _forget_others(work.run, level, {"bits": bits, "towards": towards, "judged_on": rows.judged_on}, work)

    before = target.kl(student, rows.valid, f"{level.name}: rounded")
    used, why = Trained(0, 0.0), "no nearer"
    try:
        used = _train(work, level.name, student, target, rows.learned, recipe)
        after = target.kl(student, rows.valid, f"{level.name}: learned")
    except Diverged:
        after, why = math.nan, "training diverged; lower `quantize.learning_rate`"
    kept = after < before
    work.run.console.say(
        f"{level.name}: KL to the {towards} on {len(rows.valid)} rows of {rows.judged_on}: "
        f"{before:.3g} rounded, {after:.3g} learned"
        + ("" if kept else f"; the rounded model is kept ({why})")
    )
    return finished(_student(work), level, bits, learned(student.model) if kept else {}), {
        "towards": towards,
        "before_kl": before if math.isfinite(before) else None,
        "after_kl": after if math.isfinite(after) else None,
        "kept": kept,
        **used._asdict(),
    }


def in_learning(
    student: Loaded, level: Level, bits: Mapping[str, int] | None = None, *, seed: int = 0
) -> Loaded:
    """The student with every layer that is rounded swapped for one that learns, in place.

    It computes what the model saved in the end will.
    """
    options = level.options
    if options.dtype is not None:
        student = cast(student, options.dtype)
    grids = layer_grids(student.model, level.grid, bits)
    if options.method == "dwq":
        learn_scales(student.model, grids)
    else:
        learn_weights(student.model, grids, rank=options.rank, seed=seed)
    return student


def finished(
    student: Loaded, level: Level, bits: Mapping[str, int] | None, found: Mapping[str, Any]
) -> Loaded:
    """The quantized student, in place, with what `fake.learned` found; without it, as it is rounded."""
    ends = [(name, array) for name, array in found.items() if not name.endswith(".weight")]
    weights = [(name, array) for name, array in found.items() if name.endswith(".weight")]
    student.model.load_weights(weights, strict=False)  # before rounding, and scales behind it
    made = quantized(student, level.grid, bits, level.options.dtype)
    made.model.load_weights(ends, strict=False)
    return made


def towards_of(work: Work, options: Quantize) -> Towards:
    """Whose distribution is learned: as the recipe says, or the teacher's where it can be compared with."""
    first = work.prepared.teachers.get("teacher")
    usable = first is not None and not first.foreign and teaches_in_the_end(work.recipe)
    return options.towards or ("teacher" if usable else "student")


def recipe_of(recipe: Recipe, options: Quantize, towards: Towards, folder: str) -> Recipe:
    """The recipe of this training: forward KL alone, and what `quantize` says in place of `train`.

    Args:
        folder: of the student before rounding.
    """
    teacher = Teacher(model=folder)
    if towards == "teacher":
        assert recipe.teacher is not None  # a recipe without one learns towards the student
        teacher = recipe.teacher.model_copy(update={"others": []})
    share = recipe.train.warmup / recipe.train.steps
    changes = {
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "warmup": min(round(share * options.steps), options.steps - 1),
        "weight_decay": 0.0,  # it would pull what learns back to rounding to the nearest
        "curriculum": None,
        "eval_every": 0,
    }
    return recipe.model_copy(
        update={
            "student": recipe.student.model_copy(update={"dropout": 0.0}),
            "teacher": teacher,
            "objective": {"forward_kl": Term(options={"temperature": options.temperature})},
            "generate": recipe.generate.model_copy(update={"on_policy": None}),
            "train": recipe.train.model_copy(update=changes),
        }
    )


class _Target:
    """Whose distribution is learned: a teacher of the loop, and what the student is measured against."""

    def __init__(self, work: Work, recipe: Recipe, towards: Towards):
        self.work = work
        asked = any(MENU[name].needs_teacher for name in work.recipe.objective)  # or nothing was stored
        self.cached = recipe.teacher is not None and recipe.teacher.source == "cache" and asked
        self._live: LiveTeacher | None = None
        if towards == "student":
            self._live = LiveTeacher(_student(work), work.prepared.vocabulary)

    def teaches(self, rows: list[Encoded]) -> Teaches:
        if not self.cached:
            return self.live()
        filled_caches(self.work)  # again: what was damaged or removed since is read once more
        assert self.work.recipe.teacher is not None
        folder, made_of = cache_folder(self.work, "teacher"), self.work.prepared.caches["teacher"]
        return CachedTeacher(folder, rows, made_of, tail=self.work.recipe.teacher.tail)

    def live(self) -> LiveTeacher:
        if self._live is None:
            self._live = self.work.live_teacher()
        assert self._live is not None
        return self._live

    def kl(self, student: Loaded, rows: list[Encoded], title: str) -> float:
        """Mean KL(target || student) in nats a counted token. A cached teacher is loaded for it alone."""
        vocabulary, progress = self.work.prepared.vocabulary, self.work.run.progress
        found, _ = fidelity(
            student.model, rows, vocabulary, teacher=self.live(), title=title, progress=progress
        )
        if self.cached:
            self._live = None
            self.work.unload("teacher")
        return found["kl"]


class _Rows(NamedTuple):
    """Rows to learn from, and others to judge by."""

    learned: Lessons
    valid: list[Encoded]
    judged_on: str


def _rows(work: Work) -> _Rows:
    """All lessons and `data.valid`; without the latter, some lessons are kept apart.

    A student that wrote all answers itself has no lessons: it learns on the questions.
    """
    found = lessons(work)
    if not found.encoded:
        numbers = [i for i, asked in enumerate(work.prepared.prompts) if len(asked.tokens) > 1]
        asked = [work.prepared.prompts[i] for i in numbers]
        encoded = [Encoded(one.tokens, 1) for one in asked]
        found = Lessons([one.row for one in asked], encoded, ["prompts"] * len(asked), [*numbers])
    if work.prepared.valid:
        return _Rows(found, work.prepared.valid, "data.valid")
    count = len(found.encoded)
    order = generator(work.recipe.seed, "held out").permutation(count).tolist()
    apart = order[: max(1, round(HELD_OUT * count))]
    left = sorted(set(order) - set(apart)) or order  # of one row there is nothing to keep apart
    rest = Lessons(*([part[i] for i in left] for part in found))  # type: ignore[arg-type]
    return _Rows(rest, [found.encoded[i] for i in sorted(apart)], "the lessons, which were kept apart")


def _train(
    work: Work, stage: str, student: Loaded, target: _Target, rows: Lessons, recipe: Recipe
) -> Trained:
    teacher = target.teaches(rows.encoded)
    batches: HasBatches = make_batches(rows, recipe)
    if isinstance(teacher, CachedTeacher):
        batches = Ahead(batches, [teacher], recipe.train.steps * recipe.train.micro_batches)
    masks = {}
    if recipe.student.prune is not None and recipe.student.prune.sparsity is not None:
        # Affine grids hold zero, so a weight that does not move from it stays zero.
        masks = {path.replace(".weight", ".moves"): mask for path, mask in masks_of(student.model).items()}
    vocabulary, log = work.prepared.vocabulary, StageLog(work.run, stage, recipe.train.keep)
    with work.run.interrupts.deferred():
        origins = [row.origin for row in rows.rows]
        return train(student.model, [teacher], batches, recipe, vocabulary, log, masks=masks, origins=origins)


def _forget_others(run: Run, level: Level, more: dict[str, Any], work: Work) -> None:
    """Remove the checkpoints of a level that was made of something else: other options, another student."""
    folder = run.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    made_of = {
        "student": digest_of(run.model("student")),
        "quantize": level.options.model_dump(exclude={"bits"}),  # of all levels
        "grid": level.grid.model_dump(),
        **more,
    }
    kept = folder / f"{level.name}.json"
    try:
        known = parse_object(kept.read_bytes())
    except (OSError, ValueError):  # none yet, or damaged
        known = None
    if known != json.loads(json.dumps(made_of)):
        for old in folder.glob(f"{level.name}-step-[0-9]*"):
            shutil.rmtree(old)
        write_json(kept, made_of)


def _student(work: Work) -> Loaded:
    return models.load(str(work.run.model("student")), "student")
