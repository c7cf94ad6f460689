"""One real step on the largest batch, of a student that is thrown away: what is too much shows at once."""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from mlx_distill.cache import CachedTeacher
from mlx_distill.cache.capture import fill
from mlx_distill.cache.stage import cache_folder
from mlx_distill.cache.store import MANIFEST, Store
from mlx_distill.errors import Diverged
from mlx_distill.guards import resumable_if_mlx_stops
from mlx_distill.keys import seed_global
from mlx_distill.learning import asked_in, masks, teaches
from mlx_distill.models import Loaded
from mlx_distill.objective import exit_schedule, label_schedule
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import Term
from mlx_distill.probes.longest import Largest, known_lessons
from mlx_distill.self_teacher import Average
from mlx_distill.student import checkpoint_layers, widen
from mlx_distill.teacher import Layers, NoTeacher, Teaches
from mlx_distill.train import make_objective, make_step
from mlx_distill.work import Work


class Tried(NamedTuple):
    """What a step on the largest batch gave."""

    losses: dict[str, float]  # nats a counted label
    gradient_norm: float
    seconds: float  # compiling included


@contextmanager
def stored_targets(work: Work, largest: Largest) -> Iterator[dict[str, Teaches]]:
    """What teachers with `source: cache` have stored of the batch, or will have; they are unloaded again.

    What they will have lies in a temporary folder while the block runs, so the run's cache stays what it is.
    """
    with ExitStack() as stack:
        found: dict[str, Teaches] = {}
        for place in asked_in(work.recipe):
            if work.recipe.teachers[place].source != "cache":
                continue
            made_of, rows = work.prepared.caches[place], largest.learned.encoded
            if is_stored(work, place):
                folder = cache_folder(work, place)
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-distill-")))
                make_room(work, place)
                live = work.live_teacher(place, Layers(made_of["hidden"]))
                assert live is not None
                fill(Store(folder, made_of, place), live, rows)
                del live
                work.unload(place)
                mx.clear_cache()  # what its reading has freed is not to stand beside what the student takes
            found[place] = CachedTeacher(folder, rows, made_of, tail=work.recipe.teachers[place].tail)
        yield found


def make_room(work: Work, place: str | None = None) -> None:
    """Free the other teachers before one is loaded, if any is stored: they need not fit together."""
    if any(teacher.source == "cache" for teacher in work.recipe.teachers.values()):
        for other in work.recipe.teachers.keys() - {place}:
            work.unload(other)


def is_stored(work: Work, place: str) -> bool:
    """Whether a cache holds all that a teacher is to be asked, so that nobody needs to load it."""
    if place not in work.prepared.caches or not (cache_folder(work, place) / MANIFEST).exists():
        return False
    if work.prepared.prompts and "generate" not in work.run.stages():
        return False
    store = Store(cache_folder(work, place), work.prepared.caches[place], place)
    return not store.missing(known_lessons(work).encoded)


def try_step(work: Work, student: Loaded, largest: Largest, stored: Mapping[str, Teaches]) -> Tried:
    """Forward, backward and update as `train` does them, compiled where it is, micro-batches added up.

    Args:
        student: is changed, and of no use behind this.
        stored: teachers that are asked in place of their models.

    Raises:
        Stopped: out of memory.
    """
    recipe, batch = work.recipe, largest.batch
    options, vocabulary = recipe.train, work.prepared.vocabulary
    if recipe.student.method == "full":
        widen(student.model)
    if recipe.self_taught:
        work.lend(student)
    asked = asked_in(recipe)
    averages = {p: Average(student.model, one.ema) for p, one in asked.items() if one.ema is not None}
    teachers = [
        stored[place]
        if place in stored
        else teaches(work, place, student, largest.learned, averages.get(place))
        for place in asked
    ]
    student.model.train()
    if options.gradient_checkpointing:
        checkpoint_layers(student.model)
    objective = make_objective(student.model, teachers, recipe, vocabulary)
    optimizer = make_optimizer(options)
    optimizer.init(student.model.trainable_parameters())
    functions = make_step(objective, optimizer, recipe, masks(recipe, student))
    layers = len(student.model.layers) if objective.exits else 0  # type: ignore[arg-type]
    schedule = exit_schedule(recipe.objective, layers, options.steps, options.steps)
    if recipe.generate.on_policy is not None:
        schedule = label_schedule(recipe.objective, schedule, own=largest.own)
    if recipe.student.dropout:
        seed_global(recipe.seed, "dropout", 1)
    weight = batch.weights.sum(-1).sum()
    started = time.perf_counter()
    with resumable_if_mlx_stops(f"the first step, on {largest.told()}"):
        targets = [teacher.targets(batch) for teacher in teachers or [NoTeacher()]]
        sums, parts = functions.gradients(batch, targets, schedule)
        if options.micro_batches > 1:  # the gradients of those before are in memory then
            mx.eval(sums)
            more, _ = functions.gradients(batch, targets, schedule)
            sums = tree_map(mx.add, sums, more)
        size, _ = functions.update(sums, weight * min(options.micro_batches, 2), parts)
        mx.eval(student.model.state, optimizer.state, size, parts, weight)
    losses = {name: float(part) / (float(weight) or 1.0) for name, part in parts.items()}
    return Tried(losses, float(size), time.perf_counter() - started)


def check_numbers(losses: Mapping[str, float], size: float, terms: Mapping[str, Term], batch: str) -> None:
    """Refuse to begin with numbers that are not finite.

    Args:
        size: norm of the gradient.
        batch: in words.

    Raises:
        Diverged: the loss, or the gradient where all losses are finite.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            options = ", ".join(f"{key} {value}" for key, value in terms[name].options.items())
            raise Diverged(
                f"`objective.{name}` is {value} on {batch}, before anything was learned, though the logits "
                f"of the models are finite; change its options ({options or 'all defaults'}), or leave it out"
            )
    if not math.isfinite(size):
        raise Diverged(
            f"the gradient is {size} on {batch}, before anything was learned, though each loss is finite "
            f"({', '.join(losses)}); leave out one after the other to find the one that does it"
        )
