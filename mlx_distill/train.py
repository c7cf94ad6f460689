"""The training loop: the one place that turns batches into a student.

Offline, live-teacher and plain training differ in the rows, the targets and the parameters that
move; the loop is the same. A step is one finished optimizer update.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_distill.data.batch import Batch, Batches, counted_places
from mlx_distill.errors import Diverged
from mlx_distill.keys import seed_global
from mlx_distill.losses import Targets
from mlx_distill.losses.menu import MENU
from mlx_distill.matching import Compared, Matching, strip
from mlx_distill.objective import Objective, Schedule, Voice, exit_schedule, exit_terms
from mlx_distill.optimizer import clip, make_optimizer
from mlx_distill.recipe import Recipe, Train
from mlx_distill.run import StageLog
from mlx_distill.student import checkpoint_layers
from mlx_distill.teacher import LiveTeacher, NoTeacher, Teaches

# Float32 arrays over the vocabulary that a chunk of forward_kl holds at once, for each distribution: logits,
# probabilities, and gradients of both. From benchmarks/losses_bench.py; others hold more.
COPIES = 4.5


class Trained(NamedTuple):
    """What a training run used up."""

    train_tokens: int  # counted labels seen, repeats included
    train_seconds: float


class Step(NamedTuple):
    """The two halves of a step, compiled apart so that micro-batches can be added up between them."""

    gradients: Callable[[Batch, Sequence[Targets], Schedule], tuple[Any, dict[str, mx.array]]]
    update: Callable[[Any, mx.array], mx.array]


def make_step(objective: Objective, optimizer: Any, recipe: Recipe) -> Step:
    """Functions that compute and apply gradients of `objective` by the weights of its student.

    `gradients(batch, targets, schedule)` gives sums over counted positions, to be added up;
    `update(sums, count)` divides once, clips, updates student and optimizer in place, and gives the norm.
    """
    student = objective.student
    value_and_gradients = nn.value_and_grad(student, objective.sums)

    def gradients_at(
        tokens: mx.array, places: mx.array, targets: Sequence[Targets], schedule: Schedule
    ) -> tuple[Any, dict[str, mx.array]]:
        (_, parts), sums = value_and_gradients(tokens, places, targets, schedule)
        return sums, parts

    def update(sums: Any, count: mx.array) -> mx.array:
        means = tree_map(lambda g: g / count.astype(g.dtype), sums)
        means, size = clip(means, recipe.train.clip)
        optimizer.update(student, means)
        return size

    if recipe.train.compile:
        # All that changes between calls is an input: weights, adapters, optimizer, and dropout's
        # random state, which a trace would otherwise freeze. `gradients` changes no weight, but
        # differentiating leaves tracers in the student, so its state is an output there too.
        random = [mx.random.state] if recipe.student.dropout else []
        read = [student.state, *random]
        gradients_at = mx.compile(gradients_at, inputs=read, outputs=read)
        changed = [student.state, optimizer.state]
        update = mx.compile(update, inputs=changed, outputs=changed)
    return Step(
        lambda batch, targets, schedule: gradients_at(
            batch.tokens, counted_places(batch), list(targets), schedule
        ),
        update,
    )


def chunk_of(logits_mib: int, vocabulary: int, *, logits: int) -> int:
    """Places at a time: as many as `train.logits_mib` holds, 16 at least.

    A power of two, and from 128 on a multiple of 128, as the number of counted places is: an odd last chunk
    could not take over the memory of the others.

    Args:
        logits: how many distributions over the vocabulary a place has at once: the student's, one of each
            exit, and one of each live teacher.
    """
    places = int(logits_mib * 2**20 / (vocabulary * 4 * COPIES * logits))
    return places // 128 * 128 if places >= 128 else max(16, 2 ** (max(1, places).bit_length() - 1))


def train(
    student: Any,
    teachers: Sequence[Teaches],
    batches: Batches,
    recipe: Recipe,
    vocabulary: int,
    log: StageLog,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> Trained:
    """Train `student` in place for `recipe.train.steps` updates, from the last checkpoint on.

    Args:
        teachers: one for each of `recipe.teachers`, in that order.
        vocabulary: logits beyond it are cut.
        log: metrics, console, checkpoints and interrupts of this stage.
        validate: what to measure every `eval_every` steps.

    Raises:
        Diverged: the gradient is no finite number any more.
        Interrupted: a signal came; a checkpoint was saved.
    """
    options = recipe.train
    student.train()  # hybrid models choose kernels without a gradient in eval mode
    if options.gradient_checkpointing:
        checkpoint_layers(student)
    objective = make_objective(student, teachers, recipe, vocabulary)
    optimizer = make_optimizer(options)
    optimizer.init(student.trainable_parameters())
    counters = log.restore(student, optimizer)
    step_functions = make_step(objective, optimizer, recipe)
    layers = len(student.layers) if objective.exits else 0
    started = time.perf_counter() - counters.seconds

    for step in log.steps(counters.step + 1, options.steps):
        if recipe.student.dropout:
            seed_global(recipe.seed, "dropout", step)
        schedule = exit_schedule(recipe.objective, layers, step, options.steps)
        sums, parts, count = _accumulate(step, teachers, batches, options, step_functions, schedule)
        size = step_functions.update(sums, count)
        # The one evaluation of a step: everything before it was only described.
        mx.eval(student.state, optimizer.state, parts, count, size)

        # From here on, `step` names the weights just made.
        if not math.isfinite(float(size)):
            raise Diverged(
                f"{log.stage}: the gradient is not finite at step {step}; lower `train.learning_rate` "
                f"(now {options.learning_rate:g}) or raise `train.warmup`"
            )
        counters.add(step, parts, int(count), time.perf_counter() - started)
        if every(options.log_every, step) or step == options.steps:
            log.metrics(counters, recipe, float(size), float(optimizer.learning_rate))
        if validate is not None and every(options.eval_every, step):
            log.validation(step, validate(student))
            student.train()
        stopping = log.interrupts.number is not None
        if step < options.steps and (stopping or every(options.save_every, step)):
            log.save(student, optimizer, counters)
        log.interrupts.check()
    student.eval()
    strip(student)
    return Trained(counters.tokens, counters.seconds)


def make_objective(
    student: nn.Module, teachers: Sequence[Teaches], recipe: Recipe, vocabulary: int
) -> Objective:
    """The objective of `recipe`, as its student and teachers allow it."""
    options = list(recipe.teachers.values()) if teachers else []
    whole = sum(one.weight for one in options)
    voices = [
        Voice(one.weight / whole, teacher.head, teacher.shared, one.top_k, one.tail)
        for teacher, one in zip(teachers, options, strict=True)
    ]
    terms = recipe.objective
    shown = [(i, t) for i, t in enumerate(teachers) if isinstance(t, LiveTeacher)]
    matching = None
    if any(MENU[name].family in ("hidden", "attention") for name in terms):
        shares = sum(voices[i].share for i, _ in shown)
        compared = [Compared(i, voices[i].share / shares, teacher.model) for i, teacher in shown]
        matching = Matching(terms, student, compared, recipe.seed)
    exits = {layer for term in exit_terms(terms).values() for layer in term.options["exits"]}
    return Objective(
        terms,
        student,
        vocabulary,
        voices,
        chunk=chunk_of(
            recipe.train.logits_mib,
            vocabulary,
            logits=1 + len(exits) + sum(voice.head is not None for voice in voices),
        ),
        temperature=recipe.temperature,
        matching=matching,
    )


def _accumulate(
    step: int,
    teachers: Sequence[Teaches],
    batches: Batches,
    options: Train,
    functions: Step,
    schedule: Schedule,
) -> tuple[Any, dict[str, mx.array], mx.array]:
    """Gradients, losses and counted labels of one step, each summed over its micro-batches."""
    total: Any = None
    for place in range(options.micro_batches):
        batch = batches[(step - 1) * options.micro_batches + place]
        targets = [teacher.targets(batch) for teacher in teachers or [NoTeacher()]]
        sums, parts = functions.gradients(batch, targets, schedule)
        new = (sums, parts, batch.counted.sum())
        total = new if total is None else tree_map(mx.add, total, new)
        if options.micro_batches > 1:
            mx.eval(total)  # or the graphs of all micro-batches would be alive at once
    return total


def every(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps is due; never, if `interval` is 0."""
    return interval > 0 and step % interval == 0
